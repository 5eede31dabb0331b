"""Controls that wait, for a message that they cancel or behind one that does: counted, few in memory, done with in
order, on the engine in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from soma.cognition.v1.cognition_service_pb2 import StartTurn
from soma.router.v1.inbound_pb2 import Inbound, InboundKind

from services.router.application import control_sessions
from services.router.application.group import Group
from services.router.domain.session import Session
from services.router.domain.turn import Outcome
from soma_common import ids
from tests.unit.router.builders import TENANT, cancel
from tests.unit.router.engine import Engine, running_engine
from tests.unit.router.test_policies import control, keys, message
from tests.unit.router.test_policy_machine import ID, PARTITION, DurableStore, Owner

MANY = 1200
"""More than a session may have waiting."""


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        yield engine


def turn_of(item: Inbound) -> bytes:
    return ids.turn_id(item.session_id, item.message_id)


async def running(engine: Engine, *keys: str) -> tuple[StartTurn, Session, list[Inbound]]:
    """A turn that runs, its session, and messages that wait behind it."""
    engine.accept(message("first"))
    [start] = await engine.started(1)
    waiting = [message(key) for key in keys]
    engine.accept(*waiting)
    await engine.quiet()
    return start, engine.state.running[start.turn_id].session, waiting


async def test_cancels_of_one_message_are_counted_and_take_no_memory(engine: Engine) -> None:
    start, session, [waits] = await running(engine, "a")
    for n in range(0, MANY, 100):
        engine.accept(*(cancel("s", f"c{n + i}", turn_of(waits)) for i in range(100)))
    await engine.quiet()
    mail = engine.state.mailbox.tenant(TENANT)
    assert len(session.controls) == 1
    assert len(session.partition.pending) == 3, "two messages and the cancel that waits"
    assert (mail.waiting, set(mail.full)) == (MANY + 1, {session.id})
    engine.answer(start, "done")
    [_, (outcome, delivery)] = await engine.outcomes(2)
    assert (outcome, list(delivery.message_ids)) == (Outcome.CANCELLED, keys("a"))
    await engine.quiet()
    assert not session.controls
    assert not session.partition.pending
    assert session.idle
    assert (engine.state.mailbox.waiting, session.waiting_controls) == (0, 0)


async def test_a_session_full_of_messages_can_be_cancelled(engine: Engine) -> None:
    bound = engine.state.mailbox.session_bound
    _, session, _ = await running(engine, *(str(n) for n in range(bound)))
    assert session.id in engine.state.mailbox.tenant(TENANT).full
    engine.accept(control(InboundKind.INBOUND_KIND_CANCEL_ALL))
    ended = await engine.outcomes(bound + 1)
    assert {outcome for outcome, _ in ended} == {Outcome.CANCELLED}
    await engine.quiet()
    assert session.idle
    assert engine.state.mailbox.waiting == 0


async def test_nothing_is_stored_as_done_with_before_what_came_before_it(engine: Engine) -> None:
    """Of two messages the second is cancelled first; all sorts of controls come behind."""
    start, session, [a, b] = await running(engine, "a", "b")
    behind = (InboundKind.INBOUND_KIND_PAUSE, InboundKind.INBOUND_KIND_RESUME, InboundKind.INBOUND_KIND_CANCEL)
    engine.accept(
        cancel("s", "of b", turn_of(b)),
        cancel("s", "of a", turn_of(a)),
        cancel("s", "of b again", turn_of(b)),
        cancel("s", "of a again", turn_of(a)),
        *(control(kind, f"behind {kind}", b"\0" * 16) for kind in behind),
    )
    await engine.quiet()
    assert [(each.position, each.last_position, each.count) for each in session.controls] == [(4, 0, 1), (5, 10, 6)]
    assert sorted(session.partition.pending) == [1, 2, 3, 4, 5]
    stored: list[tuple[int, int]] = []

    def watch(group: Group) -> None:
        stored.extend((len(group.ends), row[1]) for row in group.controls)

    engine.store.refuse = watch
    engine.answer(start, "done")
    ended = await engine.outcomes(3)
    assert [list(delivery.message_ids) for _, delivery in ended[1:]] == [keys("a"), keys("b")]
    await engine.quiet()
    assert stored == [(1, 10)], "with the end of the second message"
    assert not session.partition.pending


async def test_what_waits_is_asked_once_for_its_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, waiting = await running(engine, *(str(n) for n in range(50)))
    asked: list[bytes] = []

    def turn_id(session: bytes, message_id: bytes) -> bytes:
        asked.append(message_id)
        return ids.turn_id(session, message_id)

    monkeypatch.setattr(control_sessions, "ids", SimpleNamespace(turn_id=turn_id))
    engine.accept(*(cancel("s", f"c{n}", turn_of(waiting[-1])) for n in range(100)))
    engine.accept(*(cancel("s", f"of nothing {n}", b"%16d" % n) for n in range(100)))
    await engine.quiet()
    assert sorted(asked) == sorted(item.message_id for item in waiting)


async def test_what_waits_leaves_the_count_with_its_partition(engine: Engine) -> None:
    _, session, [a] = await running(engine, "a")
    engine.accept(*(cancel("s", f"c{n}", turn_of(a)) for n in range(5)))
    await engine.quiet()
    assert engine.state.mailbox.waiting == 6
    engine.end_fenced(frozenset({session.partition.id}))
    assert engine.state.mailbox.waiting == 0
    assert dict(engine.state.mailbox) == {}


async def test_a_new_owner_holds_as_little_of_them_and_is_done_with_all() -> None:
    store = DurableStore()
    first = Owner(store)
    first.accept(message("first"))
    await first.started(1)
    waits = message("a")
    first.accept(waits, *(cancel("s", f"c{n}", turn_of(waits)) for n in range(100)))
    await first.quiet()
    await first.stop()
    assert len(store.load()) == 102
    owner = Owner(store)
    try:
        [start] = await owner.started(1)
        session = owner.state.partitions[PARTITION].sessions[ID]
        assert len(session.controls) == 1
        assert len(session.partition.pending) == 3
        assert owner.state.mailbox.waiting == 101
        owner.answer(start, "done")
        await owner.outcomes(2)
        await owner.quiet()
        assert store.load() == []
        assert owner.state.mailbox.waiting == 0
    finally:
        await owner.stop()
        await asyncio.sleep(0)
