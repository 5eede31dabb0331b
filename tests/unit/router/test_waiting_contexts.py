"""What was said before in sessions with waiting messages: bounded over all, shared out to tenants, counted once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.router.application.state import CONTENT_SHARES, WAITING_CONTEXT_BYTES, RouterState
from services.router.domain.session import (
    CONTEXT_BYTES,
    SAID_BYTES,
    QueuedMessage,
    Session,
    SessionKey,
    WaitingContexts,
)
from soma_common import ids
from soma_common.layout import LaneLayout
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import AGENT, CHANNEL, a_partition, inbound
from tests.unit.router.engine import Engine, running_engine
from tests.unit.router.test_policies import message

BOUND = 4000
SHARES = 4


def a_message() -> QueuedMessage:
    return QueuedMessage(1, b"m" * 16, True, 0, "", b"content")


class World:
    """A router's state, with two partitions and any sessions."""

    def __init__(self) -> None:
        self.state = RouterState(LaneLayout(8, 1), cast(Any, None), 100, 100)
        self.partitions = [a_partition(0), a_partition(1)]
        self.state.partitions = {partition.id: partition for partition in self.partitions}

    def session(self, name: str, tenant: str = "demo", partition: int = 0, turns: int = 1) -> Session:
        """One that has had a turn, of which nothing is in memory."""
        key = SessionKey(tenant, AGENT, CHANNEL, name)
        id_ = ids.session_id(tenant, AGENT, CHANNEL, name)
        return self.state.add_session(self.partitions[partition], id_, key, turns, 0)


def test_all_contexts_of_waiting_sessions_have_a_bound_and_are_given_back() -> None:
    world = World()
    sessions = [world.session(f"s{n}") for n in range(3 * WAITING_CONTEXT_BYTES // CONTEXT_BYTES)]
    for session in sessions:
        session.recall([b"x" * (CONTEXT_BYTES - SAID_BYTES)])
        assert session.context is not None, "as long as nothing waits it is an idle session's"
        world.state.enqueue(session, a_message())
    kept = [session for session in sessions if session.context is not None]
    assert len(kept) == WAITING_CONTEXT_BYTES // CONTEXT_BYTES
    assert sum(session.context_bytes for session in sessions) <= WAITING_CONTEXT_BYTES
    for session in sessions:
        world.state.dequeue(session)
    assert all(session.context is not None for session in kept), "for the turn that starts"
    assert world.state.contexts.held == world.state.contexts.of_tenant("demo") == 0


def test_a_tenant_with_little_of_it_keeps_its_own_beside_a_flood() -> None:
    world = World()
    for n in range(2 * WAITING_CONTEXT_BYTES // CONTEXT_BYTES):
        session = world.session(f"s{n}", "flood")
        session.recall([b"x" * (CONTEXT_BYTES - SAID_BYTES)])
        world.state.enqueue(session, a_message())
    quiet = [world.session(f"s{n}", "quiet") for n in range(8)]
    for session in quiet:
        session.recall([b"x" * (CONTEXT_BYTES - SAID_BYTES)])
        world.state.enqueue(session, a_message())
    share = WAITING_CONTEXT_BYTES // CONTENT_SHARES // CONTEXT_BYTES
    assert [session.context is not None for session in quiet] == [n < share for n in range(8)]


def test_many_short_messages_count_for_what_they_take() -> None:
    world = World()
    contexts = world.state.contexts = WaitingContexts(100 * SAID_BYTES, 1)
    short, long = (world.session(name) for name in ("short", "long"))
    world.state.enqueue(short, a_message())
    short.recall([b"x"] * 99)
    assert short.context is None
    world.state.enqueue(long, a_message())
    long.recall([b"x" * 99])
    assert (contexts.held, long.context_bytes) == (99 + SAID_BYTES, 99)


def test_what_is_forgotten_is_given_back_while_messages_wait() -> None:
    world = World()
    session = world.session("s")
    world.state.enqueue(session, a_message())
    session.recall([b"one", b"two"])
    assert world.state.contexts.held == 6 + 2 * SAID_BYTES
    session.forget_context()
    assert (world.state.contexts.held, session.context_bytes) == (0, 0)


def test_a_context_that_comes_after_its_partition_is_lost_is_not_counted() -> None:
    world = World()
    session = world.session("s")
    world.state.enqueue(session, a_message())
    session.recall([b"one"])
    world.state.forget_partition(world.partitions[0])
    assert world.state.contexts.held == 0
    session.recall([b"one"])
    assert world.state.contexts.held == 0


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        yield engine


@pytest.mark.parametrize("room", [True, False])
async def test_a_turn_of_a_session_that_waited_knows_what_was_said_before(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """From memory, or from the store where there was no room."""
    reads: list[bytes] = []

    async def context(tenant: str, session_id: bytes, limit: int) -> list[bytes]:
        reads.append(session_id)
        return [b"read"]

    monkeypatch.setattr(engine, "context", context)
    if not room:
        engine.state.contexts = WaitingContexts(SAID_BYTES, 1)
    engine.accept(message("1"), message("2"))
    [first] = await engine.started(1)
    engine.answer(first, "one")
    [_, second] = await engine.started(2)
    if room:
        assert not reads
        assert second.context[0] == message("1").content
    else:
        assert reads == [inbound().session_id]
        assert list(second.context) == [b"read"]
    await eventually(lambda: len(engine.ended) == 1, what="the first end")
    assert engine.state.contexts.held == 0, "nothing waits any more"


async def test_contexts_of_a_flood_of_two_messages_a_session_stay_below_the_bound(engine: Engine) -> None:
    """All sessions end their first turn and wait for the second."""
    bound, sessions, size = 200_000, 40, 20_000
    contexts = engine.state.contexts = WaitingContexts(bound, 64)
    engine.brain.credit = 10
    names = [f"s{n}" for n in range(sessions)]
    for key in ("1", "2"):
        engine.accept(*(inbound(name, key, b"x" * size) for name in names))
    for n in range(sessions):
        start = (await engine.started(n + 1))[n]
        engine.answer(start, "done")
        await engine.outcomes(n + 1)
        held = [s for p in engine.state.partitions.values() for s in p.sessions.values() if s.queue]
        assert sum(session.context_bytes for session in held) <= contexts.held <= bound
    for n in range(sessions, 2 * sessions):
        engine.answer((await engine.started(n + 1))[n], "done")
    await engine.outcomes(2 * sessions)
    assert contexts.held == 0


class AnyOrder(RuleBasedStateMachine):
    """Messages come and go, things are said, read and forgotten, partitions lost: what is held is what is counted."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.contexts = self.world.state.contexts = WaitingContexts(BOUND, SHARES)
        self.sessions = [
            self.world.session(f"s{n}", tenant, partition, turns)
            for partition in (0, 1)
            for tenant in ("a", "b")
            for n, turns in enumerate((0, 1))
        ]

    @rule(number=st.integers(0, 7), count=st.integers(1, 2))
    def comes(self, number: int, count: int) -> None:
        session = self.sessions[number]
        if not session.partition.lost:
            for _ in range(count):
                self.world.state.enqueue(session, a_message())

    @precondition(lambda self: any(s.queue and not s.partition.lost for s in self.sessions))
    @rule(data=st.data(), back=st.booleans())
    def is_taken(self, data: st.DataObject, back: bool) -> None:
        session = data.draw(st.sampled_from([s for s in self.sessions if s.queue and not s.partition.lost]))
        taken = self.world.state.dequeue(session)
        if back:
            self.world.state.requeue(session, taken)

    @rule(number=st.integers(0, 7), sizes=st.lists(st.integers(0, 1500), max_size=3), keep=st.integers(0, 5))
    def is_said(self, number: int, sizes: list[int], keep: int) -> None:
        session = self.sessions[number]
        session.turn_count += 1
        session.remember([b"x" * size for size in sizes], keep)

    @rule(number=st.integers(0, 7), sizes=st.lists(st.integers(0, 1500), max_size=3))
    def is_read(self, number: int, sizes: list[int]) -> None:
        self.sessions[number].recall([b"x" * size for size in sizes])

    @rule(number=st.integers(0, 7))
    def is_forgotten(self, number: int) -> None:
        self.sessions[number].forget_context()

    @rule(number=st.integers(0, 1))
    def partition_is_lost(self, number: int) -> None:
        partition = self.world.partitions[number]
        if not partition.lost:
            self.world.state.forget_partition(partition)

    @invariant()
    def what_is_counted_is_what_is_held(self) -> None:
        held = {"a": 0, "b": 0}
        for session in self.sessions:
            said = session.context
            assert session.context_bytes == sum(map(len, said or ()))
            if said is not None and session.queue and not session.partition.lost:
                held[session.key.tenant] += session.context_bytes + len(said) * SAID_BYTES
        assert self.contexts.held == sum(held.values())
        assert {tenant: self.contexts.of_tenant(tenant) for tenant in held} == held
        assert sum(held.values()) <= BOUND + sum(min(size, BOUND // SHARES) for size in held.values())


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
