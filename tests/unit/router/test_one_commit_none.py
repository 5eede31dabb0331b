"""Turns that were to begin and end in one transaction, and do not: their message came before."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason

from services.router.application import start_ahead
from services.router.application.group import Group, GroupRejected
from services.router.domain.turn import Outcome
from soma_common.clock import monotonic
from tests.unit.router.builders import inbound
from tests.unit.router.engine import Brain, Engine, running_engine
from tests.unit.router.test_one_commit import BESIDE, Door, answers, given, names, waits
from tests.unit.router.test_start_ahead import (
    HERE,
    REMEMBERED,
    THERE,
    answered,
    at_rest,
    nothing_counts,
    rounds,
    speak,
    turn_of,
    warm,
)
from tests.unit.router.test_start_ahead_none import answered_long_ago


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        await warm(engine, HERE, THERE, BESIDE)
        yield engine


@pytest.fixture
async def door(engine: Engine) -> Door:
    """A group is being written; the message `k` of `HERE` had its answer long ago."""
    await answered_long_ago(engine, REMEMBERED)
    door = Door(engine)
    await door.is_busy()
    return door


def as_there_are_steps(engine: Engine) -> None:
    """The turn that has ended has steps: the database sees their numbers twice before it sees the end."""

    def refuse(group: Group) -> BaseException | None:
        again = any(engine.store.turns.get(row[0]) == "ended" for row in group.ends)
        return GroupRejected("duplicate key value violates unique constraint") if again else None

    engine.store.refuse = refuse


HOW_IT_IS_REFUSED: dict[str, Callable[[Engine], None]] = {
    "by the turn": lambda engine: None,
    "by its steps": as_there_are_steps,
}


def delivered(door: Door) -> list[tuple[int, int]]:
    """The places of all deliveries, in the order in which they were written."""
    return [(row[0], row[1]) for group in door.written for row in group.deliveries]


# ---- a message that came before


@pytest.mark.parametrize("refused", HOW_IT_IS_REFUSED)
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_the_end_of_a_retry_is_dropped_and_the_others_are_stored(
    engine: Engine, door: Door, refused: str, place: int
) -> None:
    HOW_IT_IS_REFUSED[refused](engine)
    items = [inbound(THERE), inbound(BESIDE)]
    items.insert(place, inbound(HERE))
    places = {partition.id: partition.head for partition in engine.state.partitions.values()}
    starts = {start.session.session: start for start in await given(engine, *items)}
    for session, start in starts.items():
        speak(engine, start, "so")
        engine.answer(start, session)
    await rounds()
    nothing_counts(engine)
    door.opens()
    await engine.outcomes(2)
    await at_rest(engine)
    retry = starts[HERE]
    assert sorted(answers(engine)) == sorted([(Outcome.FINAL, THERE), (Outcome.FINAL, BESIDE)])
    assert engine.brain.stops == [(retry.turn_id, 1)]
    assert names(engine, retry.turn_id) == []
    assert not any(turn == retry.turn_id for turn, _ in engine.store.steps)
    for session in (THERE, BESIDE):
        turn = starts[session].turn_id
        assert names(engine, turn) == ["state", "text", "ended"]
        assert (turn, 1, 1) in engine.brain.confirms
    assert len(engine.brain.starts) == 3
    assert sorted(delivered(door)) == [(0, places[0] + 1), (1, places[1] + 1)]
    for partition in (0, 1):
        assert engine.state.partitions[partition].head == places[partition] + 1


@pytest.mark.parametrize("refused", HOW_IT_IS_REFUSED)
async def test_a_retry_alone_changes_nothing(engine: Engine, door: Door, refused: str) -> None:
    HOW_IT_IS_REFUSED[refused](engine)
    [start] = await given(engine)
    engine.answer(start, "again")
    door.opens()
    await at_rest(engine)
    await engine.quiet()
    nothing_counts(engine)
    assert engine.brain.stops == [(start.turn_id, 1)]
    assert engine.state.partitions[0].lost is False
    engine.answer(start, "and again")
    await answered(engine, inbound(HERE, "next"))
    assert answers(engine) == [(Outcome.FINAL, "ok")]
    await at_rest(engine)


async def test_ends_of_its_tenant_wait_for_their_starts_for_a_while(
    engine: Engine, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group with such an end is written three times: a tenant must not cost the others that again and again."""
    now = monotonic()
    monkeypatch.setattr(start_ahead, "monotonic", lambda: now)
    [retry] = await given(engine)
    engine.answer(retry, "again")
    door.opens()
    await at_rest(engine)
    for number, together in enumerate((False, True)):
        door.shut()
        await door.is_busy()
        engine.accept(inbound(THERE, f"{number}"))
        start = (await engine.started(2 + number))[-1]
        engine.answer(start, "ok")
        await rounds()
        written = len(door.written)
        door.opens()
        await engine.outcomes(1 + number)
        starts = [group for group in door.written[written:] if group.turns]
        assert [bool(group.ends) for group in starts] == [together]
        now += start_ahead._APART_S


async def test_no_brain_gets_a_turn_that_was_given_in_vain_once_more(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    engine.answer(start, "again")
    door.opens()
    await at_rest(engine)
    await answered(engine, inbound(HERE, "between"))
    door.shut()
    await door.is_busy()
    await waits(engine, inbound(HERE))
    door.opens()
    await at_rest(engine)
    assert [s for s in engine.brain.starts if s.turn_id == start.turn_id] == [start]


async def test_what_comes_behind_a_retry_is_answered(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    engine.answer(start, "again")
    engine.accept(inbound(HERE, "behind"))
    await rounds()
    assert engine.brain.starts == [start]
    door.opens()
    _, behind = await engine.started(2)
    assert behind.turn_id == turn_of(HERE, "behind")
    engine.answer(behind, "ok")
    await engine.outcomes(1)
    assert answers(engine) == [(Outcome.FINAL, "ok")]
    await at_rest(engine)


@pytest.mark.parametrize("refused", HOW_IT_IS_REFUSED)
async def test_a_key_used_again_ends_once_with_its_error(engine: Engine, door: Door, refused: str) -> None:
    HOW_IT_IS_REFUSED[refused](engine)
    starts = await given(engine, inbound(HERE, content=b"something else"), inbound(THERE))
    for start in starts:
        engine.answer(start, "hello")
    door.opens()
    await engine.outcomes(2)
    await at_rest(engine)
    by_turn = {item.answer.turn_id: item.answer for item in engine.ended}
    assert by_turn.pop(turn_of(THERE, "k")).message.parts[0].text == "hello"
    [delivery] = by_turn.values()
    assert delivery.error.reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED
    assert engine.brain.stops == [(turn_of(HERE, "k"), 1)]
    assert (turn_of(HERE, "k"), 1) not in engine.store.steps
    assert len(engine.brain.starts) == 2


async def test_a_dead_brains_answer_to_a_retry_is_dropped(engine: Engine, door: Door) -> None:
    [start] = await given(engine)
    engine.answer(start, "again")
    engine.disconnect(engine.brain)
    other = Brain(name="other")
    engine.connect(other)
    door.opens()
    await at_rest(engine, other)
    await engine.quiet()
    assert (engine.ended, other.starts, engine.live.events) == ([], [], [])
