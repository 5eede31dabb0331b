"""Turns from the lane to their outcome, over brains that die, repeat themselves and come too late."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from soma.cognition.v1.cognition_service_pb2 import StopTurn
from soma.common.v1.error_reason_pb2 import ErrorReason

from services.router.application import start_turns
from services.router.application.group import Group, GroupRejected
from services.router.application.outcomes import EndItem
from services.router.domain.session import Turn
from services.router.domain.turn import Outcome, StepKind
from tests.unit.router.builders import cancel, inbound
from tests.unit.router.engine import Brain, Engine, running_engine


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        yield engine


async def test_a_message_becomes_a_turn_and_its_answer_ends_it(engine: Engine) -> None:
    engine.accept(inbound(content=b"hi"))
    [start] = await engine.started(1)
    assert (start.dispatch, list(start.inputs), list(start.journal)) == (1, [b"hi"], [])
    engine.answer(start, "hello")
    [(outcome, delivery)] = await engine.outcomes(1)
    assert outcome is Outcome.FINAL
    assert delivery.message.parts[0].text == "hello"
    assert engine.brain.confirms == [(start.turn_id, 1, 1)]
    assert engine.brain.credit == 100
    partition = engine.state.partitions[0]
    assert all(not p.pending for p in engine.state.partitions.values()), partition


async def test_a_sessions_messages_are_answered_one_after_the_other(engine: Engine) -> None:
    engine.accept(*(inbound(key=f"k{n}", content=b"%d" % n) for n in range(5)))
    for n in range(5):
        starts = await engine.started(n + 1)
        await engine.quiet()
        assert len(starts) == n + 1
        engine.answer(starts[n], "ok")
    assert [list(start.inputs) for start in engine.brain.starts] == [[b"%d" % n] for n in range(5)]
    assert len(await engine.outcomes(5)) == 5


async def test_the_next_turn_knows_what_was_said(engine: Engine) -> None:
    for n in range(2):
        engine.accept(inbound(key=f"k{n}", content=b"%d" % n))
        engine.answer((await engine.started(n + 1))[n], "ok")
        await engine.outcomes(n + 1)
    assert list(engine.brain.starts[0].context) == []
    assert engine.brain.starts[1].context[0] == b"0"
    assert len(engine.brain.starts[1].context) == 2


async def test_no_brain_sees_a_retry(engine: Engine) -> None:
    engine.accept(inbound())
    engine.answer((await engine.started(1))[0], "ok")
    await engine.outcomes(1)
    engine.accept(inbound())
    engine.accept(inbound(), inbound(key="k2"))
    engine.answer((await engine.started(2))[1], "ok")
    await engine.outcomes(2)
    await engine.quiet()
    assert len(engine.brain.starts) == len(engine.ended) == 2
    assert engine.brain.credit == 100
    assert engine.state.scheduler.running == 0


@pytest.mark.parametrize("together", [True, False])
async def test_a_reused_key_is_an_error_of_its_own_and_the_session_goes_on(engine: Engine, together: bool) -> None:
    one, other, next_ = inbound(content=b"one"), inbound(content=b"other"), inbound(key="k2")
    if together:
        engine.accept(one, other, next_)
        engine.answer((await engine.started(1))[0], "ok")
    else:
        engine.accept(one)
        engine.answer((await engine.started(1))[0], "ok")
        await engine.outcomes(1)
        engine.accept(other)
        await engine.outcomes(2)
        engine.accept(next_)
    engine.answer((await engine.started(2))[1], "ok")
    outcomes = await engine.outcomes(3)
    assert [outcome for outcome, _ in outcomes] == [Outcome.FINAL, Outcome.ERROR, Outcome.FINAL]
    assert outcomes[1][1].error.reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED
    assert len(engine.store.turns) == 3
    assert not any(partition.lost for partition in engine.state.partitions.values())


async def test_a_message_whose_group_was_refused_for_another_item_is_answered(engine: Engine) -> None:
    """The group is written again item by item: the message in one, the start of its turn in the next."""

    def refuse_large_groups(group: Group) -> BaseException | None:
        large = len(group.messages) + len(group.turns) > 1
        return GroupRejected("one of them is wrong") if large else None

    engine.accept(inbound("warm"))
    engine.answer((await engine.started(1))[0], "ok")
    await engine.outcomes(1)
    engine.store.refuse = refuse_large_groups
    engine.accept(inbound("warm", "k2"))
    _, ahead, again = await engine.started(3)
    engine.answer(again, "ok")
    assert len(await engine.outcomes(2)) == 2
    assert engine.brain.stops == [(ahead.turn_id, 1)]
    assert (again.turn_id, again.dispatch) == (ahead.turn_id, 2)


async def test_steps_are_confirmed_once_they_are_journaled(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.store.gate = asyncio.Event()
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    await engine.quiet()
    assert engine.brain.confirms == []
    engine.store.gate.set()
    await engine.quiet()
    assert engine.brain.confirms == [(start.turn_id, 1, 1)]


async def test_what_does_not_come_next_is_ignored(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.propose(start, StepKind.MODEL_REPLY, 2)
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    engine.propose(start, StepKind.MODEL_REPLY, 1)  # one is on its way already
    engine.propose(start, StepKind.TOOL_RESULTS, 2)
    await engine.quiet()
    engine.propose(start, StepKind.MODEL_REPLY, 1)  # again
    await engine.quiet()
    assert list(engine.store.steps) == [(start.turn_id, 1)]


async def test_a_final_that_has_not_seen_every_input_is_no_answer(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.propose(start, StepKind.FINAL, 1, inputs_seen=0)
    await engine.quiet()
    assert engine.ended == []


async def test_an_impossible_step_ends_the_turn_with_an_error(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.propose(start, StepKind.TOOL_RESULTS, 1)
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, delivery.error.reason) == (Outcome.ERROR, ErrorReason.ERROR_REASON_INVALID_TRANSITION)
    assert engine.brain.stops == [(start.turn_id, 1)]


# ---- brains come and go


async def test_a_turn_goes_on_elsewhere_from_its_journal(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    await engine.quiet()
    other = Brain(name="brain-1")
    engine.disconnect(engine.brain)
    engine.connect(other)
    [again] = await engine.started(1, other)
    assert (again.turn_id, again.dispatch, len(again.journal)) == (start.turn_id, 2, 1)
    engine.propose(start, StepKind.TOOL_RESULTS, 2)  # the former brain lives after all
    await engine.quiet()
    assert (start.turn_id, 2) not in engine.store.steps
    engine.propose(again, StepKind.TOOL_RESULTS, 2, brain=other)
    await engine.quiet()
    assert other.confirms == [(start.turn_id, 2, 2)]


async def test_a_step_on_its_way_when_the_brain_dies_is_in_the_journal_of_the_next(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.store.gate = asyncio.Event()
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    other = Brain(name="brain-1")
    engine.disconnect(engine.brain)
    engine.connect(other)
    engine.store.gate.set()
    [again] = await engine.started(1, other)
    assert (again.dispatch, len(again.journal)) == (2, 1)


async def test_an_answer_on_its_way_when_the_brain_dies_counts(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.store.gate = asyncio.Event()
    engine.answer(start, "ok")
    other = Brain(name="brain-1")
    engine.disconnect(engine.brain)
    engine.connect(other)
    engine.store.gate.set()
    await engine.outcomes(1)
    await engine.quiet()
    assert other.starts == []
    assert other.credit == 100


async def test_no_more_turns_than_the_brains_take(engine: Engine) -> None:
    engine.brain.credit = 2
    engine.accept(*(inbound(f"s{n}") for n in range(5)))
    starts = await engine.started(2)
    await engine.quiet()
    assert len(starts) == 2
    for n in range(5):
        engine.answer((await engine.started(n + 1))[n], "ok")
        await engine.outcomes(n + 1)
    assert engine.brain.credit == 2


async def test_messages_wait_for_a_brain(engine: Engine) -> None:
    engine.disconnect(engine.brain)
    engine.accept(inbound())
    await engine.quiet()
    engine.connect(engine.brain)
    await engine.started(1)


@pytest.mark.parametrize("in_flight", [True, False])
async def test_a_turn_that_kills_its_brains_is_set_aside(in_flight: bool) -> None:
    async with running_engine(max_strikes=2) as engine:
        engine.accept(inbound())
        for n in range(2):
            starts = await engine.started(n + 1)
            if in_flight and n == 1:
                engine.propose(starts[n], StepKind.MODEL_REPLY, 1)
            engine.disconnect(engine.brain)
            engine.connect(engine.brain)
        [(outcome, delivery)] = await engine.outcomes(1)
        assert (outcome, delivery.error.reason) == (Outcome.ERROR, ErrorReason.ERROR_REASON_TURN_POISONED)
        [ended] = engine.ended
        assert isinstance(ended, EndItem)
        assert ended.dead_letter
        engine.accept(inbound(key="k2"))
        engine.answer((await engine.started(3))[2], "ok")
        await engine.outcomes(2)


async def test_a_poison_turn_takes_nobody_with_it() -> None:
    """Its neighbours were there when brains died, more than once; they are not set aside with it."""
    async with running_engine(max_strikes=4) as engine:
        for name in ("poison", "a", "b", "c"):
            engine.accept(inbound(session=name))
        await engine.started(4)
        poison = next(s.turn_id for s in engine.brain.starts if s.session.session == "poison")
        brain = engine.brain
        for number in range(1, 40):
            if len(engine.ended) == 4:
                break
            running = [s for s in brain.starts if s.turn_id in engine.state.running]
            if any(s.turn_id == poison and engine.state.running[poison].link is brain for s in running):
                engine.disconnect(brain)
                brain = Brain(name=f"brain-{number}")
                engine.connect(brain)
            for start in running:
                if start.turn_id != poison:
                    engine.answer(start, "ok", brain=brain)
            await engine.quiet()
        outcomes = {item.turn.session.key.session: int(item.answer.outcome) for item in engine.ended}
        assert outcomes == {"poison": Outcome.ERROR, "a": Outcome.FINAL, "b": Outcome.FINAL, "c": Outcome.FINAL}
        assert max(item.turn.strikes for item in engine.ended if int(item.answer.outcome) == Outcome.FINAL) <= 2


async def test_a_step_on_its_way_when_its_brain_dies_is_shown_as_that_dispatchs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal says so too: shown as the next dispatch's, it would be taken back by whoever reads it there."""
    told: list[tuple[str, int]] = []
    for name in ("step", "restarted", "state"):

        def tell(turn: Turn, *_: object, name: str = name) -> None:
            told.append((name, turn.dispatch))

        monkeypatch.setattr(engine.live, name, tell, raising=False)
    engine.accept(inbound())
    [start] = await engine.started(1)
    turn = engine.state.running[start.turn_id]
    told.clear()
    engine.store.gate = asyncio.Event()
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    await asyncio.sleep(0.01)
    engine.disconnect(engine.brain)
    engine.connect(other := Brain(name="brain-1"))
    assert (turn.dispatch, turn.link) == (1, None), "the next is not durable yet"
    engine.propose(start, StepKind.FINAL, 2)  # nobody listens to the one that is gone
    engine.store.gate.set()
    [again] = await engine.started(1, other)
    assert (again.dispatch, len(again.journal)) == (2, 1)
    assert told == [("step", 1), ("restarted", 2), ("state", 2)]


async def test_a_declined_turn_goes_elsewhere_without_a_strike(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    declined = StopTurn(turn_id=start.turn_id, dispatch=1)
    engine.runner.on_declined(engine.brain, [declined])
    starts = await engine.started(2)
    assert starts[1].dispatch == 2
    assert engine.state.running[start.turn_id].strikes == 0


async def test_an_agent_that_is_gone_is_a_typed_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_turns, "AGENT_GRACE_S", 0.3)
    engine.directory.has_agent = False
    engine.accept(inbound())
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, delivery.error.reason) == (Outcome.ERROR, ErrorReason.ERROR_REASON_AGENT_GONE)
    assert engine.brain.starts == []


# ---- stopping


async def test_a_cancel_stops_the_running_turn(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.accept(cancel())
    [(outcome, _)] = await engine.outcomes(1)
    assert outcome is Outcome.CANCELLED
    assert engine.brain.stops == [(start.turn_id, 1)]
    await engine.quiet()
    assert all(not partition.pending for partition in engine.state.partitions.values())
    engine.answer(start, "too late")
    await engine.quiet()
    assert len(engine.ended) == 1


async def test_a_cancel_after_a_confirmed_call_settles_it_first(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    await engine.quiet()
    engine.accept(cancel())
    [(outcome, _)] = await engine.outcomes(1)
    assert outcome is Outcome.CANCELLED
    assert len(engine.settled) == 1
    assert engine.store.steps[start.turn_id, 2] == b"settled"


async def test_a_call_on_its_way_to_the_journal_is_settled_too(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.store.gate = asyncio.Event()
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    engine.accept(cancel())
    engine.store.gate.set()
    [(outcome, _)] = await engine.outcomes(1)
    assert outcome is Outcome.CANCELLED
    assert len(engine.settled) == 1
    assert engine.brain.confirms[:1] != [(start.turn_id, 1, 1)] or engine.store.steps[start.turn_id, 2] == b"settled"


async def test_a_cancel_in_the_batch_of_its_message_leaves_no_brain_running(engine: Engine) -> None:
    engine.accept(inbound("warm"))
    engine.answer((await engine.started(1))[0], "ok")
    await engine.outcomes(1)
    engine.accept(inbound("warm", "k2"), cancel("warm"))
    outcomes = await engine.outcomes(2)
    await engine.quiet()
    assert outcomes[1][0] is Outcome.CANCELLED
    stopped = {turn for turn, _ in engine.brain.stops}
    assert {start.turn_id for start in engine.brain.starts[1:]} <= stopped
    assert engine.brain.credit == 100


async def test_a_cancel_names_the_turn_it_means(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.accept(cancel(target=b"?" * 16))
    await engine.quiet()
    engine.answer(start, "ok")
    [(outcome, _)] = await engine.outcomes(1)
    assert outcome is Outcome.FINAL


async def test_an_idle_session_that_was_cancelled_is_forgotten_like_any_other(engine: Engine) -> None:
    engine.accept(cancel("nothing-runs-here"))
    await engine.quiet()
    [session] = [s for partition in engine.state.partitions.values() for s in partition.sessions.values()]
    assert session.idle
    assert list(engine.state._idle) == [session.id]
    assert all(not partition.pending for partition in engine.state.partitions.values())


# ---- losing a partition


async def test_a_lost_partition_stops_its_turns_and_frees_their_places(engine: Engine) -> None:
    engine.accept(*(inbound(f"s{n}") for n in range(20)))
    starts = await engine.started(20)
    engine.end_fenced(frozenset(range(8)))
    assert sorted(turn for turn, _ in engine.brain.stops) == sorted(start.turn_id for start in starts)
    assert engine.brain.credit == 100
    assert engine.state.scheduler.running == engine.state.scheduler.waiting == 0
    assert engine.state.running == {}
    for start in starts:
        engine.answer(start, "too late")
    await engine.quiet()
    assert engine.ended == []


async def test_a_partition_lost_while_a_step_is_written_confirms_nothing(engine: Engine) -> None:
    engine.accept(inbound())
    [start] = await engine.started(1)
    engine.store.gate = asyncio.Event()
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    await engine.quiet()
    engine.end_fenced(frozenset(range(8)))
    engine.store.gate.set()
    await engine.quiet()
    assert engine.brain.confirms == []
