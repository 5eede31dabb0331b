"""What a message does that arrives while a turn runs, on the engine in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from google.protobuf.json_format import MessageToDict
from soma.cognition.v1.cognition_service_pb2 import TurnText
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import ModelReply, StepBody, ToolCall, ToolResult, ToolResults
from soma.controlplane.v1.agent_service_pb2 import AgentSpec
from soma.router.v1.inbound_pb2 import Inbound, InboundKind

from services.router.application import state
from services.router.domain.arrival import MAX_INPUTS, Policy
from services.router.domain.turn import Outcome, StepKind
from soma_common import ids
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import inbound
from tests.unit.router.engine import Engine, running_engine


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        yield engine


def message(key: str, policy: Policy = Policy.ENQUEUE) -> Inbound:
    item = inbound(key=key, content=Message(parts=[Part(text=key)]).SerializeToString())
    item.policy = policy.value  # type: ignore[assignment]
    return item


def control(kind: InboundKind.ValueType, key: str = "control", target: bytes = b"") -> Inbound:
    item = inbound(key=key, content=b"")
    item.kind = kind
    item.cancel_turn_id = target
    return item


def keys(*names: str) -> list[bytes]:
    return [inbound(key=name).message_id for name in names]


def texts(contents: list[bytes]) -> list[str]:
    return [Message.FromString(content).parts[0].text for content in contents]


# ---- enqueue


async def test_messages_that_queue_have_a_turn_each(engine: Engine) -> None:
    engine.accept(message("1"), message("2"))
    [first] = await engine.started(1)
    engine.answer(first, "one")
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["2"]


# ---- reject


async def test_a_busy_session_refuses_at_once_and_names_the_turn(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.accept(message("2", Policy.REJECT))
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.REJECTED, keys("2"))
    assert delivery.error.reason == ErrorReason.ERROR_REASON_TURN_RUNNING
    assert delivery.error.metadata["turn"].endswith(f"/turns/{start.turn_id.hex()}")
    assert delivery.position == 1
    engine.answer(start, "one")
    [_, (outcome, delivery)] = await engine.outcomes(2)
    assert (outcome, list(delivery.message_ids), delivery.position) == (Outcome.FINAL, keys("1"), 2)
    assert not any(partition.pending for partition in engine.state.partitions.values())


async def test_an_idle_session_answers_a_message_that_would_be_refused(engine: Engine) -> None:
    engine.accept(message("1", Policy.REJECT))
    [start] = await engine.started(1)
    engine.answer(start, "one")
    [(outcome, _)] = await engine.outcomes(1)
    assert outcome is Outcome.FINAL


@pytest.mark.parametrize("policy", [Policy.REJECT, Policy.STEER, Policy.INTERRUPT])
async def test_the_retry_of_an_answered_message_does_not_make_its_session_busy(engine: Engine, policy: Policy) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.answer(start, "one")
    await engine.outcomes(1)
    engine.accept(message("1"), message("2", policy))
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["2"]
    await engine.quiet()
    assert len(engine.ended) == 1
    assert engine.state.scheduler.running == 1, "the turn that was none is not counted"


async def test_a_message_that_waits_for_a_brain_makes_its_session_busy(engine: Engine) -> None:
    engine.brain.credit = 0
    engine.accept(message("1"), message("2", Policy.REJECT))
    [(outcome, delivery)] = await engine.outcomes(1)
    assert outcome is Outcome.REJECTED
    turn = ids.turn_id(inbound().session_id, keys("1")[0])
    assert delivery.error.metadata["turn"].endswith(turn.hex())


# ---- steer


async def test_a_running_turn_reads_a_message_that_steers_it(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.accept(message("2", Policy.STEER))
    await eventually(lambda: engine.brain.added, what="further inputs")
    [(turn, first, inputs)] = engine.brain.added
    assert (turn, first, texts(inputs)) == (start.turn_id, 1, ["2"])
    assert engine.store.last_inputs[turn] == 2
    engine.propose(start, StepKind.FINAL, 1, answer=Message(parts=[Part(text="both")]), inputs_seen=2)
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.FINAL, keys("1", "2"))


async def test_one_that_joins_while_a_turns_context_is_read_and_is_kept_in_the_store_only_is_read_too(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.answer(start, "one")
    await engine.outcomes(1)
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def context(_tenant: str, _session: bytes, _limit: int) -> list[bytes]:
        reading.set()
        await go_on.wait()
        return []

    monkeypatch.setattr(engine, "context", context)
    monkeypatch.setattr(state, "QUEUED_CONTENT_BYTES", 0)  # others have filled it
    [session] = [session for partition in engine.state.partitions.values() for session in partition.sessions.values()]
    session.forget_context()
    engine.accept(message("2"))
    await asyncio.wait_for(reading.wait(), 10)
    engine.accept(message("3", Policy.STEER))
    await engine.quiet()
    go_on.set()
    [_, second] = await engine.started(2)
    kept, loaded = second.inputs
    assert (texts([kept]), loaded) == (["2"], b"loaded")


async def test_a_final_that_has_not_seen_every_input_is_not_taken(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.accept(message("2", Policy.STEER))
    await eventually(lambda: engine.brain.added, what="further inputs")
    engine.answer(start, "too early")
    await engine.quiet()
    assert engine.ended == []
    engine.propose(start, StepKind.INTERIM_REPLY, 1)
    await eventually(lambda: (start.turn_id, 1, 1) in engine.brain.confirms, what="confirmation")
    engine.propose(start, StepKind.FINAL, 2, answer=Message(parts=[Part(text="both")]), inputs_seen=2)
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.FINAL, keys("1", "2"))


async def test_a_message_that_comes_after_the_final_was_taken_starts_the_next_turn(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.answer(start, "one")  # on its way to the journal when the next message is stored
    engine.accept(message("2", Policy.STEER))
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["2"]
    assert engine.brain.added == []


async def test_a_message_that_steers_waits_behind_one_that_waits(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.accept(message("2"), message("3", Policy.STEER))
    await engine.quiet()
    assert engine.brain.added == []
    engine.answer(start, "one")
    [_, second] = await engine.started(2)
    await eventually(lambda: engine.brain.added or len(second.inputs) == 2, what="the third joins the second")
    engine.propose(second, StepKind.FINAL, 1, answer=Message(parts=[Part(text="x")]), inputs_seen=2)
    [_, (_, delivery)] = await engine.outcomes(2)
    assert list(delivery.message_ids) == keys("2", "3")


async def test_another_brain_is_given_all_inputs(engine: Engine) -> None:
    engine.accept(message("1"))
    await engine.started(1)
    engine.accept(message("2", Policy.STEER))
    await eventually(lambda: engine.brain.added, what="further inputs")
    engine.disconnect(engine.brain)
    other = type(engine.brain)(name="brain-1")
    engine.connect(other)
    [again] = await engine.started(1, other)
    assert texts(list(again.inputs)) == ["1", "2"]
    assert other.added == []


async def test_a_turn_takes_only_so_many_inputs(engine: Engine) -> None:
    engine.accept(message("0"))
    [start] = await engine.started(1)
    engine.accept(*(message(str(n), Policy.STEER) for n in range(1, MAX_INPUTS + 1)))
    await eventually(lambda: sum(len(inputs) for _, _, inputs in engine.brain.added) == MAX_INPUTS - 1, what="inputs")
    engine.propose(start, StepKind.FINAL, 1, answer=Message(parts=[Part(text="x")]), inputs_seen=MAX_INPUTS)
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == [str(MAX_INPUTS)]


# ---- interrupt


async def test_an_interrupting_message_stops_the_turn_and_its_work_is_kept(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    text = TurnText(turn_id=start.turn_id, dispatch=1, step=1, offset=0, text="so far")
    engine.runner.on_texts(engine.brain, [text])
    engine.accept(message("2", Policy.INTERRUPT))
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.INTERRUPTED, keys("1"))
    assert delivery.message.parts[0].text == "so far"
    assert engine.store.stops[start.turn_id] == Outcome.INTERRUPTED
    assert (start.turn_id, 1) in engine.brain.stops
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["2"]
    assert second.context[-1] == delivery.message.SerializeToString()


async def test_everything_that_waits_is_answered_with_an_interrupting_message(engine: Engine) -> None:
    engine.accept(message("1"))
    await engine.started(1)
    engine.accept(message("2"), message("3", Policy.INTERRUPT), message("4"))
    await engine.outcomes(1)
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["2", "3"]
    engine.answer(second, "not both")
    await engine.quiet()
    assert len(engine.ended) == 1
    engine.propose(second, StepKind.FINAL, 1, answer=Message(parts=[Part(text="x")]), inputs_seen=2)
    [*_, third] = await engine.started(3)
    assert texts(list(third.inputs)) == ["4"]


async def test_calls_in_flight_are_closed_before_the_next_turn(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    await eventually(lambda: engine.brain.confirms, what="confirmation")
    engine.tools_away = True
    engine.accept(message("2", Policy.INTERRUPT))
    await eventually(lambda: engine.settled, what="a question to the tools")
    await engine.quiet()
    assert len(engine.brain.starts) == 1, "nothing starts before it has converged"
    engine.tools_away = False
    await engine.outcomes(1)
    assert engine.store.steps[start.turn_id, 2] == b"settled"
    await engine.started(2)


async def test_a_turn_that_cannot_converge_ends_with_outcomes_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_engine() as engine:
        engine.runner._stopper._give_up_s = -4.7
        engine.accept(message("1"))
        [start] = await engine.started(1)
        engine.propose(start, StepKind.MODEL_REPLY, 1)
        await eventually(lambda: engine.brain.confirms, what="confirmation")
        engine.tools_away = True
        engine.accept(message("2", Policy.INTERRUPT))
        await engine.outcomes(1)
        assert engine.store.steps[start.turn_id, 2] == b"unknown"


# ---- rollback


async def test_a_rolled_back_turn_is_answered_anew_with_all_messages(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.accept(message("2"), message("3", Policy.ROLLBACK), message("4"))
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["1", "2", "3"]
    assert second.turn_id != start.turn_id
    assert list(second.context) == []
    assert engine.ended == [], "a dropped turn is not delivered"
    assert engine.undone == [], "it had called nothing"
    engine.propose(second, StepKind.FINAL, 1, answer=Message(parts=[Part(text="x")]), inputs_seen=3)
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids), delivery.position) == (Outcome.FINAL, keys("1", "2", "3"), 1)


def _body(**body: object) -> bytes:
    return StepBody(format=1, **body).SerializeToString()  # type: ignore[arg-type]


@pytest.mark.parametrize("undone", [True, False])
async def test_what_tools_did_decides_whether_work_can_be_dropped(engine: Engine, undone: bool) -> None:
    engine.may_undo = undone
    engine.accept(message("1"))
    [start] = await engine.started(1)
    turn = engine.state.running[start.turn_id]
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    await eventually(lambda: engine.brain.confirms, what="confirmation")
    engine.propose(start, StepKind.TOOL_RESULTS, 2)
    await eventually(lambda: len(engine.brain.confirms) == 2, what="confirmations")
    calls = ModelReply(text="paying", tool_calls=[ToolCall(tool="pay")])
    results = ToolResults(results=[ToolResult(tool="pay")])
    results.results[0].result.string_value = "paid"
    turn.journal[:] = [_body(model_reply=calls), _body(tool_results=results)]
    engine.accept(message("2", Policy.ROLLBACK))
    [_, second] = await engine.started(2)
    assert engine.undone == [start.turn_id]
    assert texts(list(second.inputs)) == (["1", "2"] if undone else ["2"])
    if undone:
        assert engine.ended == []
        return
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.INTERRUPTED, keys("1"))
    assert delivery.message.parts[0].text == "paying"
    assert MessageToDict(delivery.message.parts[1].data) == {
        "tool_calls": [{"tool": "pay", "arguments": {}, "result": "paid"}]
    }


async def test_a_cancel_ends_what_was_to_be_rolled_back(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.propose(start, StepKind.MODEL_REPLY, 1)
    await eventually(lambda: engine.brain.confirms, what="confirmation")
    engine.tools_away = True
    engine.accept(message("2", Policy.ROLLBACK))
    await eventually(lambda: engine.settled, what="a question to the tools")
    engine.accept(control(InboundKind.INBOUND_KIND_CANCEL, target=start.turn_id))
    await engine.quiet()
    engine.tools_away = False
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.CANCELLED, keys("1"))
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["2"]


# ---- accumulate


async def test_messages_gather_also_while_nothing_runs(engine: Engine) -> None:
    engine.directory.spec = AgentSpec(debounce_ms=200, debounce_max_ms=2000)
    engine.accept(message("1", Policy.ACCUMULATE))
    await engine.quiet()
    assert engine.brain.starts == []
    engine.accept(message("2", Policy.ACCUMULATE), message("3", Policy.ACCUMULATE))
    [start] = await engine.started(1)
    assert texts(list(start.inputs)) == ["1", "2", "3"]
    engine.propose(start, StepKind.FINAL, 1, answer=Message(parts=[Part(text="x")]), inputs_seen=3)
    [(_, delivery)] = await engine.outcomes(1)
    assert list(delivery.message_ids) == keys("1", "2", "3")


async def test_a_message_of_another_policy_closes_the_group(engine: Engine) -> None:
    engine.directory.spec = AgentSpec(debounce_ms=600_000, debounce_max_ms=600_000)
    engine.accept(message("1", Policy.ACCUMULATE), message("2", Policy.ACCUMULATE), message("3"))
    [start] = await engine.started(1)
    assert texts(list(start.inputs)) == ["1", "2"]


async def test_nothing_of_a_batch_overtakes_what_waits_in_it(engine: Engine) -> None:
    """The session is known and idle, so that what comes with a message could start a turn in the same group."""
    engine.directory.spec = AgentSpec(debounce_ms=600_000, debounce_max_ms=600_000)
    engine.accept(message("0"))
    [first] = await engine.started(1)
    engine.answer(first, "zero")
    await engine.outcomes(1)
    engine.accept(message("1", Policy.ACCUMULATE), message("2", Policy.ENQUEUE))
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["1"]
    engine.answer(second, "one")
    [_, _, third] = await engine.started(3)
    assert texts(list(third.inputs)) == ["2"]


async def test_a_full_group_is_not_waited_for(engine: Engine) -> None:
    engine.directory.spec = AgentSpec(debounce_ms=600_000, debounce_max_ms=600_000)
    engine.accept(*(message(str(n), Policy.ACCUMULATE) for n in range(MAX_INPUTS)))
    [start] = await engine.started(1)
    assert len(start.inputs) == MAX_INPUTS


async def test_a_group_is_waited_for_no_longer_than_its_bound(engine: Engine) -> None:
    engine.directory.spec = AgentSpec(debounce_ms=200, debounce_max_ms=300)
    sent = 0
    while not engine.brain.starts:
        engine.accept(message(str(sent), Policy.ACCUMULATE))
        sent += 1
        await engine.quiet()
        assert sent < 20, "companions that keep coming put the turn off for ever"
    assert len(engine.brain.starts[0].inputs) <= sent


# ---- pause, resume, interrupt, cancel of a session


async def test_a_paused_session_starts_nothing_until_it_is_resumed(engine: Engine) -> None:
    engine.accept(control(InboundKind.INBOUND_KIND_PAUSE, "p"), message("1"))
    await engine.quiet()
    assert engine.brain.starts == []
    assert engine.store.paused is True
    engine.accept(control(InboundKind.INBOUND_KIND_RESUME, "r"))
    await engine.started(1)
    assert engine.store.paused is False


async def test_what_runs_when_a_session_is_paused_ends(engine: Engine) -> None:
    engine.accept(message("1"))
    [start] = await engine.started(1)
    engine.accept(control(InboundKind.INBOUND_KIND_PAUSE), message("2"))
    await engine.quiet()
    engine.answer(start, "one")
    await engine.outcomes(1)
    await engine.quiet()
    assert len(engine.brain.starts) == 1


async def test_a_cancelled_message_ends_although_its_session_is_paused(engine: Engine) -> None:
    engine.accept(control(InboundKind.INBOUND_KIND_PAUSE, "p"), message("1"), message("2"))
    await engine.quiet()
    turn = ids.turn_id(inbound().session_id, keys("1")[0])
    engine.accept(control(InboundKind.INBOUND_KIND_CANCEL, "c", turn))
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.CANCELLED, keys("1"))


async def test_interrupting_a_session_stops_what_runs(engine: Engine) -> None:
    engine.accept(message("1"), message("2"))
    await engine.started(1)
    engine.accept(control(InboundKind.INBOUND_KIND_INTERRUPT))
    [(outcome, _)] = await engine.outcomes(1)
    assert outcome is Outcome.INTERRUPTED
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["2"]


async def test_cancelling_a_session_ends_all_of_it_in_order(engine: Engine) -> None:
    engine.accept(message("1"), message("2"), message("3", Policy.STEER))
    await engine.started(1)
    engine.accept(control(InboundKind.INBOUND_KIND_CANCEL_ALL), message("4"))
    ended = await engine.outcomes(3)
    assert [outcome for outcome, _ in ended] == [Outcome.CANCELLED] * 3
    assert [list(delivery.message_ids) for _, delivery in ended] == [keys("1"), keys("2"), keys("3")]
    [_, second] = await engine.started(2)
    assert texts(list(second.inputs)) == ["4"]


async def test_a_cancelled_message_ends_although_its_agent_is_held_up(engine: Engine) -> None:
    engine.brain.credit = 0
    engine.accept(message("1"), message("2"))
    await engine.quiet()
    turn = ids.turn_id(inbound().session_id, keys("1")[0])
    engine.accept(control(InboundKind.INBOUND_KIND_CANCEL, "c", turn))
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, list(delivery.message_ids)) == (Outcome.CANCELLED, keys("1"))
    engine.brain.credit = 1
    engine.runner.assign()
    [start] = await engine.started(1)
    assert texts(list(start.inputs)) == ["2"]
