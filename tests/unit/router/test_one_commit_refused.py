"""Turns that were to begin and end in one transaction, and whose group is not written as it is: their partition is
somebody else's, the store is lost, the database refuses the group, or something in it is to stop them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from soma.common.v1.message_pb2 import Message, Part
from soma.router.v1.inbound_pb2 import InboundKind

from services.router.application.group import FenceLost, Group, GroupRejected, StoreLost
from services.router.domain.turn import Outcome, StepKind
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import a_partition, inbound
from tests.unit.router.engine import Engine, running_engine
from tests.unit.router.test_one_commit import BESIDE, Door, answers, given, names, rows_of, waits, whole
from tests.unit.router.test_start_ahead import (
    HERE,
    THERE,
    answered,
    at_rest,
    forget,
    nothing_counts,
    rounds,
    speak,
    turn_of,
    warm,
)
from tests.unit.router.test_start_ahead_none import nothing_counts_but_the_state
from tests.unit.router.test_start_ahead_stops import STOPPERS


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        await warm(engine, HERE, THERE, BESIDE)
        yield engine


@pytest.fixture
async def door(engine: Engine) -> Door:
    """A group is being written, and nobody has said `k` before."""
    door = Door(engine)
    await door.is_busy()
    return door


# ---- a term that ends


@pytest.mark.parametrize("sent", [False, True], ids=["gathered", "sent"])
async def test_what_a_lost_partition_had_in_hand_is_nothing(engine: Engine, door: Door, sent: bool) -> None:
    starts = {start.session.session: start for start in await given(engine, inbound(HERE), inbound(THERE))}
    for session, start in starts.items():
        speak(engine, start, "so")
        engine.answer(start, session)
    gone, turn = starts[HERE], starts[THERE].turn_id
    if sent:
        fences = [FenceLost(frozenset({0}))]
        engine.store.refuse = lambda group: fences.pop() if group.ends and fences else None
    else:
        engine.end_fenced(frozenset({0}))
        assert engine.brain.stops == [(gone.turn_id, 1)]
    door.opens()
    await engine.outcomes(1)
    await at_rest(engine)
    assert answers(engine) == [(Outcome.FINAL, THERE)]
    assert engine.brain.stops == [(gone.turn_id, 1)]
    assert (names(engine, gone.turn_id), names(engine, turn)) == ([], ["state", "text", "ended"])
    assert gone.turn_id not in engine.store.turns
    assert rows_of(door.written[-1]) == whole(THERE)


async def test_a_partition_lost_while_its_turns_are_written_shows_none(engine: Engine, door: Door) -> None:
    """The group arrives all the same: what is in it is for the next owner."""
    [start] = await given(engine)
    speak(engine, start, "so")
    engine.answer(start, "hello")
    door.lets_one_in()
    await eventually(lambda: len(door.sent) == 2, what="its group at the door")
    engine.end_fenced(frozenset({0}))
    door.opens()
    await at_rest(engine)
    assert rows_of(door.written[-1]) == whole(HERE)
    assert set(engine.brain.stops) == {(start.turn_id, 1)}
    assert (engine.brain.confirms, engine.live.events, engine.ended) == ([], [], [])


@pytest.mark.parametrize("which", ["the group before", "its own"])
async def test_a_store_that_is_lost_takes_all_that_was_given(engine: Engine, door: Door, which: str) -> None:
    """The same router has the partition again: the turn starts under the next number, and not before it is durable."""
    [start] = await given(engine)
    engine.answer(start, "from before")
    its_own = which == "its own"
    engine.store.refuse = lambda group: StoreLost("gone") if bool(group.ends) == its_own else None
    door.opens()
    await eventually(lambda: not engine.state.partitions, what="end of its terms")
    await rounds()
    nothing_counts(engine)
    assert engine.brain.stops == [(start.turn_id, 1)]
    assert engine.brain.credit == 100
    engine.store.refuse = lambda _: None
    for number in (0, 7):
        partition = engine.state.partitions[number] = a_partition(number)
        partition.attached = True
    await answered(engine, inbound(HERE, "another"))
    forget(engine)
    door.shut()
    await door.is_busy()
    await waits(engine, inbound(HERE))
    door.opens()
    [again] = await engine.started(1)
    assert (again.turn_id, again.dispatch) == (start.turn_id, 2)
    assert engine.state.running[again.turn_id].strikes == 0
    engine.answer(start, "late")
    engine.answer(again, "ok")
    await engine.outcomes(1)
    assert answers(engine) == [(Outcome.FINAL, "ok")]
    await at_rest(engine)


async def test_an_end_that_is_wrong_for_itself_takes_no_other_with_it(engine: Engine, door: Door) -> None:
    """A turn that somebody else has ended, beside one that begins and ends: the first one's partition is lost."""
    engine.accept(inbound(THERE))
    door.opens()
    [running] = await engine.started(1)
    await eventually(lambda: running.turn_id in engine.state.running, what="start")
    door.shut()
    await door.is_busy()
    [start] = await given(engine, inbound(HERE))
    engine.answer(start, "ok")
    engine.answer(running, "too late")
    engine.store.turns[running.turn_id] = "ended"
    door.opens()
    await engine.outcomes(1)
    await at_rest(engine)
    assert answers(engine) == [(Outcome.FINAL, "ok")]
    assert (1 in engine.state.partitions, 0 in engine.state.partitions) == (False, True)


# ---- a group that is refused


async def test_a_message_that_the_database_refuses_takes_no_other_with_it(engine: Engine, door: Door) -> None:
    bad = inbound(HERE)
    items = {item.session: item for item in (inbound(THERE), bad, inbound(BESIDE))}

    def refuse(group: Group) -> BaseException | None:
        return GroupRejected("no") if bad.message_id in rows_of(group)["messages"] else None

    engine.store.refuse = refuse
    starts = {start.session.session: start for start in await given(engine, *items.values())}
    for session, start in starts.items():
        engine.answer(start, session)
    door.opens()
    await eventually(lambda: any(group.dead for group in door.written), what="the dead letter")
    for _ in range(10):
        await rounds()
        for again in [s for s in engine.brain.starts if s.dispatch > 1]:
            engine.answer(again, again.session.session)
    await engine.outcomes(2)
    await at_rest(engine)
    assert sorted(answers(engine)) == sorted([(Outcome.FINAL, THERE), (Outcome.FINAL, BESIDE)])
    assert (starts[HERE].turn_id, 1) in engine.brain.stops
    assert [row[3] for group in door.written for row in group.dead] == [bad.message_id]
    assert starts[HERE].turn_id not in engine.store.turns
    assert engine.state.partitions.keys() == set(range(8))
    ended = [turn for group in door.written for turn in rows_of(group)["ends"]]
    assert sorted(ended) == sorted([starts[THERE].turn_id, starts[BESIDE].turn_id])


async def test_a_start_written_apart_from_its_message_drops_its_end(engine: Engine, door: Door) -> None:
    """It is started again under the next number: two runs must never have one."""
    engine.store.refuse = lambda group: GroupRejected("not together") if group.turns and group.messages else None
    [start] = await given(engine)
    speak(engine, start, "Hel")
    engine.answer(start, "from before")
    door.opens()
    _, again = await engine.started(2)
    assert (again.turn_id, again.dispatch) == (start.turn_id, 2)
    assert engine.brain.stops == [(start.turn_id, 1)]
    engine.answer(start, "still from before")
    await rounds()
    nothing_counts_but_the_state(engine)
    engine.answer(again, "ok")
    await engine.outcomes(1)
    assert answers(engine) == [(Outcome.FINAL, "ok")]
    await at_rest(engine)


async def test_a_group_refused_for_its_end_alone_keeps_the_others(engine: Engine, door: Door) -> None:
    """The end cannot be stored at all: the others are not answered twice, nor lost."""
    bad = turn_of(HERE, "k")
    engine.store.refuse = lambda group: GroupRejected("no") if bad in rows_of(group)["ends"] else None
    starts = {start.session.session: start for start in await given(engine, inbound(HERE), inbound(THERE))}
    for session, start in starts.items():
        engine.answer(start, session)
    door.opens()
    await engine.outcomes(1)
    await at_rest(engine)
    assert answers(engine) == [(Outcome.FINAL, THERE)]
    assert engine.state.partitions.keys() == set(range(1, 8)), "its memory is wrong: the next owner goes on"
    assert engine.store.turns[bad] == "running"
    assert (bad, 1) in engine.brain.stops


# ---- what stops a turn


@pytest.mark.parametrize("says", [True, False], ids=["with its end", "without"])
@pytest.mark.parametrize("together", [True, False], ids=["one batch", "two"])
@pytest.mark.parametrize("stopper", STOPPERS)
async def test_what_stops_a_turn_in_its_own_group_leaves_each_message_one_outcome(
    engine: Engine, door: Door, stopper: str, together: bool, says: bool
) -> None:
    batch = [inbound(HERE), STOPPERS[stopper]()]
    engine.accept(*(batch if together else batch[:1]))
    [start] = await engine.started(1)
    if says:
        engine.answer(start, "hello")
    if not together:
        engine.accept(batch[1])
    await rounds()
    assert engine.brain.starts == [start], "what comes behind it waits"
    nothing_counts(engine)
    door.opens()
    for _ in range(5):
        await rounds()
        for turn in list(engine.state.running.values()):
            given_last = next((s for s in reversed(engine.brain.starts) if s.turn_id == turn.id), None)
            if given_last is not None and turn.link is not None and not turn.in_flight:
                answer = Message(parts=[Part(text="ok")])
                engine.propose(given_last, StepKind.FINAL, 1, answer=answer, inputs_seen=len(turn.inputs))
    await at_rest(engine)
    answered_ids = [message for item in engine.ended for message in item.answer.message_ids]
    mine, other = batch[0].message_id, batch[1].message_id
    is_message = batch[1].kind == InboundKind.INBOUND_KIND_MESSAGE
    assert sorted(answered_ids) == sorted([mine, other] if is_message else [mine])
    if says:
        first = next(item for item in engine.ended if mine in item.answer.message_ids)
        assert (Outcome(first.answer.outcome), first.turn.id) == (Outcome.FINAL, start.turn_id)
    ended = [turn for group in door.written for turn in rows_of(group)["ends"]]
    assert len(ended) == len(set(ended))
    for name, turn, *_ in engine.live.events:
        assert turn in engine.store.turns, name
