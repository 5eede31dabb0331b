"""Turns that a brain was given ahead and that are none, or are stopped before their start is durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason

from services.router.application.group import FenceLost, Group, GroupRejected, GroupResult, StoreLost
from services.router.domain.turn import Outcome
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import a_partition, inbound
from tests.unit.router.engine import Brain, Engine, running_engine
from tests.unit.router.test_start_ahead import (
    HERE,
    REMEMBERED,
    THERE,
    ahead,
    answered,
    at_rest,
    forget,
    goes_on,
    hold_starts,
    nothing_counts,
    rounds,
    speak,
    warm,
)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        await warm(engine, HERE, THERE)
        yield engine


async def answered_long_ago(engine: Engine, others: int) -> None:
    """The message `k` has its answer, and so many came after it."""
    await answered(engine, inbound(HERE))
    for number in range(others):
        await answered(engine, inbound(HERE, f"later {number}"))
    forget(engine)


# ---- a message that came before


@pytest.mark.parametrize("others", [0, REMEMBERED - 1])
@pytest.mark.parametrize("content", [b"hi", b"something else"])
async def test_no_brain_is_told_of_a_message_that_the_session_remembers(
    engine: Engine, others: int, content: bytes
) -> None:
    await answered_long_ago(engine, others)
    engine.store.gate = asyncio.Event()
    engine.accept(inbound(HERE, content=content))
    await rounds()
    goes_on(engine)
    await at_rest(engine)
    assert engine.brain.starts == engine.brain.stops == []
    assert len(engine.ended) == (content != b"hi")


async def test_a_message_and_its_retry_in_one_batch_are_started_once(engine: Engine) -> None:
    [start] = await ahead(engine, inbound(HERE), inbound(HERE))
    goes_on(engine)
    engine.answer(start, "ok")
    await engine.outcomes(1)
    await at_rest(engine)
    assert (engine.brain.starts, len(engine.ended), engine.brain.stops) == ([start], 1, [])


async def test_a_retry_while_the_start_is_on_its_way_starts_nothing(engine: Engine) -> None:
    [start] = await ahead(engine)
    engine.accept(inbound(HERE))
    await rounds()
    goes_on(engine)
    await rounds()
    engine.answer(start, "ok")
    await engine.outcomes(1)
    await at_rest(engine)
    assert (engine.brain.starts, len(engine.ended), engine.brain.stops) == ([start], 1, [])


@pytest.mark.parametrize("says", [True, False])
async def test_a_brain_that_was_given_an_old_retry_is_told_to_stop(engine: Engine, says: bool) -> None:
    await answered_long_ago(engine, REMEMBERED)
    [start] = await ahead(engine)
    if says:
        speak(engine, start, "Hel", "lo")
        engine.answer(start, "hello")
        await rounds()
        nothing_counts(engine)
    goes_on(engine)
    await at_rest(engine)
    assert engine.brain.stops == [(start.turn_id, 1)]
    engine.answer(start, "hello?")
    await rounds()
    nothing_counts(engine)
    await answered(engine, inbound(HERE, "next"))
    await at_rest(engine)


async def test_a_key_used_again_ends_with_its_error_whatever_the_brain_said(engine: Engine) -> None:
    await answered_long_ago(engine, REMEMBERED)
    [start] = await ahead(engine, inbound(HERE, content=b"something else"))
    engine.answer(start, "hello")
    goes_on(engine)
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, delivery.error.reason) == (Outcome.ERROR, ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED)
    assert engine.brain.stops == [(start.turn_id, 1)]
    assert (start.turn_id, 1) not in engine.store.steps
    await answered(engine, inbound(HERE, "next"))
    await at_rest(engine)
    assert len(engine.ended) == 2


# ---- a group that is refused


async def test_what_was_said_of_a_turn_written_apart_from_its_message_is_dropped(engine: Engine) -> None:
    """Refused together, each is taken alone: the turn is started again, with nobody's word for its answer."""

    dispatches: list[tuple[object, ...]] = []

    def apart(group: Group) -> BaseException | None:
        dispatches.extend(row[:2] for row in group.dispatches)
        return GroupRejected("not together") if group.turns and group.messages else None

    engine.store.refuse = apart
    [start] = await ahead(engine)
    speak(engine, start, "Hel")
    engine.answer(start, "from before")
    await rounds()
    goes_on(engine)
    _, again = await engine.started(2)
    assert (again.turn_id, again.dispatch) == (start.turn_id, 2)
    assert dispatches == [(start.turn_id, 2)]
    assert engine.state.running[start.turn_id].strikes == 0
    assert engine.brain.stops == [(start.turn_id, 1)]
    engine.answer(start, "still from before")
    await rounds()
    nothing_counts_but_the_state(engine)
    engine.answer(again, "ok")
    [(_, delivery)] = await engine.outcomes(1)
    assert delivery.message.parts[0].text == "ok"
    await at_rest(engine)
    assert len(engine.brain.starts) == 2


def nothing_counts_but_the_state(engine: Engine) -> None:
    assert [name for name, *_ in engine.live.events if name not in ("state", "restarted")] == []
    assert engine.store.steps == {}
    assert (engine.brain.confirms, engine.ended) == ([], [])


# ---- a term that ends


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("error", [FenceLost(frozenset({0})), StoreLost("gone")], ids=["fence", "store"])
async def test_a_turn_of_a_lost_partition_is_stopped(engine: Engine, says: bool, error: BaseException) -> None:
    engine.store.refuse = lambda _: error
    [start] = await ahead(engine)
    if says:
        speak(engine, start, "Hel")
        engine.answer(start, "hello")
        await rounds()
    goes_on(engine)
    await at_rest(engine)
    assert engine.brain.stops == [(start.turn_id, 1)]
    engine.answer(start, "hello?")
    engine.disconnect(engine.brain)
    await rounds()
    nothing_counts(engine)


@pytest.mark.parametrize("error", [FenceLost(frozenset({0})), StoreLost("gone"), GroupRejected("no")])
async def test_a_store_that_fails_at_once_leaves_no_turn_with_a_brain(
    engine: Engine, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no moment in which the group is on its way."""
    commit = engine.store.commit
    errors = [error]

    async def fails(group: Group) -> GroupResult:
        if errors:
            raise errors.pop()
        return await commit(group)

    monkeypatch.setattr(engine.store, "commit", fails)
    engine.accept(inbound(HERE))
    if isinstance(error, GroupRejected):
        await eventually(lambda: engine.state.running, what="start")
        await rounds()
        engine.answer(engine.brain.starts[-1], "ok")
        await engine.outcomes(1)
    await at_rest(engine)
    kept = 1 if isinstance(error, GroupRejected) else 0
    assert len(engine.brain.starts) - len(engine.brain.stops) == kept


async def test_a_message_whose_start_was_lost_is_raised_where_it_is_read_again(engine: Engine) -> None:
    """The same router has the partition again, and the brain may not have heard the stop: what its first run says is
    never taken for the second's. Nobody's brain died.
    """
    engine.store.refuse = lambda _: StoreLost("gone")
    [start] = await ahead(engine)
    speak(engine, start, "Hel")
    engine.answer(start, "from before")
    goes_on(engine)
    await eventually(lambda: not engine.state.partitions, what="end of its terms")
    engine.store.refuse = lambda _: None
    partition = engine.state.partitions[0] = a_partition(0)
    partition.attached = True
    await answered(engine, inbound(HERE, "another"))
    forget(engine)
    engine.store.gate = asyncio.Event()
    engine.accept(inbound(HERE))
    await rounds()
    assert engine.brain.starts == []
    goes_on(engine)
    [again] = await engine.started(1)
    assert (again.turn_id, again.dispatch) == (start.turn_id, 2)
    assert engine.state.running[again.turn_id].strikes == 0
    engine.answer(start, "late")
    engine.answer(again, "ok")
    [(_, delivery)] = await engine.outcomes(1)
    assert delivery.message.parts[0].text == "ok"
    await at_rest(engine)


async def test_a_backlog_that_is_sent_again_asks_a_model_once(engine: Engine) -> None:
    """An adapter that has lost all its receipts: its first retry may be too old to be known as one."""
    backlog = [f"{number}" for number in range(3 * REMEMBERED)]
    for key in backlog:
        await answered(engine, inbound(HERE, key))
    forget(engine)
    for key in backlog:
        engine.accept(inbound(HERE, key))
        await engine.quiet()
    assert len(engine.brain.starts) == 1
    assert {stop for stop, _ in engine.brain.stops} == {engine.brain.starts[0].turn_id}
    assert engine.ended == []
    await at_rest(engine)
    await answered(engine, inbound(HERE, "new"))


async def test_a_store_that_answers_at_once_leaves_nothing_to_give_ahead(engine: Engine) -> None:
    """By the time that a group would be on its way its turns run already."""
    commit = engine.store.commit

    async def at_once(group: Group) -> GroupResult:
        work = commit(group)
        try:
            while True:
                work.send(None)
        except StopIteration as done:
            result: GroupResult = done.value
            return result

    engine.store.commit = at_once  # type: ignore[method-assign]
    engine.accept(inbound(HERE, "1"), inbound(HERE, "2"))
    for count in (1, 2):
        await rounds()
        assert len(engine.brain.starts) == count
        engine.answer(engine.brain.starts[-1], "ok")
    await at_rest(engine)
    assert (len(engine.ended), engine.brain.stops) == (2, [])


async def test_a_partition_that_is_given_away_meanwhile_keeps_no_brain(engine: Engine) -> None:
    """The group arrives all the same: its turn is for the next owner."""
    [start] = await ahead(engine)
    engine.answer(start, "hello")
    engine.end_fenced(frozenset({0}))
    await rounds()
    goes_on(engine)
    await at_rest(engine)
    assert set(engine.brain.stops) == {(start.turn_id, 1)}
    nothing_counts(engine)


@pytest.mark.parametrize("says", [True, False])
async def test_the_turns_of_a_group_that_is_sent_again_are_started_once(engine: Engine, says: bool) -> None:
    errors = [FenceLost(frozenset({1}))]
    sent: list[int] = []

    def fenced_once(group: Group) -> BaseException | None:
        sent.append(len(group.turns))
        return errors.pop() if errors else None

    engine.store.refuse = fenced_once
    await ahead(engine, inbound(HERE), inbound(THERE), count=2)
    start = next(start for start in engine.brain.starts if start.session.session == HERE)
    gone = next(start for start in engine.brain.starts if start.session.session == THERE)
    if says:
        engine.answer(start, "ok")
        engine.answer(gone, "ok")
    goes_on(engine)
    if not says:
        await eventually(lambda: start.turn_id in engine.state.running, what="start")
        engine.answer(start, "ok")
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, delivery.turn_id) == (Outcome.FINAL, start.turn_id)
    await at_rest(engine)
    assert sent[:2] == [2, 1]
    assert len(engine.brain.starts) == 2
    assert engine.brain.stops == [(gone.turn_id, 1)]


async def test_a_brain_that_dies_before_the_group_is_sent_again_is_a_strike_like_any_other(engine: Engine) -> None:
    errors = [FenceLost(frozenset({1}))]
    engine.store.refuse = lambda _: errors.pop() if errors else None
    await ahead(engine, inbound(HERE), inbound(THERE), count=2)
    other = Brain(name="other")
    engine.disconnect(engine.brain)
    engine.connect(other)
    goes_on(engine)
    [again] = await engine.started(1, other)
    assert (again.session.session, again.dispatch) == (HERE, 2)
    assert engine.state.running[again.turn_id].strikes == 1
    engine.answer(again, "ok", brain=other)
    await engine.outcomes(1)
    await at_rest(engine, other)
    assert len(other.starts) == 1


async def test_a_turn_in_a_group_that_is_sent_again_may_wait_for_it(engine: Engine) -> None:
    """It is not given twice either, if it could not be given the first time."""
    engine.brain.credit = 1
    held = hold_starts(engine)
    engine.accept(inbound(THERE), inbound(HERE))
    await engine.started(1)
    held.set()
    engine.answer(engine.brain.starts[0], "ok")
    engine.answer((await engine.started(2))[1], "ok")
    await engine.outcomes(2)
    assert engine.brain.credit == 1
