"""Watchers that come and go: each follows the turn of one message, loses its stream, comes back, or leaves early."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import ArrivalPolicy as Policy
from soma.gateway.v1.channel_service_pb2 import StreamTurnRequest
from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceStub

from soma_common.client.channel_client import text_message
from soma_common.grpc.channel import open_channel
from soma_common.ids import SessionName
from soma_common.testing.watched import Watched

if TYPE_CHECKING:
    from tests.chaos.stack import FaultyStack

AT_ONCE: Final = 24
"""Watchers at one time; more are not let in."""
AGAIN_AFTER_S: Final = 0.3
LAST_LOOK_S: Final = 10.0


class Watchers:
    """Everybody who watches in one run. A watcher asks for the turn by sending its message once more, under its key."""

    def __init__(self, stack: FaultyStack, channel: str) -> None:
        self._stack, self._channel = stack, channel
        self.watched: list[Watched] = []
        """What each was shown."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._next = 0
        self.came_back = 0
        """Streams that ended before their turn did."""

    def watch(self, name: SessionName, key: str, text: str, policy: Policy.ValueType, leaves_after_s: float) -> None:
        """Watch a message's turn, at one gateway after the other; half of the watchers leave after a while."""
        if len(self._tasks) >= AT_ONCE:
            return
        self._next += 1
        watched = Watched(f"watcher {self._next}")
        self.watched.append(watched)
        request = StreamTurnRequest(
            session=SessionKey(tenant=name.tenant, agent=name.agent, channel=name.channel, session=name.session),
            idempotency_key=key,
            message=text_message(text),
            policy=policy,
            deliver=True,
        )
        patience_s = leaves_after_s if self._next % 2 else 120.0
        task = asyncio.create_task(self._follow(watched, request, name.tenant, patience_s), name=watched.name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Let those that are there see the ends of their turns, which have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LAST_LOOK_S)
        await self.stop()

    async def stop(self) -> None:
        """Everybody leaves."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def _follow(self, watched: Watched, request: StreamTurnRequest, tenant: str, patience_s: float) -> None:
        gateways = self._stack.gateways.split(",")
        visit = self._next
        try:
            async with asyncio.timeout(patience_s):
                while not await self._look(watched, request, tenant, gateways[visit % len(gateways)]):
                    self.came_back += 1
                    visit += 1
                    await asyncio.sleep(AGAIN_AFTER_S)
        except TimeoutError:
            return  # It left, and nobody minds.

    async def _look(self, watched: Watched, request: StreamTurnRequest, tenant: str, gateway: str) -> bool:
        """One stream; True if it showed the end."""
        watched.came_back()
        call: Any = ChannelServiceStub(self._channel_to(gateway, tenant)).StreamTurn(request, timeout=30)
        try:
            async for response in call:
                if response.HasField("live"):
                    watched.saw(response.live)
                elif response.HasField("outcome"):
                    watched.ended(response.outcome.turn_id.hex(), response.outcome)
                    return True
        except grpc.aio.AioRpcError:
            return False
        finally:
            call.cancel()
        return False

    def _channel_to(self, gateway: str, tenant: str) -> grpc.aio.Channel:
        key = f"{gateway} {tenant}"
        if key not in self._channels:
            token = self._stack.token(tenant)
            self._channels[key] = open_channel(gateway, token=lambda: token, service="gateway", wait_for_ready=True)
        return self._channels[key]
