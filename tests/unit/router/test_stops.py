"""Turns that are stopped at awkward moments, on the engine in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from soma.cognition.v1.cognition_service_pb2 import StartTurn
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import ModelReply, StepBody, ToolCall
from soma.router.v1.inbound_pb2 import Inbound, InboundKind

from services.router.application import stop_turns
from services.router.application.group import Group, GroupRejected, GroupResult
from services.router.application.outcomes import EndItem
from services.router.domain.arrival import Policy
from services.router.domain.turn import Outcome, StepKind, TurnStatus
from soma_common import ids
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import inbound
from tests.unit.router.engine import Brain, Engine, running_engine
from tests.unit.router.test_policies import control, keys, message, texts


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        yield engine


async def calling(engine: Engine) -> StartTurn:
    """A turn that was confirmed a tool call, and tools that do not answer."""
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    await eventually(lambda: engine.brain.confirms, what="confirmation")
    engine.tools_away = True
    return start


async def stopped(engine: Engine, start: StartTurn) -> None:
    """Waits until a turn is known to be stopped."""
    turn = engine.state.running[start.turn_id]
    await eventually(lambda: turn.status is TurnStatus.CONVERGING, what="stop")


async def test_a_turn_that_was_stopped_while_it_waited_for_a_brain_is_given_to_none(engine: Engine) -> None:
    start = await calling(engine)
    engine.disconnect(engine.brain)
    await engine.quiet()
    engine.accept(message("2", Policy.INTERRUPT))
    await stopped(engine, start)
    late = Brain(name="brain-1")
    engine.connect(late)
    await engine.quiet()
    assert late.starts == []
    engine.tools_away = False
    [second] = await engine.started(1, late)
    assert texts(list(second.inputs)) == ["2"]


async def test_a_turn_that_was_stopped_while_its_context_was_read_is_not_started(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = await calling(engine)
    engine.disconnect(engine.brain)
    await engine.quiet()
    read = asyncio.Event()

    async def context(*_: object) -> list[bytes]:
        await read.wait()
        return []

    monkeypatch.setattr(engine, "context", context)
    engine.state.running[start.turn_id].session.forget_context()
    late = Brain(name="brain-1")
    engine.connect(late)
    engine.accept(message("2", Policy.INTERRUPT))
    await stopped(engine, start)
    read.set()
    await engine.quiet()
    assert late.starts == []
    engine.tools_away = False
    [second] = await engine.started(1, late)
    assert texts(list(second.inputs)) == ["2"]


async def test_a_turn_that_is_being_ended_stays_what_it_was_when_its_brain_dies(engine: Engine) -> None:
    """Nobody runs it again, and its end is stored as of the dispatch that its journal knows."""
    await calling(engine)
    engine.accept(message("2", Policy.INTERRUPT))
    await eventually(lambda: engine.settled, what="a question to the tools")
    turn = next(turn for turn in engine.state.running.values() if turn.status is TurnStatus.CONVERGING)
    engine.disconnect(engine.brain)
    engine.connect(Brain(name="brain-1"))
    await engine.quiet()
    assert (turn.dispatch, turn.link, turn.strikes) == (1, None, 1)
    engine.tools_away = False
    await eventually(lambda: engine.ended, what="the end of what is interrupted")
    [item] = engine.ended
    assert isinstance(item, EndItem)
    assert (item.turn, item.dispatch) == (turn, 1)


async def test_cancelling_a_session_ends_also_what_a_rollback_is_about_to_give_back(engine: Engine) -> None:
    await calling(engine)
    engine.accept(message("2", Policy.ROLLBACK))
    await eventually(lambda: engine.settled, what="a question to the tools")
    engine.store.gate = asyncio.Event()
    engine.accept(inbound("elsewhere", "other"))  # a group that takes its time: in the next one the two meet
    await asyncio.sleep(0.01)
    engine.accept(control(InboundKind.INBOUND_KIND_CANCEL_ALL))
    engine.tools_away = False
    turn = next(turn for turn in engine.state.running.values() if turn.status is TurnStatus.CONVERGING)
    await eventually(lambda: turn.ending, what="the end of what is rolled back, on its way")
    engine.store.gate.set()
    ended = await engine.outcomes(2)
    assert [(outcome, list(delivery.message_ids)) for outcome, delivery in ended] == [
        (Outcome.CANCELLED, keys("1")),
        (Outcome.CANCELLED, keys("2")),
    ]
    await engine.quiet()
    assert not turn.session.controls, "the control is done with"


class Undoing:
    """A tool gateway that takes back what a turn did, and says so late."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.answer: bool | None = None
        monkeypatch.setattr(stop_turns, "RETRY_S", 0.005)
        monkeypatch.setattr(engine, "undo", self._undo)

    async def _undo(self, *_: object) -> bool:
        self.asked += 1
        if self.answer is None:
            raise ConnectionError("DEADLINE_EXCEEDED")
        return self.answer


async def rolled_back(engine: Engine) -> StartTurn:
    """A turn that called a tool, which has answered, and that is to be rolled back."""
    engine.accept(message("1"))
    [start] = await engine.started(1)
    call = StepBody(format=1, model_reply=ModelReply(tool_calls=[ToolCall(tool="pay")])).SerializeToString()
    engine.propose(start, StepKind.MODEL_REPLY, 1, body=call)
    await eventually(lambda: engine.brain.confirms, what="confirmation")
    engine.accept(message("2", Policy.ROLLBACK))
    return start


@pytest.mark.parametrize("all_undone", [True, False])
async def test_a_turn_does_not_end_while_its_calls_are_being_taken_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, all_undone: bool
) -> None:
    """However long that takes: it would end as if their effects were there."""
    engine.runner._stopper._give_up_s = 0.02 - stop_turns._MARGIN_S
    undoing = Undoing(engine, monkeypatch)
    await rolled_back(engine)
    await eventually(lambda: undoing.asked >= 5, what="questions after the time for calls in flight is over")
    assert (engine.ended, len(engine.brain.starts)) == ([], 1)
    undoing.answer = all_undone
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == (["1", "2"] if all_undone else ["2"])
    assert [outcome for outcome, _ in await engine.outcomes(0 if all_undone else 1)] == (
        [] if all_undone else [Outcome.INTERRUPTED]
    )


async def test_what_was_stopped_long_ago_is_asked_about_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner before may have asked, and calls are being taken back since."""
    engine.runner._stopper._give_up_s = -60.0
    await rolled_back(engine)
    [_, second] = await engine.started(2)
    assert len(engine.undone) == 1
    assert texts(list(second.inputs)) == ["1", "2"]


async def test_a_cancel_ends_the_waiting_for_what_is_taken_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    undoing = Undoing(engine, monkeypatch)
    start = await rolled_back(engine)
    await eventually(lambda: undoing.asked >= 2, what="questions")
    engine.accept(control(InboundKind.INBOUND_KIND_CANCEL, target=start.turn_id))
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.CANCELLED, keys("1"))
    asked = undoing.asked
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["2"]
    await asyncio.sleep(0.05)
    assert undoing.asked <= asked + 1, "nobody asks about a turn that has ended"


async def test_questions_about_what_is_taken_back_become_rarer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    undoing = Undoing(engine, monkeypatch)
    monkeypatch.setattr(stop_turns, "_LONGEST_PAUSE_S", 0.04)
    await rolled_back(engine)
    await eventually(lambda: undoing.asked >= 4, what="questions")
    asked = undoing.asked
    await asyncio.sleep(0.4)
    assert 1 <= undoing.asked - asked <= 11
    undoing.answer = True
    await engine.started(2)


@pytest.mark.parametrize("named", [True, False])
async def test_a_cancel_is_done_with_in_the_transaction_that_ends_its_message(engine: Engine, named: bool) -> None:
    groups: list[tuple[int, int]] = []

    def watch(group: Group) -> None:
        groups.append((len(group.ends), len(group.controls)))

    engine.accept(control(InboundKind.INBOUND_KIND_PAUSE, "p"), message("1"), message("2"))
    await engine.quiet()
    engine.store.refuse = watch
    target = ids.turn_id(inbound().session_id, keys("1")[0]) if named else b""
    engine.accept(control(InboundKind.INBOUND_KIND_CANCEL, "c", target))
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.CANCELLED, keys("1"))
    await engine.quiet()
    assert [written for written in groups if any(written)] == [(1, 1)]
    [waiting] = [position for partition in engine.state.partitions.values() for position in partition.pending]
    assert waiting == 3, "the other message waits, the controls do not"


# ---- turns that would not fit a frame


def large(key: str, policy: Policy) -> Inbound:
    item = inbound(key=key, content=Message(parts=[Part(text=key * (1024 * 1024))]).SerializeToString())
    item.policy = policy.value  # type: ignore[assignment]
    return item


def firsts(contents: list[bytes]) -> list[str]:
    return [text[0] for text in texts(contents)]


async def test_a_turn_takes_no_more_than_fits_a_frame(engine: Engine) -> None:
    engine.accept(control(InboundKind.INBOUND_KIND_PAUSE, "p"))
    engine.accept(*(large(key, Policy.INTERRUPT) for key in "abcdef"))
    engine.accept(control(InboundKind.INBOUND_KIND_RESUME, "r"))
    [start] = await engine.started(1)
    engine.propose(start, StepKind.FINAL, 1, answer=Message(), inputs_seen=3)
    [_, second] = await engine.started(2)
    engine.propose(second, StepKind.FINAL, 1, answer=Message(), inputs_seen=3)
    ended = await engine.outcomes(2)
    assert [list(delivery.message_ids) for _, delivery in ended] == [keys("a", "b", "c"), keys("d", "e", "f")]


async def test_a_turn_that_is_full_of_bytes_is_not_steered(engine: Engine) -> None:
    engine.accept(large("a", Policy.ENQUEUE))
    [start] = await engine.started(1)
    engine.accept(*(large(key, Policy.STEER) for key in "bcdef"))
    await engine.quiet()
    assert [first for _, _, inputs in engine.brain.added for first in firsts(inputs)] == ["b", "c"]
    engine.propose(start, StepKind.FINAL, 1, answer=Message(), inputs_seen=3)
    await engine.started(2)
    [(_, delivery)] = await engine.outcomes(1)
    assert list(delivery.message_ids) == keys("a", "b", "c")


async def test_a_cancel_of_a_turn_that_was_written_apart_from_its_message_is_kept(engine: Engine) -> None:
    engine.accept(message("0"))
    [start] = await engine.started(1)
    engine.answer(start, "zero")
    await engine.outcomes(1)

    def apart(group: Group) -> GroupRejected | None:
        return GroupRejected("not together") if group.turns and group.messages else None

    engine.store.refuse = apart
    target = ids.turn_id(inbound().session_id, keys("1")[0])
    engine.accept(message("1"), control(InboundKind.INBOUND_KIND_CANCEL, "c", target))
    [_, (outcome, delivery)] = await engine.outcomes(2)
    assert (outcome, list(delivery.message_ids)) == (Outcome.CANCELLED, keys("1"))
    _, ahead = engine.brain.starts
    assert set(engine.brain.stops) == {(ahead.turn_id, ahead.dispatch)}


async def test_a_session_stays_in_memory_until_its_controls_are_stored(engine: Engine) -> None:
    """What the store says of it in the same group is what was before them."""
    engine.accept(message("1"))
    [start] = await engine.started(1)
    release, commit = asyncio.Event(), engine.store.commit

    async def slow_for_controls(group: Group) -> GroupResult:
        if group.controls:
            await release.wait()
        return await commit(group)

    engine.store.commit = slow_for_controls  # type: ignore[method-assign]
    engine.accept(control(InboundKind.INBOUND_KIND_PAUSE))
    session = engine.state.running[start.turn_id].session
    await eventually(lambda: session.paused, what="the pause is read")
    assert session.storing == 1
    assert not session.idle
    release.set()
    await eventually(lambda: session.storing == 0, what="the pause is stored")
