"""Somebody at the controls of sessions: interrupts by hand, pauses that end again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import grpc
from soma.router.v1.session_service_pb2 import InterruptSessionRequest, PauseSessionRequest, ResumeSessionRequest
from soma.router.v1.session_service_pb2_grpc import SessionServiceStub

from soma_common.grpc.channel import open_channel
from soma_common.ids import SessionName

if TYPE_CHECKING:
    from tests.chaos.stack import FaultyStack

TIMEOUT_S: Final = 10.0
AGAIN_AFTER_S: Final = 0.3
TRIES: Final = 60
PAUSE_S: Final = 0.4


class Controls:
    """Calls to routers, each made until it succeeds: without its resume a pause looks like lost messages."""

    def __init__(self, stack: FaultyStack) -> None:
        self._stack = stack
        self._tasks: set[asyncio.Task[None]] = set()
        self._channel: grpc.aio.Channel | None = None
        self.done = 0
        """Calls that succeeded."""

    def interrupt(self, name: SessionName, key: str) -> None:
        """Stop what runs in a session now, and keep its work."""
        request = InterruptSessionRequest(name=str(name), request_id=f"interrupt-{key}")
        self._spawn(self._until_done(lambda stub: stub.InterruptSession(request, timeout=TIMEOUT_S)))

    def pause(self, name: SessionName, key: str) -> None:
        """Let a session start no turn for a moment."""
        self._spawn(self._pause(name, key))

    async def finish(self) -> None:
        """Wait until everything asked for is done."""
        await asyncio.gather(*self._tasks)
        await self.stop()

    async def stop(self) -> None:
        """Ask for nothing more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _pause(self, name: SessionName, key: str) -> None:
        pause = PauseSessionRequest(name=str(name), request_id=f"pause-{key}")
        resume = ResumeSessionRequest(name=str(name), request_id=f"resume-{key}")
        await self._until_done(lambda stub: stub.PauseSession(pause, timeout=TIMEOUT_S))
        await asyncio.sleep(PAUSE_S)
        await self._until_done(lambda stub: stub.ResumeSession(resume, timeout=TIMEOUT_S))

    async def _until_done(self, call: Callable[[Any], Awaitable[Any]]) -> None:
        for left in reversed(range(TRIES)):
            try:
                await call(self._stub())
            except grpc.aio.AioRpcError:
                if not left:
                    raise
                await asyncio.sleep(AGAIN_AFTER_S)
            else:
                self.done += 1
                return

    def _stub(self) -> Any:
        if self._channel is None:
            token = self._stack.admin_token
            self._channel = open_channel(
                self._stack.routers, token=lambda: token, service="router", wait_for_ready=True
            )
        return SessionServiceStub(self._channel)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
