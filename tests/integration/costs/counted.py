"""A stack whose every link is counted, and bursts of turns through it."""

from __future__ import annotations

import random
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery, Outcome
from soma.gateway.v1.channel_service_pb2 import InboundMessage

from soma_common.client.channel_client import ChannelClient, text_message
from soma_common.testing.eventually import eventually
from soma_common.testing.model_server import ModelServer
from soma_common.testing.tool_server import ToolServer
from somastack.home import Home
from somastack.layout import Layout, is_taken
from tests.chaos.stack import CLIENT, ECHO, FaultyStack, errand
from tests.integration.costs.wire import GrpcMessages, NatsPublishes, PostgresStatements

BURST: Final = 64
"""Messages of a burst, each of another session."""
TENANT: Final = "demo"
_DONE_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Costs:
    """What has been counted so far; the difference of two is what happened between."""

    groups: int
    """Group commits."""
    executions: int
    """Statements on the router's writing connection."""
    round_trips: int
    """Of that connection."""
    lane_publishes: int
    """Gateway -> JetStream, each stored and synced."""
    delivery_publishes: int
    """Router -> gateway."""
    ack_publishes: int
    """Gateway -> router."""
    frames_to_brain: int
    frames_from_brain: int
    frames_from_adapter: int
    frames_to_adapter: int
    wal_bytes: int

    def since(self, before: Costs) -> dict[str, int]:
        """By name what came after `before`."""
        return {name: getattr(self, name) - getattr(before, name) for name in Costs.__dataclass_fields__}


class CountedStack:
    """A running stack, its counters, and an adapter."""

    def __init__(self, stack: FaultyStack, adapter_frames: GrpcMessages, brain_frames: GrpcMessages) -> None:
        self.stack = stack
        self.statements, self.of_gateway, self.of_router = PostgresStatements(), NatsPublishes(), NatsPublishes()
        self.adapter_frames, self.brain_frames = adapter_frames, brain_frames
        assert stack.proxy is not None, "the stack has links"
        stack.proxy.taps = {
            ("router-0", "postgres"): self.statements,
            ("gateway-0", "nats"): self.of_gateway,
            ("router-0", "nats"): self.of_router,
            ("router-0", "cognition-0"): brain_frames,
            (CLIENT, "gateway-0"): adapter_frames,
        }
        self.database: asyncpg.Connection[asyncpg.Record]
        self.answers: list[Delivery] = []
        self.errors: list[Error] = []

    @asynccontextmanager
    async def adapter(self) -> AsyncIterator[ChannelClient]:
        """An adapter with room for a burst."""
        async with ChannelClient(
            self.stack.gateways, token=self.stack.token(TENANT), tenant=TENANT, channel="costs", instance="costs-1",
            live=False, credit=4 * BURST, on_delivery=self.answers.append,
        ) as client:  # fmt: skip
            yield client

    async def burst(self, adapter: ChannelClient, messages: int = BURST) -> dict[str, int]:
        """Posts a message to each of so many sessions at once; returns what was counted until all is answered and
        acknowledged.
        """
        before = await self.costs()
        self.answers.clear()
        for number in range(messages):
            adapter.post(
                InboundMessage(
                    agent=ECHO,
                    session=f"s{number}",
                    idempotency_key=uuid.uuid4().hex,
                    message=text_message("x" * 256),
                ),
                self._answered,
            )
        await eventually(lambda: len(self.answers) == messages, _DONE_S, "every turn is answered")
        await eventually(self._all_acknowledged, _DONE_S, "every delivery is acknowledged")
        assert not self.errors
        assert {delivery.outcome for delivery in self.answers} == {Outcome.OUTCOME_FINAL}
        return (await self.costs()).since(before)

    def _answered(self, message_id: bytes, error: Error | None) -> None:
        if error is not None:
            self.errors.append(error)

    async def _all_acknowledged(self) -> bool:
        return not await self.database.fetchval("SELECT count(*) FROM router.deliveries")

    async def costs(self) -> Costs:
        """What has been counted so far."""
        metrics = await self.stack.metrics("router-0")
        writes = self.statements.seen
        return Costs(
            groups=int(metrics["soma_router_group_items_count"]),
            executions=writes["router-0 writer", "E"] + writes["router-0 writer", "Q"],
            round_trips=writes["router-0 writer", "S"] + writes["router-0 writer", "Q"],
            lane_publishes=self.of_gateway.of("in"),
            delivery_publishes=self.of_router.of("out"),
            ack_publishes=self.of_gateway.of("ack"),
            frames_to_brain=self.brain_frames.there,
            frames_from_brain=self.brain_frames.back,
            frames_from_adapter=self.adapter_frames.there,
            frames_to_adapter=self.adapter_frames.back,
            wal_bytes=int(await self.database.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'")),
        )


@asynccontextmanager
async def counted_stack() -> AsyncIterator[CountedStack]:
    """One of each service, with a proxy between each two."""
    with tempfile.TemporaryDirectory(prefix="soma-costs-", ignore_cleanup_errors=True) as folder:
        async with ModelServer(errand) as model, ToolServer([]) as tools:
            tools_file = {"toolgw": {"SOMA_TOOLGW_HTTP_TOOLS_FILE": f"{folder}/tools.json"}}
            layout = Layout(_free_base(), {})
            home = Home(Path(folder) / "home")
            stack = FaultyStack(home, layout, model, tools, tools_file, tenants=(TENANT,), links=True)
            counted = CountedStack(stack, GrpcMessages(), GrpcMessages())
            try:
                await stack.start()
                counted.database = await stack.database()
                yield counted
                await counted.database.close()
            finally:
                await stack.stop()


def _free_base() -> int:
    """A base whose ports are free, below those that the system gives to outgoing connections."""
    bases = random.sample(range(12000, 30000, 200), 90)
    return next(base for base in bases if not any(is_taken(port) for port, _ in Layout(base, {}).ports()))
