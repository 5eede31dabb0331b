"""Turns that are told to stop while their start is on its way to the store: a user sees no difference."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from soma.router.v1.inbound_pb2 import Inbound, InboundKind

from services.router.domain.arrival import Policy
from services.router.domain.turn import Outcome, StepKind
from tests.unit.router.builders import cancel, inbound
from tests.unit.router.engine import running_engine
from tests.unit.router.test_start_ahead import HERE, at_rest, goes_on, nothing_counts, rounds, speak, turn_of, warm


def with_policy(policy: Policy) -> Inbound:
    item = inbound(HERE, "other")
    item.policy = policy.value  # type: ignore[assignment]
    return item


def control(kind: InboundKind.ValueType) -> Inbound:
    item = cancel(HERE)
    item.kind = kind
    return item


STOPPERS: dict[str, Callable[[], Inbound]] = {
    "cancel": lambda: cancel(HERE),
    "cancel by name": lambda: cancel(HERE, target=turn_of(HERE, "k")),
    "cancel all": lambda: control(InboundKind.INBOUND_KIND_CANCEL_ALL),
    "interrupt": lambda: control(InboundKind.INBOUND_KIND_INTERRUPT),
    "interrupting message": lambda: with_policy(Policy.INTERRUPT),
    "rollback": lambda: with_policy(Policy.ROLLBACK),
    "steer": lambda: with_policy(Policy.STEER),
    "pause": lambda: control(InboundKind.INBOUND_KIND_PAUSE),
    "refused": lambda: with_policy(Policy.REJECT),
}


async def told(start_ahead: bool, stopper: str, together: bool, says: bool) -> list[tuple[Outcome, list[bytes]]]:
    """What a user gets who does that to a session while a turn's start is on its way."""
    async with running_engine(start_ahead=start_ahead) as engine:
        await warm(engine, HERE)
        engine.store.gate = asyncio.Event()
        batch = [inbound(HERE), STOPPERS[stopper]()]
        engine.accept(*(batch if together else batch[:1]))
        await rounds()
        started = list(engine.brain.starts)
        assert len(started) <= start_ahead
        if not together:
            engine.accept(batch[1])
        if says and started:
            speak(engine, started[0], "Hel")
            engine.answer(started[0], "blind")
        await rounds()
        nothing_counts(engine)
        goes_on(engine)
        await rounds()
        for _ in range(3):
            for turn in list(engine.state.running.values()):
                if turn.link is engine.brain:
                    seen = len(turn.inputs)
                    start = next(s for s in engine.brain.starts if (s.turn_id, s.dispatch) == (turn.id, turn.dispatch))
                    engine.propose(start, StepKind.FINAL, 1, answer=None, inputs_seen=seen)
            await rounds()
        await at_rest(engine)
        own = {Outcome.FINAL, Outcome.REJECTED}
        cut_off = {item.turn.id for item in engine.ended if Outcome(item.answer.outcome) not in own}
        assert cut_off & {start.turn_id for start in engine.brain.starts} <= {turn for turn, _ in engine.brain.stops}
        return [(Outcome(item.answer.outcome), list(item.answer.message_ids)) for item in engine.ended]


@pytest.mark.parametrize("together", [True, False], ids=["in the same group", "on its way"])
@pytest.mark.parametrize("stopper", STOPPERS)
async def test_a_user_sees_no_difference(stopper: str, together: bool) -> None:
    expected = await told(False, stopper, together, says=False)
    assert expected
    assert await told(True, stopper, together, says=False) == expected


@pytest.mark.parametrize("together", [True, False], ids=["in the same group", "on its way"])
@pytest.mark.parametrize("stopper", STOPPERS)
async def test_each_message_has_one_outcome_if_the_brain_was_faster(stopper: str, together: bool) -> None:
    ended = await told(True, stopper, together, says=True)
    answered = [message for _, messages in ended for message in messages]
    mine = inbound(HERE).message_id
    assert answered.count(mine) == 1
    assert len(answered) == len(set(answered)) == len({mine, *answered})
    if together and stopper.startswith("cancel"):
        assert ended == [(Outcome.CANCELLED, [mine])]
    if together and stopper == "steer":
        assert ended == [(Outcome.FINAL, [mine, inbound(HERE, "other").message_id])], "the blind final is not taken"


@pytest.mark.parametrize("stopper", ["cancel", "cancel by name", "cancel all", "interrupt"])
async def test_who_watches_sees_no_words_of_a_turn_that_never_was_shown_to_run(stopper: str) -> None:
    async with running_engine() as engine:
        await warm(engine, HERE)
        engine.store.gate = asyncio.Event()
        engine.accept(inbound(HERE), STOPPERS[stopper]())
        await rounds()
        for start in engine.brain.starts:
            speak(engine, start, "Hel", "lo")
        goes_on(engine)
        await engine.outcomes(1)
        assert next(name for name, *_ in engine.live.events) != "text"
