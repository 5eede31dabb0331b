"""What begins while another group is being written overtakes nothing of its session that came first."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from soma.router.v1.inbound_pb2 import InboundKind

from services.router.domain.turn import Outcome
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import cancel, inbound, names_in
from tests.unit.router.engine import Engine, running_engine
from tests.unit.router.test_one_commit import BESIDE, Door, answers, given, rows_of, waits
from tests.unit.router.test_start_ahead import HERE, THERE, at_rest, rounds, turn_of, warm

AWAY = names_in(2, 1)[0]
GROUP_LIMIT, GROUP_WEIGHT = 1024, 2048


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        await warm(engine, HERE, THERE, BESIDE, AWAY)
        yield engine


@pytest.fixture
async def door(engine: Engine) -> Door:
    """A group is being written, and takes its time."""
    door = Door(engine)
    await door.is_busy()
    return door


async def answer_all(engine: Engine, count: int) -> list[bytes]:
    """The brain answers each turn as it gets it; the ids of what was answered, in the order of the outcomes."""
    done = 0
    while len(engine.ended) < count:
        await engine.started(done + 1)
        for start in engine.brain.starts[done:]:
            engine.answer(start, "ok")
        done = len(engine.brain.starts)
        await rounds()
    await engine.outcomes(count)
    return [message for item in engine.ended for message in item.answer.message_ids]


# ---- within a session


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "two"])
async def test_of_two_messages_of_a_session_the_first_is_given(engine: Engine, door: Door, together: bool) -> None:
    one, two = inbound(HERE, "1", b"one"), inbound(HERE, "2", b"two")
    engine.accept(*([one, two] if together else [one]))
    if not together:
        await rounds()
        engine.accept(two)
    [start] = await engine.started(1)
    engine.answer(start, "to one")
    await rounds()
    assert (list(start.inputs), len(engine.brain.starts)) == ([b"one"], 1)
    door.opens()
    assert await answer_all(engine, 2) == [one.message_id, two.message_id]
    assert [group.ends[0][7] for group in door.written if group.ends] == [2, 3]
    await at_rest(engine)


IN_FLIGHT = {
    "a message that waits": [inbound(HERE, "1"), inbound(HERE, "2")],
    "a message of a session that is not in memory": [inbound("stranger", "1")],
    "a message that came before": [inbound(HERE, "warm")],
    "a message that runs": [inbound(HERE, "1")],
    "a cancel": [cancel(HERE)],
}


@pytest.mark.parametrize("first", IN_FLIGHT)
async def test_what_is_in_the_group_that_is_written_is_not_overtaken(engine: Engine, door: Door, first: str) -> None:
    session = IN_FLIGHT[first][-1].session
    engine.accept(*IN_FLIGHT[first])
    door.lets_one_in()
    await eventually(lambda: len(door.sent) == 2, what="the group with what came first")
    await rounds()
    behind = inbound(session, "behind")
    await waits(engine, behind)
    door.opens()
    new = [item.message_id for item in IN_FLIGHT[first] if item.content and item.message_id != warm_id()]
    assert await answer_all(engine, len(new) + 1) == [*new, behind.message_id]
    await at_rest(engine)


def warm_id() -> bytes:
    return inbound(HERE, "warm").message_id


async def test_a_turn_that_ends_in_the_group_that_is_written_is_not_overtaken(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    engine.answer(start, "one")
    door.lets_one_in()
    await eventually(lambda: len(door.sent) == 2, what="the group that ends the turn")
    await waits(engine, inbound(HERE, "2"))
    door.opens()
    _, second = await engine.started(2)
    assert second.context[-1] != start.context[-1], "it reads what was answered"
    engine.answer(second, "two")
    await engine.outcomes(2)
    assert answers(engine) == [(Outcome.FINAL, "one"), (Outcome.FINAL, "two")]


@pytest.mark.parametrize("in_flight", [True, False], ids=["in the group before", "in the same"])
async def test_a_message_behind_a_pause_waits_for_the_resume(engine: Engine, door: Door, in_flight: bool) -> None:
    pause = cancel(HERE, "pause")
    pause.kind = InboundKind.INBOUND_KIND_PAUSE
    engine.accept(pause)
    if in_flight:
        door.lets_one_in()
        await eventually(lambda: len(door.sent) == 2, what="the group with the pause")
    await waits(engine, inbound(HERE))
    door.opens()
    await rounds()
    assert engine.brain.starts == []
    assert turn_of(HERE, "k") not in engine.store.turns
    resume = cancel(HERE, "resume")
    resume.kind = InboundKind.INBOUND_KIND_RESUME
    engine.accept(resume)
    await answer_all(engine, 1)


async def test_a_message_behind_a_control_of_its_session_waits(engine: Engine, door: Door) -> None:
    await waits(engine, cancel(HERE), inbound(HERE))
    [start] = await given(engine, inbound(THERE))
    assert start.turn_id == turn_of(THERE, "k")
    door.opens()
    await answer_all(engine, 2)
    assert {outcome for outcome, _ in answers(engine)} == {Outcome.FINAL}, "the cancel was before it"
    await at_rest(engine)


# ---- more than a group takes


async def test_what_is_left_over_for_the_next_group_is_not_overtaken(engine: Engine, door: Door) -> None:
    for _ in range(GROUP_LIMIT + 10):
        engine.accept(inbound(AWAY, "warm"))
    first, second = inbound(HERE, "1"), inbound(HERE, "2")
    engine.accept(first)
    door.lets_one_in()
    await eventually(lambda: len(door.sent) == 2, what="a full group")
    assert first.message_id not in rows_of(door.sent[1])["messages"]
    await waits(engine, second)
    door.opens()
    assert await answer_all(engine, 2) == [first.message_id, second.message_id]
    await at_rest(engine)


async def test_what_comes_between_two_parts_of_a_heavy_group_is_not_overtaken(engine: Engine, door: Door) -> None:
    """What was taken at once is too heavy for one group and is written in two; a message comes during each."""
    for _ in range(3):
        engine.accept(*[inbound(AWAY, "warm")] * (GROUP_WEIGHT // 2))
    first, second = inbound(HERE, "1"), inbound(HERE, "2")
    door.lets_one_in()
    await eventually(lambda: len(door.sent) == 2, what="the first part")
    engine.accept(first)
    await rounds()
    door.lets_one_in()
    await eventually(lambda: len(door.sent) == 3, what="the second part")
    engine.accept(second)
    await rounds()
    assert [list(start.inputs) for start in engine.brain.starts if start.turn_id == turn_of(HERE, "2")] == []
    door.opens()
    assert await answer_all(engine, 2) == [first.message_id, second.message_id]
    await at_rest(engine)


async def test_more_messages_than_the_next_group_takes_wait(engine: Engine, door: Door) -> None:
    """What begins goes with its message: a start in a later group would be none."""
    for _ in range(GROUP_LIMIT):
        engine.accept(inbound(AWAY, "warm"))
    await waits(engine, inbound(HERE))
    door.opens()
    [start] = await engine.started(1)
    engine.answer(start, "ok")
    await engine.outcomes(1)
    assert (start.dispatch, engine.brain.stops) == (1, [])
