"""Turns that begin and end in one transaction: their brains get them while another group is being written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
from soma.cognition.v1.cognition_service_pb2 import Proposal, StartTurn, StopTurn
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error, Message
from soma.common.v1.turn_pb2 import ModelReply, StepBody
from soma.router.v1.inbound_pb2 import Inbound

from services.router.application.group import Group, GroupResult
from services.router.application.items import CursorItem
from services.router.domain.partition import Cursor
from services.router.domain.turn import Outcome, StepKind
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import inbound, names_in
from tests.unit.router.engine import Brain, Engine, running_engine
from tests.unit.router.test_start_ahead import HERE, THERE, at_rest, nothing_counts, rounds, speak, turn_of, warm

BESIDE = names_in(0, 2)[1]
"""A session of the same partition as `HERE`."""
NEIGHBOUR = 7
"""A partition in which nobody speaks."""


class Door:
    """The store's: groups wait at it. `sent` are those that have come to it, `written` those that were taken."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sent: list[Group] = []
        self.written: list[Group] = []
        self._commit = engine.store.commit
        engine.store.commit = self._pass  # type: ignore[method-assign]
        self.shut()

    async def _pass(self, group: Group) -> GroupResult:
        self.sent.append(group)
        result = await self._commit(group)
        self.written.append(group)
        return result

    def shut(self) -> None:
        """Groups wait from now on."""
        self.engine.store.gate = asyncio.Event()

    def lets_one_in(self) -> None:
        """The group that waits goes on, the next one waits."""
        gate = self.engine.store.gate
        assert gate is not None
        self.shut()
        gate.set()

    def opens(self) -> None:
        """No group waits any more."""
        gate, self.engine.store.gate = self.engine.store.gate, None
        assert gate is not None
        gate.set()

    def has_seen(self, count: int) -> bool:
        """Whether so many groups have come."""
        return len(self.sent) >= count

    async def is_busy(self) -> None:
        """A group is held at the door that has nothing to do with anybody's session."""
        partition, count = self.engine.state.partitions[NEIGHBOUR], len(self.sent)
        self.engine.committer.put(CursorItem(partition, Cursor("stream", partition.cursor.seq + 1, "b")))
        await eventually(lambda: len(self.sent) > count, what="a group at the door")


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        await warm(engine, HERE, THERE, BESIDE)
        yield engine


@pytest.fixture
async def door(engine: Engine) -> Door:
    """A group is being written, and takes its time."""
    door = Door(engine)
    await door.is_busy()
    return door


async def given(engine: Engine, *items: Inbound) -> list[StartTurn]:
    """These messages come, each of a session of its own, and get to the brain while nothing is written."""
    sent, before = engine.store.groups, len(engine.brain.starts)
    engine.accept(*(items or [inbound(HERE)]))
    starts = (await engine.started(before + len(items or [HERE])))[before:]
    assert engine.store.groups == sent
    return starts


async def waits(engine: Engine, *items: Inbound) -> None:
    """These messages come and get to no brain while the group before theirs is written."""
    before = len(engine.brain.starts)
    engine.accept(*items)
    await rounds()
    assert len(engine.brain.starts) == before


def rows_of(group: Group) -> dict[str, list[bytes]]:
    """Which messages a group holds, and of which turns starts, ends and steps."""
    return {
        "messages": [row[3] for row in group.messages],
        "turns": [row[0] for row in group.turns],
        "ends": [row[0] for row in group.ends],
        "steps": [row[0] for row in group.steps],
    }


def whole(*sessions: str) -> dict[str, list[bytes]]:
    """The rows of turns that are one commit."""
    turns = [turn_of(session, "k") for session in sessions]
    messages = [inbound(session).message_id for session in sessions]
    return {"messages": messages, "turns": turns, "ends": turns, "steps": turns}


def names(engine: Engine, turn: bytes) -> list[str]:
    """What watchers were told of a turn."""
    return [event[0] for event in engine.live.events if event[1] == turn]


def answers(engine: Engine) -> list[tuple[Outcome, str]]:
    return [(Outcome(item.answer.outcome), _text(item.answer.message)) for item in engine.ended]


def _text(message: Message) -> str:
    return "".join(part.text for part in message.parts)


# ---- one commit


async def test_a_brain_gets_a_message_before_its_group_is_sent(engine: Engine, door: Door) -> None:
    [start] = await given(engine, inbound(HERE, content=b"hi"))
    assert (start.turn_id, start.dispatch) == (turn_of(HERE, "k"), 1)
    assert (list(start.inputs), start.context[0]) == ([b"hi"], b"hi")
    assert len(door.sent) == 1
    assert door.written == []


async def test_message_start_and_end_are_one_group(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    engine.answer(start, "hello")
    door.opens()
    await engine.outcomes(1)
    await at_rest(engine)
    assert [rows_of(group) for group in door.written[1:]] == [whole(HERE)]
    assert len(door.written[1].deliveries) == 1
    assert answers(engine) == [(Outcome.FINAL, "hello")]
    assert engine.brain.starts == [start]
    assert (engine.brain.confirms, engine.brain.stops) == ([(start.turn_id, 1, 1)], [])


async def test_turns_of_many_sessions_are_one_group(engine: Engine, door: Door) -> None:
    sessions = [HERE, THERE, BESIDE]
    for start in await given(engine, *(inbound(session) for session in sessions)):
        engine.answer(start, start.session.session)
    door.opens()
    await engine.outcomes(3)
    await at_rest(engine)
    assert [sorted(rows_of(group)["ends"]) for group in door.written[1:]] == [sorted(whole(*sessions)["ends"])]
    assert sorted(answers(engine)) == sorted((Outcome.FINAL, session) for session in sessions)


async def test_a_turn_after_the_other_is_one_group_each(engine: Engine, door: Door) -> None:
    """Each reads what was said before it."""
    for number in range(4):
        [start] = await given(engine, inbound(HERE, f"{number}"))
        if number:
            assert Message.FromString(start.context[-1]).parts[0].text == f"to {number - 1}"
        engine.answer(start, f"to {number}")
        door.lets_one_in()
        await eventually(partial(door.has_seen, 2 * number + 2), what="its group")
        door.lets_one_in()
        await engine.outcomes(number + 1)
        await door.is_busy()
    assert answers(engine) == [(Outcome.FINAL, f"to {number}") for number in range(4)]
    assert [group.ends[0][7] for group in door.written[1::2]] == [2, 3, 4, 5], "turns are numbered without gaps"


async def test_a_turn_that_fails_is_one_group_too(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    failed = Error(reason=ErrorReason.ERROR_REASON_SCHEMA_UNKNOWN, message="no")
    engine.propose(start, StepKind.FAILURE, 1, answer=failed)
    door.opens()
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, delivery.error) == (Outcome.ERROR, failed)
    assert [rows_of(group) for group in door.written[1:]] == [whole(HERE)]
    await at_rest(engine)


async def test_an_answer_that_cannot_be_read_is_an_error_once_it_is_durable(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    proposal = Proposal(turn_id=start.turn_id, dispatch=1, step=1, kind=int(StepKind.FINAL), inputs_seen=1)  # type: ignore[arg-type]
    proposal.answer = b"\xff"
    engine.runner.on_proposals(engine.brain, [proposal])
    await rounds()
    nothing_counts(engine)
    door.opens()
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, delivery.error.reason) == (Outcome.ERROR, ErrorReason.ERROR_REASON_ITEM_CORRUPT)
    await at_rest(engine)


# ---- nothing counts before


async def test_nothing_is_shown_before_the_group_is_durable(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    speak(engine, start, "Hel", "lo")
    engine.answer(start, "Hello")
    await rounds()
    nothing_counts(engine)
    door.lets_one_in()
    await eventually(lambda: len(door.sent) == 2, what="its group at the door")
    await rounds()
    nothing_counts(engine)
    door.opens()
    await engine.outcomes(1)
    assert names(engine, start.turn_id) == ["state", "text", "text", "ended"]


@pytest.mark.parametrize("moment", range(12))
async def test_a_final_at_any_moment_ends_the_turn_once(engine: Engine, door: Door, moment: int) -> None:
    """Its group is put together, sent, written, or known to be written."""
    [start] = await given(engine)
    speak(engine, start, "Hel")
    door.opens()
    for _ in range(moment):
        await asyncio.sleep(0)
    engine.answer(start, "Hello")
    await engine.outcomes(1)
    await at_rest(engine)
    assert names(engine, start.turn_id) == ["state", "text", "ended"]
    assert answers(engine) == [(Outcome.FINAL, "Hello")]
    assert sum(rows_of(group)["ends"] == [start.turn_id] for group in door.written) == 1
    assert engine.brain.starts == [start]


async def test_a_final_after_its_group_was_sent_is_held(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    door.lets_one_in()
    await eventually(lambda: len(door.sent) == 2, what="its group at the door")
    await rounds()
    engine.answer(start, "late")
    await rounds()
    nothing_counts(engine)
    assert len(engine.committer) == 0, "it waits for its start, not for the store"
    door.opens()
    await engine.outcomes(1)
    assert [rows_of(group)["ends"] for group in door.written[1:]] == [[], [start.turn_id]]
    await at_rest(engine)


CALL = StepBody(format=1, model_reply=ModelReply(text="so far")).SerializeToString()


@pytest.mark.parametrize("kind", [StepKind.MODEL_REPLY, StepKind.INTERIM_REPLY])
async def test_a_step_that_is_not_the_last_is_held(engine: Engine, door: Door, kind: StepKind) -> None:
    [start] = await given(engine)
    speak(engine, start, "Hel")
    engine.propose(start, kind, 1, body=CALL)
    await rounds()
    nothing_counts(engine)
    door.opens()
    await eventually(lambda: engine.brain.confirms, what="its confirmation")
    assert engine.brain.confirms == [(start.turn_id, 1, 1)]
    assert [rows_of(group)["steps"] for group in door.written[1:]] == [[], [start.turn_id]]
    assert engine.ended == []


NO_ENDS: dict[str, Callable[[Engine, StartTurn], None]] = {
    "not the first step": lambda engine, start: engine.answer(start, "no", 2),
    "a stranger's": lambda engine, start: engine.answer(start, "no", brain=Brain(name="stranger")),
    "blind": lambda engine, start: engine.propose(start, StepKind.FINAL, 1, answer=Message(), inputs_seen=0),
    "another run's": lambda engine, start: engine.answer(
        StartTurn(turn_id=start.turn_id, dispatch=2, session=start.session), "no"
    ),
}


@pytest.mark.parametrize("which", NO_ENDS)
async def test_what_is_no_last_step_does_not_end_the_turn(engine: Engine, door: Door, which: str) -> None:
    [start] = await given(engine)
    NO_ENDS[which](engine, start)
    door.opens()
    await eventually(lambda: start.turn_id in engine.state.running, what="start")
    await rounds()
    assert engine.ended == []
    assert engine.store.turns[start.turn_id] == "running"
    engine.answer(start, "ok")
    await engine.outcomes(1)
    assert answers(engine) == [(Outcome.FINAL, "ok")]
    await at_rest(engine)


async def test_a_final_said_twice_is_one(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    engine.answer(start, "first")
    engine.answer(start, "second")
    door.opens()
    await engine.outcomes(1)
    await at_rest(engine)
    assert answers(engine) == [(Outcome.FINAL, "first")]
    assert [rows_of(group) for group in door.written[1:]] == [whole(HERE)]


# ---- brains that die or do not want it


@pytest.mark.parametrize("sent", [False, True], ids=["before it is sent", "after"])
async def test_a_brain_that_dies_after_its_final_has_answered(engine: Engine, door: Door, sent: bool) -> None:
    [start] = await given(engine)
    speak(engine, start, "Hel")
    engine.answer(start, "its last words")
    if sent:
        door.lets_one_in()
        await eventually(lambda: len(door.sent) == 2, what="its group at the door")
        await rounds()
    engine.disconnect(engine.brain)
    other = Brain(name="other")
    engine.connect(other)
    door.opens()
    await engine.outcomes(1)
    await at_rest(engine, other)
    assert answers(engine) == [(Outcome.FINAL, "its last words")]
    assert other.starts == []
    assert [rows_of(group) for group in door.written[1:]] == [whole(HERE)]
    assert not any(group.dispatches for group in door.written)


@pytest.mark.parametrize("sent", [False, True], ids=["before it is sent", "after"])
async def test_a_brain_that_dies_without_a_final_is_a_strike(engine: Engine, door: Door, sent: bool) -> None:
    [start] = await given(engine)
    speak(engine, start, "Hel")
    engine.propose(start, StepKind.INTERIM_REPLY, 1, body=CALL)
    if sent:
        door.lets_one_in()
        await eventually(lambda: len(door.sent) == 2, what="its group at the door")
        await rounds()
    lost, other = engine.brain, Brain(name="other")
    engine.disconnect(lost)
    engine.connect(other)
    await rounds()
    assert other.starts == []
    engine.answer(start, "from the dead", brain=lost)
    door.opens()
    [again] = await engine.started(1, other)
    assert (again.turn_id, again.dispatch, len(again.journal)) == (start.turn_id, 2, 0)
    assert [row[:3] for group in door.written for row in group.dispatches] == [(start.turn_id, 2, 1)]
    engine.answer(again, "ok", brain=other)
    await engine.outcomes(1)
    assert answers(engine) == [(Outcome.FINAL, "ok")]
    assert "text" not in names(engine, start.turn_id)
    await at_rest(engine, other)


async def test_a_brain_that_declines_is_no_strike(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    engine.runner.on_declined(engine.brain, [StopTurn(turn_id=start.turn_id, dispatch=1)])
    await rounds()
    assert engine.brain.starts == [start]
    door.opens()
    _, again = await engine.started(2)
    assert (again.turn_id, again.dispatch) == (start.turn_id, 2)
    assert engine.state.running[start.turn_id].strikes == 0
    engine.answer(again, "ok")
    await engine.outcomes(1)
    await at_rest(engine)
