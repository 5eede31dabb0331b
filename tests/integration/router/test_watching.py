"""Watches over a real bus, of turns in the real tables: large journals, several routers, owners that change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from google.protobuf.struct_pb2 import Value
from nats.aio.client import Client
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import (
    Delivery,
    FinalMessage,
    LiveEvent,
    ModelReply,
    StepBody,
    ToolCall,
    ToolResult,
    ToolResults,
    WatchPosition,
)

from services.router.adapters.exchange_nats import NatsInbox, NatsOutbox
from services.router.application.outcomes import EndItem
from services.router.application.state import RouterState
from services.router.application.watch_turns import LiveDesk
from services.router.domain.partition import Partition
from services.router.domain.session import Turn
from services.router.domain.turn import Outcome, StepKind
from soma_common.ids import SessionName, partition_of
from soma_common.layout import LaneLayout
from soma_common.live import LiveHub, Subject
from soma_common.live_merge import Watched
from soma_common.nats.connection import connect_nats
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually
from tests.integration.router.store import Store, step
from tests.stalls import Stalls
from tests.unit.router.builders import AGENT, CHANNEL, PARTITIONS, TENANT, inbound

SESSION = SessionName(TENANT, AGENT, CHANNEL, "s")
PARTITION = partition_of(SESSION.id, PARTITIONS)


class Owner:
    """What a router does for watchers."""

    def __init__(self, client: Client, name: str, store: Store) -> None:
        self.state = RouterState(LaneLayout(PARTITIONS, 1), cast(Any, None), 100, 100)
        self.outbox = NatsOutbox(client, name, lambda: True)
        self.desk = LiveDesk(self.state, store.history, self.outbox, lambda _: None)
        self.inbox = NatsInbox(client, name, cast(Any, None), self.desk.query)

    def owns(self, partition: Partition, turn: Turn | None = None) -> None:
        self.state.partitions[partition.id] = partition
        if turn is not None:
            partition.sessions[turn.session.id] = turn.session
            self.state.running[turn.id] = turn

    def lost(self, partition: Partition) -> None:
        del self.state.partitions[partition.id]
        self.state.running.clear()


@asynccontextmanager
async def running(nats_server: FaultyNats, store: Store, *names: str) -> AsyncIterator[list[Owner]]:
    """Routers beside each other on one bus."""
    clients = [await connect_nats(nats_server.url, nats_server.token_file, name) for name in names]
    owners = [Owner(client, name, store) for client, name in zip(clients, names, strict=True)]
    tasks = [asyncio.create_task(owner.outbox.run()) for owner in owners]
    for owner in owners:
        await owner.inbox.open()
    try:
        yield owners
    finally:
        for task in tasks:
            task.cancel()
        for owner, client in zip(owners, clients, strict=True):
            await owner.inbox.close()
            await client.close()


@asynccontextmanager
async def a_hub(nats_server: FaultyNats) -> AsyncIterator[LiveHub]:
    client = await connect_nats(nats_server.url, nats_server.token_file, "watcher")
    try:
        yield LiveHub(client, PARTITIONS, tenant_watches=1000, bound="test")
    finally:
        await client.close()


async def a_large_turn(store: Store, partition: Partition, steps: int) -> Turn:
    """A running turn whose journal is larger than a message of the bus may be, many times."""
    _, turn = await store.started(partition, inbound(), 1)
    for number in range(steps):
        calls = [ToolCall(index=n, tool=f"t{number}") for n in range(4)]
        reply = ModelReply(text=f"step {number} " + "é" * 100_000, tool_calls=calls)
        results = [ToolResult(index=n, tool=f"t{number}", result=Value(string_value="x" * 60_000)) for n in range(4)]
        for kind, body in (
            (StepKind.MODEL_REPLY, StepBody(model_reply=reply)),
            (StepKind.TOOL_RESULTS, StepBody(tool_results=ToolResults(results=results))),
        ):
            await store.commit(step(turn, kind, body.SerializeToString()))
            turn.journal.append(body.SerializeToString())
    return turn


def texts(events: list[LiveEvent]) -> dict[int, str]:
    shown: dict[int, str] = {}
    for event in events:
        if event.HasField("text"):
            assert event.text.offset == len(shown.get(event.step, ""))
            shown[event.step] = shown.get(event.step, "") + event.text.text
    return shown


async def read(watch: AsyncIterator[Watched], events: list[LiveEvent]) -> None:
    async for event, _ in watch:
        events.append(event)


async def test_a_turn_of_many_megabytes_is_shown_whole_while_it_runs_and_after(
    store: Store, nats_server: FaultyNats
) -> None:
    partition = await store.take(PARTITION)
    turn = await a_large_turn(store, partition, steps=6)
    expected = {2 * n + 1: f"step {n} " + "é" * 100_000 for n in range(6)}
    async with running(nats_server, store, "router-0") as (owner,), a_hub(nats_server) as hub:
        owner.owns(partition, turn)
        turn.text, turn.text_length = ["so far"], 6
        live: list[LiveEvent] = []
        async with hub.watch(Subject(SESSION, turn_id=turn.id)) as watch:
            reading = asyncio.create_task(read(watch, live))
            await eventually(lambda: texts(live).get(13) == "so far", 20.0)
            message = Message(parts=[Part(text="so far so good")])
            body = StepBody(final=FinalMessage(message=message)).SerializeToString()
            answer = EndItem(
                partition, turn, Outcome.FINAL, [(StepKind.FINAL, body)], Delivery(message=message), lambda _: None
            )
            await store.commit(answer)
            del owner.state.running[turn.id]
            turn.session.turn = None
            owner.desk.ended(turn, answer.answer)
            await asyncio.wait_for(reading, 20.0)
        assert texts(live) == expected | {13: "so far so good"}
        assert sum(event.HasField("tool_result") for event in live) == 24
        after: list[LiveEvent] = []
        async with hub.watch(Subject(SESSION, turn_id=turn.id)) as watch:
            await asyncio.wait_for(read(watch, after), 20.0)
        assert texts(after) == texts(live)
        middle = WatchPosition(turn_id=turn.id, dispatch=1, step=5, offset=70_000)
        rest: list[LiveEvent] = []
        async with hub.watch(Subject(SESSION, turn_id=turn.id), after=middle) as watch:
            await asyncio.wait_for(read(watch, rest), 20.0)
        assert (rest[0].step, rest[0].text.offset) == (5, 70_000)
        assert sum(event.HasField("tool_call") for event in rest) == 16


async def test_watchers_find_the_next_owner_by_its_announcement(store: Store, nats_server: FaultyNats) -> None:
    """The new owner knows of no interest; it tells of the new dispatch all the same, and the watcher asks it."""
    partition = await store.take(PARTITION)
    _, turn = await store.started(partition, inbound(), 1)
    async with (
        Stalls() as stalls,
        running(nats_server, store, "router-0", "router-1") as (old, new),
        a_hub(nats_server) as hub,
    ):
        old.owns(partition, turn)
        turn.text, turn.text_length = ["of the dead"], 11
        events: list[LiveEvent] = []
        async with hub.watch(Subject(SESSION)) as watch:
            reading = asyncio.create_task(read(watch, events))
            await eventually(lambda: texts(events) == {1: "of the dead"})
            old.lost(partition)
            turn.dispatch, turn.text, turn.text_length = 2, [], 0
            new.owns(partition, turn)
            new.desk.restarted(turn)
            new.desk.state(turn)
            await stalls.within(1.0, lambda: any(event.HasField("restarted") for event in events))
            await stalls.within(1.0, lambda: turn.session.id in new.desk._interest)
            for offset, said in enumerate("living"):
                turn.text.append(said)
                turn.text_length += 1
                new.desk.text(turn, offset, said)
            again = next(n for n, event in enumerate(events) if event.HasField("restarted"))
            await stalls.within(1.0, lambda: texts(events[again:]) == {1: "living"})
            reading.cancel()


async def test_an_owner_that_is_one_no_more_is_not_believed(store: Store, nats_server: FaultyNats) -> None:
    """It answers with what it knew; the watcher has seen a newer dispatch and asks until the present owner answers."""
    partition = await store.take(PARTITION)
    _, turn = await store.started(partition, inbound(), 1)
    async with running(nats_server, store, "router-0", "router-1") as (old, new), a_hub(nats_server) as hub:
        old.owns(partition, turn)
        turn.text, turn.text_length = ["stale"], 5
        events: list[LiveEvent] = []
        async with hub.watch(Subject(SESSION, turn_id=turn.id)) as watch:
            reading = asyncio.create_task(read(watch, events))
            await eventually(lambda: texts(events) == {1: "stale"})
            present = Turn(turn.id, turn.session, turn.number, turn.inputs, turn.revision, turn.deliver, dispatch=2)
            new.desk.restarted(present)
            await eventually(lambda: events[-1].HasField("restarted"))
            await asyncio.sleep(0.5)  # the old one answers meanwhile, as nobody has told it anything
            assert events[-1].HasField("restarted")
            old.lost(partition)
            present.text, present.text_length = ["fresh"], 5
            new.owns(partition, present)
            await eventually(lambda: events[-1].text.text == "fresh", 5.0)
            reading.cancel()
