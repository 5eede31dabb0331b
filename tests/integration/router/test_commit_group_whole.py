"""Message, start and end of a turn in one group: all of it is written, or nothing of the group is."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from soma.common.v1.turn_pb2 import Delivery, StepBody
from soma.router.v1.inbound_pb2 import Inbound

from services.router.application.group import GroupRejected, TurnConflict
from services.router.application.items import InputItem
from services.router.application.outcomes import EndItem, RefusalItem
from services.router.domain.partition import Partition
from services.router.domain.session import Session
from services.router.domain.turn import Outcome
from tests.integration.router.store import Store, end, start, step
from tests.unit.router.builders import a_session, a_turn, inbound, ingest, names_in

HERE, BESIDE = names_in(0, 2)
THERE = names_in(3, 1)[0]
TABLES = ("messages", "sessions", "turns", "steps", "deliveries", "dead_letters", "agent_revisions", "partitions")


@dataclass(slots=True)
class Parts:
    """What a turn that is one commit consists of."""

    message: Any
    start: Any
    end: EndItem

    @property
    def all(self) -> tuple[Any, ...]:
        """The group of this turn alone."""
        return self.message, self.start, self.end


def whole(session: Session, seq: int, item: Inbound, body: bytes = b"answer") -> Parts:
    """The message comes, and its turn is over by the time that it is written."""
    mail = ingest(session.partition, seq, item)
    turn = a_turn(session, mail.entries[0].message)
    return Parts(mail, start(turn), end(turn, body=body))


async def written(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables."""
    return {table: await store.rows(table) for table in TABLES}


# ---- it is written


async def test_a_turn_that_is_one_commit_is_all_there(store: Store) -> None:
    p = await store.take(0)
    session = a_session(p, HERE)
    parts = whole(session, 7, inbound(HERE))
    result = await store.commit(*parts.all)
    turn = parts.end.turn
    assert result.inserted == {(0, 1)}
    assert result.started == {turn.id}
    assert await store.rows("messages", "partition, position, message_id") == [(0, 1, inbound(HERE).message_id)]
    assert await store.rows("turns", "turn_id, number, first_position, last_position, status, outcome, step_count") == [
        (turn.id, 1, 1, 1, 3, Outcome.FINAL, 1)
    ]
    assert await store.history.journal("demo", turn.id) == [(3, b"answer")]
    assert await store.rows(
        "sessions", "session_id, done_position, turn_count, delivery_count, message_count, last_position"
    ) == [(session.id, 1, 1, 1, 1, 1)]
    [(position, payload)] = await store.rows("deliveries", "position, payload")
    delivery = Delivery.FromString(payload)
    assert (position, delivery.turn_id, delivery.position) == (1, turn.id, 1)
    assert list(delivery.message_ids) == [inbound(HERE).message_id]
    assert await store.partition_row(0) == (1, 1, "2026-01-01 00:00:00", 7, "batch-7")
    assert await store.load(p) == [], "nothing waits for a new owner"


async def test_a_session_goes_on_after_a_turn_that_was_one_commit(store: Store) -> None:
    p = await store.take(0)
    session = a_session(p, HERE)
    for number in range(1, 4):
        parts = whole(session, number, inbound(HERE, f"k{number}"))
        await store.commit(*parts.all)
        session.turn_count = number
    assert await store.rows("turns", "number, status") == [(1, 3), (2, 3), (3, 3)]
    assert await store.rows("sessions", "done_position, turn_count, delivery_count") == [(3, 3, 3)]
    assert await store.rows("deliveries", "partition, position") == [(0, 1), (0, 2), (0, 3)]


async def test_many_turns_in_one_group_beside_others_that_only_begin_or_only_end(store: Store) -> None:
    p, three = await store.take(0), await store.take(3)
    _, running = await store.started(p, inbound("running"), 1)
    one, two = whole(a_session(p, HERE), 2, inbound(HERE)), whole(a_session(three, THERE), 2, inbound(THERE))
    begins = whole(a_session(p, BESIDE), 3, inbound(BESIDE))
    result = await store.commit(*one.all, *two.all, begins.message, begins.start, end(running, body=b"late"))
    assert result.started == {one.end.turn.id, two.end.turn.id, begins.end.turn.id}
    statuses = {row[0]: row[1] for row in await store.rows("turns", "turn_id, status")}
    over = [one.end.turn.id, two.end.turn.id, running.id]
    assert [statuses[turn] for turn in over] == [3, 3, 3]
    assert statuses[begins.end.turn.id] == 1
    assert len(await store.rows("deliveries")) == 3


# ---- its start is none


async def _answered(store: Store, p: Partition, session: Session) -> Inbound:
    """The turn has ended, with steps."""
    parts = whole(session, 1, inbound(HERE))
    await store.commit(*parts.all)
    session.turn_count = 1
    return inbound(HERE)


async def _answered_with_more_steps(store: Store, p: Partition, session: Session) -> Inbound:
    parts = whole(session, 1, inbound(HERE))
    await store.commit(parts.message, parts.start)
    await store.commit(step(parts.end.turn, body=b"first"))
    parts.end.turn.journal.append(b"first")
    await store.commit(parts.end)
    session.turn_count = 1
    return inbound(HERE)


async def _cancelled(store: Store, p: Partition, session: Session) -> Inbound:
    """The turn has ended before it ran: it has no steps."""
    parts = whole(session, 1, inbound(HERE))
    skipped = EndItem(p, parts.end.turn, Outcome.CANCELLED, [], Delivery(), lambda _: None)
    await store.commit(parts.message, parts.start, skipped)
    session.turn_count = 1
    return inbound(HERE)


async def _joined(store: Store, p: Partition, session: Session) -> Inbound:
    """The message was a second input of another turn: its own never was."""
    first = ingest(p, 1, inbound(HERE, "first"), inbound(HERE))
    turn = a_turn(session, first.entries[0].message)
    await store.commit(first, start(turn))
    second = first.entries[1].message
    turn.inputs.append(second)
    await store.commit(InputItem(p, turn, second.position, lambda _: None))
    await store.commit(end(turn, body=b"to both"))
    session.turn_count = 1
    return inbound(HERE)


async def _refused(store: Store, p: Partition, session: Session) -> Inbound:
    """The message was refused: its turn has a step, and no number."""
    mail = ingest(p, 1, inbound(HERE))
    await store.commit(mail)
    turn = a_turn(session, mail.entries[0].message)
    body = StepBody(format=1).SerializeToString()
    await store.commit(RefusalItem(p, turn, body, Delivery(), lambda _: None))
    p.pending.discard(mail.entries[0].message.position)
    return inbound(HERE)


async def _key_reused(store: Store, p: Partition, session: Session) -> Inbound:
    await _answered(store, p, session)
    return inbound(HERE, content=b"something else")


async def _key_reused_without_steps(store: Store, p: Partition, session: Session) -> Inbound:
    await _cancelled(store, p, session)
    return inbound(HERE, content=b"something else")


Past = Callable[[Store, Partition, Session], Coroutine[Any, Any, Inbound]]
PASTS: dict[str, Past] = {
    "answered": _answered,
    "answered with more steps": _answered_with_more_steps,
    "cancelled before it ran": _cancelled,
    "an input of another turn": _joined,
    "refused": _refused,
    "key reused": _key_reused,
    "key reused, no steps": _key_reused_without_steps,
}


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("other", ["of the same partition", "of another"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
async def test_a_group_with_an_end_without_its_start_is_not_written(
    store: Store, past: str, other: str, first: bool
) -> None:
    p, three = await store.take(0), await store.take(3)
    session = a_session(p, HERE)
    again = await PASTS[past](store, p, session)
    in_vain = whole(session, 5, again, b"again")
    partition, name = (p, BESIDE) if other == "of the same partition" else (three, THERE)
    new = whole(a_session(partition, name), 6 if first else 4, inbound(name))
    group = [*in_vain.all, *new.all] if first else [*new.all, *in_vain.all]
    before = await written(store)
    with pytest.raises((TurnConflict, GroupRejected)):
        await store.commit(*group)
    assert await written(store) == before, "nothing of it, of whatever session"

    result = await store.commit(*(item for item in group if item is not in_vain.end))
    assert result.started == {new.end.turn.id}
    after = await written(store)
    reused = past.startswith("key reused")
    assert len(after["messages"]) == len(before["messages"]) + 1 + reused
    assert len(after["turns"]) == len(before["turns"]) + 1
    assert len(after["steps"]) == len(before["steps"]) + 1
    assert len(after["deliveries"]) == len(before["deliveries"]) + 1
    assert await store.history.journal("demo", new.end.turn.id) == [(3, b"answer")]
    place = (0, in_vain.message.entries[0].message.position)
    assert (place in result.inserted, place in result.reused) == (reused, reused)
    old = {tuple(row) for row in before["turns"]}
    assert old <= set(after["turns"]), "what was there is as it was"


async def test_the_conflict_names_the_partition_of_the_end_that_has_no_start(store: Store) -> None:
    p, three = await store.take(0), await store.take(3)
    session = a_session(p, HERE)
    again = await _cancelled(store, p, session)
    skipped = whole(session, 5, again)
    skipped.end.steps.clear()
    new = whole(a_session(three, THERE), 5, inbound(THERE))
    with pytest.raises(TurnConflict) as conflict:
        await store.commit(*new.all, *skipped.all)
    assert conflict.value.partitions == {0}


async def test_a_message_and_its_retry_in_one_group_are_one_turn(store: Store) -> None:
    """The first of them starts; the end is its."""
    p = await store.take(0)
    session = a_session(p, HERE)
    parts = whole(session, 1, inbound(HERE))
    retry = ingest(p, 2, inbound(HERE))
    result = await store.commit(parts.message, retry, parts.start, parts.end)
    assert result.inserted == {(0, 1)}
    assert result.started == {parts.end.turn.id}
    assert await store.rows("turns", "status, outcome") == [(3, Outcome.FINAL)]


async def test_an_end_whose_message_is_in_no_group_is_refused(store: Store) -> None:
    """A start that says it is fresh, written apart from its message, is none; neither is its end."""
    p = await store.take(0)
    parts = whole(a_session(p, HERE), 1, inbound(HERE))
    await store.commit(parts.message)
    before = await written(store)
    with pytest.raises(TurnConflict):
        await store.commit(parts.start, parts.end)
    assert await written(store) == before
    assert (await store.commit(parts.start)).started == frozenset()
    with pytest.raises(TurnConflict):
        await store.commit(parts.end)
    assert await store.rows("turns") == []
    assert await store.rows("steps") == []
