"""Tools in a turn: what goes wrong with them is told to the model, and each runs at most once per key."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import turn_pb2
from soma.toolgw.v1 import tool_service_pb2 as toolgw
from structlog.testing import capture_logs

from services.cognition.adapters.tools_grpc import GrpcTools
from services.cognition.application.ports import Invocation
from soma_common.errors import Conflict, NotFound, ResourceExhausted, SomaError, Unavailable
from soma_common.failpoints import arm_failpoints
from soma_common.grpc import service_config
from soma_common.grpc.channel import open_channel
from soma_common.ids import call_key
from soma_common.testing.model_server import CallTools, ModelServer, Say, ToolRequest
from tests.integration.cognition.conftest import RunningBrain, StartBrain
from tests.integration.cognition.counterparts import ScriptedRouter, ToolGateway, answer_with, fail_with
from tests.integration.cognition.test_run_turns import MODEL, answer_of, failure_of
from tests.unit.cognition import stories

KEY = call_key(stories.TURN, 1, 0)
CALL = CallTools(ToolRequest("calculate", {"expression": "17*23"}))


def results_of(router: ScriptedRouter) -> list[turn_pb2.ToolResult]:
    """The results of the turn's first tool step."""
    return list(turn_pb2.StepBody.FromString(router.proposals[1].body).tool_results.results)


async def run(router: ScriptedRouter, model_server: ModelServer, **spec: Any) -> list[turn_pb2.ToolResult]:
    """A turn with one call of `calculate`; its results."""
    model_server.script(CALL, Say("done"))
    await router.start(stories.start("go", **(MODEL | spec)))
    assert answer_of(await router.ending()) == "done"
    return results_of(router)


async def test_the_model_is_told_of_its_agents_tools_only(router: ScriptedRouter, model_server: ModelServer) -> None:
    await run(router, model_server, tools=["calculate", "no_such_tool"])
    offered = [tool["function"] for tool in model_server.calls[0].body["tools"]]
    assert [tool["name"] for tool in offered] == ["calculate"]
    assert offered[0]["parameters"]["required"] == ["expression"]


async def test_a_result_reaches_the_journal_and_the_model(router: ScriptedRouter, model_server: ModelServer) -> None:
    (result,) = await run(router, model_server)
    assert result.result.number_value == 391
    assert result.call_id == "call_1_0"
    assert model_server.calls[1].messages[-1] == {"role": "tool", "tool_call_id": "call_1_0", "content": "391"}


@pytest.mark.parametrize(
    "reason",
    [reasons.ERROR_REASON_TOOL_FAILED, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN, reasons.ERROR_REASON_TOOL_CANCELLED],
)
async def test_a_tools_failure_is_told_to_the_model(
    router: ScriptedRouter,
    model_server: ModelServer,
    tool_gateway: ToolGateway,
    reason: reasons.ErrorReason.ValueType,
) -> None:
    tool_gateway.behaviour = fail_with(reason, "division by zero")
    (result,) = await run(router, model_server)
    assert result.error.reason == reason
    assert model_server.calls[1].last_text == "error: division by zero"


async def test_a_tool_the_agent_may_not_use_is_refused_here(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    (result,) = await run(router, model_server, tools=["current_time"])
    assert result.error.reason == reasons.ERROR_REASON_TOOL_NOT_FOUND
    assert "current_time" in result.error.message
    assert not tool_gateway.asked


async def test_a_gateway_that_is_away_is_asked_again_under_the_same_key(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    tool_gateway.statuses = [*[grpc.StatusCode.UNAVAILABLE] * 4, grpc.StatusCode.RESOURCE_EXHAUSTED]
    (result,) = await run(router, model_server)
    assert result.result.number_value == 391
    assert tool_gateway.asked == {KEY: 6}
    assert tool_gateway.effects == {KEY: 1}


async def test_a_gateway_that_stays_away_is_a_result_too(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    """Nothing can have begun, so the model may be told that, and may call again."""
    model_server.script(CALL, Say("done"))
    router.confirming = False
    await router.start(stories.start("go", step_timeout_ms=1500, **MODEL))
    proposal = await router.proposal()
    await tool_gateway.stop()
    await asyncio.sleep(0.3)  # until the brain has noticed: what it sends before may have arrived
    await router.confirm(proposal)
    router.confirming = True
    await router.confirm(await router.proposal(2))
    assert answer_of(await router.ending()) == "done"
    (result,) = results_of(router)
    assert result.error.reason == reasons.ERROR_REASON_SERVICE_UNAVAILABLE
    assert "could not be called" in result.error.message
    assert not tool_gateway.asked


DRAINING = Unavailable(reasons.ERROR_REASON_DRAINING, "this instance is shutting down")
FULL = ResourceExhausted(reasons.ERROR_REASON_QUEUE_FULL, "this one was not begun")
NO_PLACE_TO_WAIT = ResourceExhausted(
    reasons.ERROR_REASON_QUEUE_FULL, "the call was begun and may be running", {"idempotency_key": KEY}
)
GONE = NotFound(reasons.ERROR_REASON_TOOL_NOT_FOUND, "the agent has no such tool")
CANCELLED = Conflict(reasons.ERROR_REASON_TOOL_CANCELLED, "cancelled before it ran")
BROKEN = grpc.StatusCode.UNAVAILABLE
"""What a call gets whose connection breaks, before or after the tool began."""


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        # Every try is known to have done nothing.
        (DRAINING, DRAINING, reasons.ERROR_REASON_SERVICE_UNAVAILABLE),
        (FULL, FULL, reasons.ERROR_REASON_QUEUE_FULL),
        (DRAINING, GONE, reasons.ERROR_REASON_TOOL_NOT_FOUND),
        # One may have begun the call, whatever is said of the others.
        (BROKEN, BROKEN, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN),
        (BROKEN, DRAINING, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN),
        (DRAINING, BROKEN, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN),
        (BROKEN, FULL, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN),
        (BROKEN, GONE, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN),
        (NO_PLACE_TO_WAIT, FULL, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, FULL, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN),
        (grpc.StatusCode.DEADLINE_EXCEEDED, FULL, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN),
        (grpc.StatusCode.INTERNAL, FULL, reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN),
        # This is said of the key, and so of every try.
        (BROKEN, CANCELLED, reasons.ERROR_REASON_TOOL_CANCELLED),
    ],
    ids=str,
)
async def test_a_tool_could_not_be_called_only_if_no_try_can_have_begun_the_call(
    router: ScriptedRouter,
    model_server: ModelServer,
    tool_gateway: ToolGateway,
    first: grpc.StatusCode | SomaError,
    then: grpc.StatusCode | SomaError,
    told: reasons.ErrorReason.ValueType,
) -> None:
    tool_gateway.statuses = [first, *[then] * 1000]
    (result,) = await run(router, model_server, step_timeout_ms=500)
    assert result.error.reason == told
    assert set(tool_gateway.asked) == {KEY}


async def test_a_gateway_that_dies_with_the_call_leaves_an_unknown_outcome(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    began = asyncio.Event()

    async def hang(_: toolgw.InvokeToolRequest) -> toolgw.InvokeToolResponse:
        began.set()
        await asyncio.sleep(60)
        raise AssertionError("unreachable")

    tool_gateway.behaviour = hang
    model_server.script(CALL, Say("done"))
    await router.start(stories.start("go", step_timeout_ms=1500, **MODEL))
    await began.wait()
    await tool_gateway.stop()
    assert answer_of(await router.ending()) == "done"
    (result,) = results_of(router)
    assert result.error.reason == reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN
    assert tool_gateway.effects == {KEY: 1}


async def test_what_a_brain_before_this_one_may_have_begun_has_an_unknown_outcome(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    tool_gateway.statuses = [DRAINING] * 1000
    model_server.script(Say("done"))
    journal = [stories.reply("calculate", seen=1)]
    await router.start(stories.start("go", journal=journal, dispatch=2, step_timeout_ms=500, **MODEL))
    assert answer_of(await router.ending()) == "done"
    (result,) = turn_pb2.StepBody.FromString(router.proposals[0].body).tool_results.results
    assert result.error.reason == reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN


async def test_a_deadline_that_is_over_before_the_steps_is_no_end(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    tool_gateway.statuses = [grpc.StatusCode.DEADLINE_EXCEEDED] * 2
    (result,) = await run(router, model_server)
    assert result.result.number_value == 391
    assert tool_gateway.asked == {KEY: 3}


async def test_a_call_may_take_as_long_as_its_step(
    start_brain: StartBrain, model_server: ModelServer, tool_gateway: ToolGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than what a call has by default: the gateway's wait is for callers that do not say how long they wait."""
    invoke = {"service": "soma.toolgw.v1.ToolService", "method": "InvokeTool"}
    config = {"methodConfig": [{"name": [invoke], "timeout": "0.3s"}]}
    monkeypatch.setattr(service_config, "load_service_config", lambda _: config)
    answer = tool_gateway.behaviour

    async def answer_late(request: toolgw.InvokeToolRequest) -> toolgw.InvokeToolResponse:
        await asyncio.sleep(1)
        return await answer(request)

    tool_gateway.behaviour = answer_late
    brain = await start_brain()
    async with brain.router() as router:
        (result,) = await run(router, model_server, step_timeout_ms=3_600_000, turn_timeout_ms=3_600_000)
    assert result.result.number_value == 391
    assert tool_gateway.asked == {KEY: 1}
    (left_s,) = tool_gateway.time_left
    assert left_s is not None
    assert 3500 < left_s <= 3600


async def test_a_gateway_that_restarts_is_found_again(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    model_server.script(CALL, Say("done"))
    router.confirming = False
    await router.start(stories.start("go", **MODEL))
    proposal = await router.proposal()
    await tool_gateway.stop()
    await router.confirm(proposal)
    await asyncio.sleep(0.3)
    await tool_gateway.start()
    router.confirming = True
    await router.confirm(await router.proposal(2))
    assert answer_of(await router.ending()) == "done"
    assert tool_gateway.effects == {KEY: 1}


async def test_a_tool_that_does_not_answer_in_time_has_an_unknown_outcome(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    async def hang(_: toolgw.InvokeToolRequest) -> toolgw.InvokeToolResponse:
        await asyncio.sleep(60)
        raise AssertionError("unreachable")

    tool_gateway.behaviour = hang
    (result,) = await run(router, model_server, step_timeout_ms=500)
    assert result.error.reason == reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN
    assert tool_gateway.asked == {KEY: 1}, "what may have run is not tried again"


async def test_tools_of_one_reply_run_at_once(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    together = asyncio.Barrier(3)

    async def meet(_: toolgw.InvokeToolRequest) -> toolgw.InvokeToolResponse:
        await together.wait()
        return toolgw.InvokeToolResponse()

    tool_gateway.behaviour = meet
    model_server.script(CallTools(*[ToolRequest("calculate", {})] * 3), Say("done"))
    await router.start(stories.start("go", **MODEL))
    assert answer_of(await router.ending()) == "done"
    assert [result.index for result in results_of(router)] == [0, 1, 2]
    assert set(tool_gateway.effects) == {call_key(stories.TURN, 1, index) for index in range(3)}


async def test_a_result_that_is_too_large_is_told_as_such(
    start_brain: StartBrain, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    tool_gateway.behaviour = answer_with("x" * 5000)
    brain = await start_brain(max_result_bytes=2000)
    async with brain.router() as router:
        (result,) = await run(router, model_server)
    assert result.error.reason == reasons.ERROR_REASON_CONTENT_TOO_LARGE


def nested(depth: int) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = {"in": value}
    return value


@pytest.mark.parametrize("depth", [10, 25, 28, 30, 31, 32, 33, 34, 60, 200])
async def test_json_nested_too_deep_is_told_and_leaves_a_journal_that_can_be_read(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway, depth: int
) -> None:
    """A parser of protobuf goes 100 messages deep; a journal it cannot read would end the turn on its next brain."""

    async def answer_as_deep(request: toolgw.InvokeToolRequest) -> toolgw.InvokeToolResponse:
        response = toolgw.InvokeToolResponse()
        response.result.struct_value.CopyFrom(request.arguments)
        return response

    tool_gateway.behaviour = answer_as_deep
    model_server.script(CallTools(ToolRequest("calculate", nested(depth))), Say("done"))
    await router.start(stories.start("go", **MODEL))
    assert answer_of(await router.ending()) == "done"
    for proposal in router.proposals:
        turn_pb2.StepBody.FromString(proposal.body)
    (result,) = results_of(router)
    if depth == 10:
        assert result.HasField("result")
    if depth >= 60:
        assert result.error.reason == reasons.ERROR_REASON_TOOL_ARGUMENTS_INVALID


async def test_a_reply_with_too_many_calls_and_a_turn_that_grows_too_large_end(
    start_brain: StartBrain, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    many, large = bytes([1]) * 16, bytes([2]) * 16
    brain = await start_brain(max_turn_bytes=10_000)
    async with brain.router() as router:
        model_server.script(CallTools(*[ToolRequest("calculate", {})] * 33))
        await router.start(stories.start("go", turn_id=many, **MODEL))
        assert failure_of(await router.ending(many)).reason == reasons.ERROR_REASON_MODEL_REJECTED
        tool_gateway.behaviour = answer_with("x" * 4000)
        model_server.rule = lambda _: CALL
        await router.start(stories.start("go", turn_id=large, **MODEL))
        ending = await router.ending(large)
        assert failure_of(ending).reason == reasons.ERROR_REASON_CONTEXT_TOO_LONG
        assert ending.step == 7


async def test_descriptions_are_asked_for_once_and_survive_an_outage(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    model_server.rule = lambda _: Say("hi")
    turns = [i.to_bytes(16, "big") for i in range(50)]
    tool_gateway.list_statuses = [grpc.StatusCode.UNAVAILABLE] * 2
    await router.start(*(stories.start("go", turn_id=turn, **MODEL) for turn in turns))
    for turn in turns:
        assert answer_of(await router.ending(turn)) == "hi"
    assert tool_gateway.lists <= 2 + 4, "two failed tries, then four pages once for all fifty turns"
    await tool_gateway.stop()
    await router.start(stories.start("go", turn_id=b"x" * 16, **MODEL))
    assert answer_of(await router.ending(b"x" * 16)) == "hi"


async def test_a_gateway_that_hangs_is_one_that_does_not_answer(tool_gateway: ToolGateway) -> None:
    """Without a memory that may pass with a retry; with one it is not even noticed, and not waited for each time."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{tool_gateway.port}") as channel:
        tools = GrpcTools(channel, memory_s=0.0)
        tool_gateway.list_statuses = [grpc.StatusCode.DEADLINE_EXCEEDED]
        with pytest.raises(Unavailable):
            await tools.describe("demo")
        known = await tools.describe("demo")
        asked = tool_gateway.lists
        tool_gateway.list_statuses = [grpc.StatusCode.DEADLINE_EXCEEDED] * 10
        for _ in range(5):
            assert await tools.describe("demo") == known
        assert tool_gateway.lists == asked + 1


async def test_where_the_gateway_is_goes_to_the_log_and_not_into_turns() -> None:
    """A turn fails with the error that it was given, and its tenant reads that."""
    call = Invocation(stories.SESSION, "calculate", struct_pb2.Struct(), KEY, stories.TURN, 1)
    async with open_channel("127.0.0.1:1", token=None, service="toolgw") as channel:
        tools = GrpcTools(channel)
        with capture_logs() as logs:
            for ask in (tools.describe("demo"), tools.invoke(call, 5), tools.invoke(call, 5)):
                with pytest.raises(Unavailable) as failed:
                    await ask
                assert failed.value.message == "calling the tool gateway failed (UNAVAILABLE)"
    told = [line["error"] for line in logs if line["event"] == "tool_gateway.no_answer"]
    assert "127.0.0.1:1" in told[0]
    assert len(told) == len(set(told)), "what is said again is not logged again"


async def test_the_step_limit_stops_a_model_that_never_ends(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    model_server.rule = lambda _: CALL
    await router.start(stories.start("go", max_steps=5, **MODEL))
    failed = await router.ending()
    assert failure_of(failed).reason == reasons.ERROR_REASON_STEP_LIMIT
    assert failed.step == 5, "the limit counts the failure too"
    assert sum(tool_gateway.effects.values()) == 2


async def test_the_offline_model_uses_real_tools(router: ScriptedRouter, tool_gateway: ToolGateway) -> None:
    tools = ["calculate", "current_time", "remember_note", "recall_notes"]
    await router.start(stories.start("what is 17*23", model="offline/assistant", tools=tools))
    answer = answer_of(await router.ending())
    assert answer.endswith("17*23 = 391.")
    assert "offline" in answer
    assert tool_gateway.requests[0].tool == "calculate"
    assert dict(tool_gateway.requests[0].arguments) == {"expression": "17*23"}
    assert router.text(stories.TURN, 3) == answer


@pytest.mark.parametrize(
    ("point", "proposals", "effects"),
    [
        ("cognition.before_proposal=raise@2", 1, 1),
        ("cognition.after_confirm_before_tool=raise", 1, 0),
        ("cognition.after_tool_before_result=raise", 1, 1),
        ("cognition.mid_tokens=raise", 0, 0),
    ],
)
async def test_each_failpoint_is_where_its_name_says(
    brain: RunningBrain,
    model_server: ModelServer,
    tool_gateway: ToolGateway,
    point: str,
    proposals: int,
    effects: int,
) -> None:
    """What a crash there would leave behind; the defect itself becomes a typed failure, as any would."""
    model_server.script(CallTools(ToolRequest("calculate", {}), text="one two three four"), Say("done"))
    arm_failpoints(point)
    async with brain.router() as router:
        await router.start(stories.start("go", **MODEL))
        failed = await router.ending()
        assert failure_of(failed).reason == reasons.ERROR_REASON_INTERNAL
        assert len(router.proposals) == proposals + 1
        assert sum(tool_gateway.effects.values()) == effects
