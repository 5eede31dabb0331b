"""The brain against an OpenAI-compatible endpoint over a real socket: what it sends, and how every failure is told."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest
from google.protobuf import struct_pb2
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2
from structlog.testing import capture_logs

from services.cognition.adapters.models.openai_chat import OpenAIChat, open_endpoint
from services.cognition.application.ports import CallOrigin, ModelAnswer, ModelRequest, ToolDescription
from services.cognition.domain.conversation import Conversation
from services.cognition.settings import CognitionSettings
from soma_common.errors import FailedPrecondition, SomaError, to_proto
from soma_common.settings import StartRefused
from soma_common.testing.model_server import (
    CallTools,
    Cut,
    Fail,
    Garbage,
    Hang,
    ModelServer,
    Reply,
    Say,
    ToolRequest,
)
from tests.integration.cognition.conftest import StartBrain
from tests.integration.cognition.test_run_turns import MODEL, answer_of, failure_of
from tests.unit.cognition import stories

CALCULATE = ToolDescription("calculate", "Computes.", {"type": "object", "properties": {"expression": {}}})


def request(**changes: Any) -> ModelRequest:
    fields: dict[str, Any] = {
        "model": "witness-1",
        "instructions": "Be brief.",
        "conversation": Conversation(
            [stories.user("I am Ada").SerializeToString(), stories.assistant("Hello Ada").SerializeToString()],
            [stories.user("what is 17*23?").SerializeToString()],
            [],
        ),
        "tools": [CALCULATE],
        "temperature": None,
        "max_output_tokens": None,
        "max_reply_bytes": 100_000,
        "origin": CallOrigin(stories.TURN, 3, 2, 1, "00-" + "a" * 32 + "-" + "b" * 16 + "-01"),
    }
    return ModelRequest(**(fields | changes))


def client_of(server: ModelServer, key: str | None = None, read_timeout_s: float = 30.0) -> openai.AsyncOpenAI:
    return open_endpoint(server.base_url, key, connect_timeout_s=5.0, read_timeout_s=read_timeout_s, max_connections=8)


async def ask(server: ModelServer, asked: ModelRequest | None = None, **changes: Any) -> tuple[ModelAnswer, list[str]]:
    pieces: list[str] = []
    async with client_of(server, **changes) as client:
        answer = await OpenAIChat(client).answer(asked or request(), pieces.append)
    return answer, pieces


async def test_what_is_sent_is_the_conversation_and_where_it_belongs(model_server: ModelServer) -> None:
    steps = [stories.reply("calculate", text="Let me see."), stories.results(1)]
    steps[0].model_reply.tool_calls[0].arguments["expression"] = "17*23"
    steps[0].model_reply.tool_calls[0].arguments["times"] = 2
    steps[1].tool_results.results[0].result.CopyFrom(struct_pb2.Value(number_value=391))
    conversation = Conversation(
        [stories.user("I am Ada").SerializeToString(), stories.assistant("Hello Ada").SerializeToString()],
        [stories.user("what is 17*23?").SerializeToString()],
        steps,
    )
    await ask(model_server, request(conversation=conversation, temperature=0.5, max_output_tokens=9))
    call = model_server.calls[0]
    arguments = call.body["messages"][4]["tool_calls"][0]["function"].pop("arguments")
    assert arguments == '{"expression":"17*23","times":2}', "the same in every brain, whatever order a Struct has"
    assert call.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "I am Ada"},
        {"role": "assistant", "content": "Hello Ada"},
        {"role": "user", "content": "what is 17*23?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": "c0", "type": "function", "function": {"name": "calculate"}}],
        },
        {"role": "tool", "tool_call_id": "c0", "content": "391"},
    ]
    assert (call.body["model"], call.body["temperature"], call.body["max_completion_tokens"]) == ("witness-1", 0.5, 9)
    assert call.body["stream"] is True
    assert call.body["tools"][0]["function"]["name"] == "calculate"
    assert (call.turn, call.step, call.dispatch) == (stories.TURN.hex(), 3, 2)
    assert call.headers["traceparent"].startswith("00-aaaa")


async def test_inputs_are_sent_where_they_were_read_and_what_was_cut_off_is_told(model_server: ModelServer) -> None:
    cut = stories.assistant("Once upon")
    cut.metadata["interrupted"] = "true"
    steps = [stories.reply("calculate", seen=1), stories.results(1), stories.interim("So far.", seen=2)]
    inputs = [stories.user(text).SerializeToString() for text in ("one", "two", "three")]
    conversation = Conversation([cut.SerializeToString()], inputs, steps)
    await ask(model_server, request(conversation=conversation))
    assert [(message["role"], message["content"]) for message in model_server.calls[0].messages] == [
        ("system", "Be brief."),
        ("assistant", "Once upon\n[interrupted here by the next message]"),
        ("user", "one"),
        ("assistant", None),
        ("tool", "done"),
        ("user", "two"),
        ("assistant", "So far."),
        ("user", "three"),
    ]
    assert "tool_calls" not in model_server.calls[0].messages[6], "an empty list of calls is refused by some"


async def test_an_answer_is_streamed_and_counted(model_server: ModelServer) -> None:
    model_server.script(Say("It is  391,\nI think. \N{GRINNING FACE}"))
    answer, pieces = await ask(model_server)
    assert answer.text == "".join(pieces) == "It is  391,\nI think. \N{GRINNING FACE}"
    assert len(pieces) == 6
    assert (answer.input_tokens, answer.output_tokens, answer.model) == (10, 6, "witness-1")
    assert answer.calls == []


async def test_tool_calls_are_put_together_from_their_pieces(model_server: ModelServer) -> None:
    requests = [ToolRequest("calculate", {"expression": "17*23"}), ToolRequest("calculate", {}, call_id="mine")]
    model_server.script(CallTools(*requests, text="Wait."))
    answer, pieces = await ask(model_server)
    assert [(c.call_id, c.tool, c.arguments) for c in answer.calls] == [
        ("call_1_0", "calculate", {"expression": "17*23"}),
        ("mine", "calculate", {}),
    ]
    assert answer.text == "Wait."
    assert pieces == ["Wait."]


@pytest.mark.parametrize("written", ['{"expression": ', "[1, 2]", "17*23", '{"a": "\\ud800"}'])
async def test_arguments_that_are_no_json_object_are_handed_on_as_such(model_server: ModelServer, written: str) -> None:
    model_server.script(CallTools(ToolRequest("calculate", written)))
    answer, _ = await ask(model_server)
    assert [call.arguments for call in answer.calls] == [None]


async def test_what_cannot_be_stored_is_replaced(model_server: ModelServer) -> None:
    body = 'data: {"choices":[{"delta":{"content":"a\\u0000b"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    model_server.script(Garbage(body.encode()))
    answer, pieces = await ask(model_server)
    assert answer.text == "".join(pieces) == "a\ufffdb"


FAILURES = [
    (Fail(401), reasons.ERROR_REASON_MODEL_UNAUTHENTICATED),
    (Fail(403), reasons.ERROR_REASON_MODEL_UNAUTHENTICATED),
    (Fail(400, "unknown parameter"), reasons.ERROR_REASON_MODEL_REJECTED),
    (Fail(422, "bad"), reasons.ERROR_REASON_MODEL_REJECTED),
    (Fail(404, "no such model"), reasons.ERROR_REASON_MODEL_REJECTED),
    (Fail(400, "too long", code="context_length_exceeded"), reasons.ERROR_REASON_CONTEXT_TOO_LONG),
    (Fail(400, "This model's maximum context length is 8192 tokens"), reasons.ERROR_REASON_CONTEXT_TOO_LONG),
    (Fail(429, "slow down", retry_after_s=7), reasons.ERROR_REASON_MODEL_RATE_LIMITED),
    (Fail(500), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Fail(503), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Cut(words=0), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Cut(words=3), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Hang(), reasons.ERROR_REASON_MODEL_TIMEOUT),
    (Garbage(), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Garbage(b"data: 5\n\n"), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Garbage(b'data: {"choices": 7}\n\n'), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Garbage(b'data: {"choices": [{"delta": {"content": 7}}]}\n\n'), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Garbage(b"<html>hello</html>", "text/html"), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Garbage(b"\xff\xfe\x00"), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (Garbage(b""), reasons.ERROR_REASON_MODEL_UNAVAILABLE),
    (
        Garbage(b'data: {"error": {"message": "overloaded", "code": "server_error"}}\n\n'),
        reasons.ERROR_REASON_MODEL_UNAVAILABLE,
    ),
    (
        Garbage(b'data: {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}\n\n'),
        reasons.ERROR_REASON_MODEL_RATE_LIMITED,
    ),
]


@pytest.mark.parametrize(("reply", "reason"), FAILURES, ids=lambda value: str(value)[:60])
async def test_every_failure_has_its_reason(
    model_server: ModelServer, reply: Reply, reason: reasons.ErrorReason.ValueType
) -> None:
    model_server.script(reply)
    with pytest.raises(SomaError) as failed:
        await ask(model_server, read_timeout_s=0.3)
    assert failed.value.reason == reason
    assert len(model_server.calls) == 1, "the library must not retry by itself"
    if isinstance(reply, Fail) and reply.retry_after_s:
        assert failed.value.retry_delay_s == 7


@pytest.mark.parametrize(
    ("asked_s", "passed_on_s"),
    [("inf", 86_400.0), ("1e300", 86_400.0), ("90000", 86_400.0), ("nan", None), ("-5", 0.0), ("0", 0.0), ("7", 7.0)],
)
async def test_the_wait_an_endpoint_asks_for_is_one_that_an_error_can_hold(
    model_server: ModelServer, asked_s: str, passed_on_s: float | None
) -> None:
    model_server.script(Fail(429, retry_after_s=float(asked_s)))
    with pytest.raises(SomaError) as failed:
        await ask(model_server)
    assert failed.value.reason == reasons.ERROR_REASON_MODEL_RATE_LIMITED
    assert failed.value.retry_delay_s == passed_on_s
    assert to_proto(failed.value).retry_delay_ms == (passed_on_s or 0) * 1000


async def test_an_endpoint_that_falls_silent_in_the_middle_is_a_timeout(model_server: ModelServer) -> None:
    model_server.script(Say("one two three", delay_s=5))
    with pytest.raises(SomaError) as failed:
        await ask(model_server, read_timeout_s=0.2)
    assert failed.value.reason == reasons.ERROR_REASON_MODEL_TIMEOUT


async def test_an_endpoint_that_is_not_there_is_unavailable(model_server: ModelServer) -> None:
    await model_server.stop()
    with pytest.raises(SomaError) as failed:
        await ask(model_server)
    assert failed.value.reason == reasons.ERROR_REASON_MODEL_UNAVAILABLE


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("http://ada:hidden@127.0.0.1:1/v1?key=hidden", "127.0.0.1:1"),
        ("http://[::1]:1/v1", "[::1]:1"),
        ("http://model.invalid/v1", "model.invalid:80"),
        ("https://model.invalid/v1", "model.invalid:443"),
    ],
)
async def test_the_log_says_which_endpoint_is_not_there_and_the_tenant_is_not_told(address: str, endpoint: str) -> None:
    bounds: dict[str, Any] = {"connect_timeout_s": 5.0, "read_timeout_s": 5.0, "max_connections": 8}
    with capture_logs() as logs:
        async with open_endpoint(address, "sk-hidden", **bounds) as client:
            model = OpenAIChat(client)
            with pytest.raises(SomaError) as failed:
                await model.answer(request(), lambda _: None)
            for _ in range(2):
                with pytest.raises(SomaError):
                    await model.answer(request(), lambda _: None)
    told = failed.value.message + str(failed.value.metadata)
    assert "SOMA_OPENAI_BASE_URL" in told
    assert failed.value.metadata == {"cause": "ConnectError"}
    assert "127.0.0.1" not in told
    assert "invalid" not in told
    (line,) = logs  # one for all that fail within seconds
    assert (line["log_level"], line["endpoint"]) == ("warning", endpoint)
    assert line["error"].startswith("ConnectError: ")
    assert "SOMA_OPENAI_BASE_URL" in line["check"]
    assert "hidden" not in str(line) + told


@pytest.mark.parametrize(
    "key", ["sk-hidden\n", "sk-\nhidden", "sk hidden", "sk-hidden\N{LATIN SMALL LETTER E WITH ACUTE}"]
)
def test_a_key_that_no_header_carries_is_refused_and_not_told(key: str) -> None:
    with pytest.raises(StartRefused, match="SOMA_OPENAI_API_KEY") as refused:
        open_endpoint(None, key, connect_timeout_s=5.0, read_timeout_s=5.0, max_connections=8)
    assert "hidden" not in str(refused.value)


async def test_the_key_is_sent_and_never_told() -> None:
    async with ModelServer(api_key="sk-right") as server:
        await ask(server, key="sk-right")
        with pytest.raises(SomaError) as failed:
            await ask(server, key="sk-wrong-secret")
    assert failed.value.reason == reasons.ERROR_REASON_MODEL_UNAUTHENTICATED
    assert "SOMA_OPENAI_API_KEY" in failed.value.message
    assert "sk-wrong" not in str(failed.value)
    assert "sk-" not in repr(CognitionSettings(service_instance="cognition-0", openai_api_key="sk-hidden"))


# --- in a turn ----------------------------------------------------------------------------------------------------


async def test_what_may_pass_is_tried_again_in_the_same_step(
    start_brain: StartBrain, model_server: ModelServer
) -> None:
    brain = await start_brain()
    model_server.script(Fail(503), Fail(429, retry_after_s=0.1), Say("at last"))
    async with brain.router() as router:
        await router.start(stories.start(**MODEL))
        assert answer_of(await router.ending()) == "at last"
    assert model_server.calls_by_step() == {(stories.TURN.hex(), 1, 1): 3}
    assert [call.headers["soma-attempt"] for call in model_server.calls] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("reply", "reason", "calls"),
    [
        (Fail(503), reasons.ERROR_REASON_MODEL_UNAVAILABLE, 3),
        (Fail(401), reasons.ERROR_REASON_MODEL_UNAUTHENTICATED, 1),
        (Fail(429, retry_after_s=3600), reasons.ERROR_REASON_MODEL_RATE_LIMITED, 1),
        (Fail(429, retry_after_s=math.inf), reasons.ERROR_REASON_MODEL_RATE_LIMITED, 1),
        (Cut(words=2), reasons.ERROR_REASON_MODEL_UNAVAILABLE, 1),
        (Hang(), reasons.ERROR_REASON_MODEL_TIMEOUT, 1),
        (Say(""), reasons.ERROR_REASON_MODEL_REJECTED, 1),
        (Say("x" * 3000), reasons.ERROR_REASON_MODEL_REJECTED, 1),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_failing_endpoint_ends_the_turn_and_leaves_the_session_usable(
    start_brain: StartBrain, model_server: ModelServer, reply: Reply, reason: reasons.ErrorReason.ValueType, calls: int
) -> None:
    brain = await start_brain(max_reply_bytes=2000)
    async with brain.router() as router:
        model_server.rule = lambda _: reply
        await router.start(stories.start(step_timeout_ms=2500, **MODEL))
        failed = failure_of(await router.ending())
        assert failed.reason == reason
        assert failed.message
        assert len(model_server.calls) == calls
        model_server.rule = lambda _: Say("fine again")
        next_turn = bytes(16)
        await router.start(stories.start(turn_id=next_turn, **MODEL))
        assert answer_of(await router.ending(next_turn)) == "fine again"


@pytest.mark.parametrize(
    "reply", [Say("word " * 5000), CallTools(ToolRequest("calculate", {"expression": "1" * 9000}))]
)
async def test_a_reply_over_the_bound_is_refused_while_it_comes(model_server: ModelServer, reply: Reply) -> None:
    """An endpoint that does not end costs no more memory than the bound."""
    model_server.rule = lambda _: reply
    pieces: list[str] = []
    async with client_of(model_server) as client:
        with pytest.raises(FailedPrecondition) as refused:
            await OpenAIChat(client).answer(request(max_reply_bytes=2000), pieces.append)
    assert refused.value.reason == reasons.ERROR_REASON_MODEL_REJECTED
    assert sum(map(len, pieces)) <= 2000


async def test_a_slow_model_ends_with_the_limit_that_was_reached(start_brain: StartBrain) -> None:
    brain = await start_brain()
    async with brain.router() as router:
        slow: dict[str, Any] = {"model": "echo/delay-60000-60000"}
        step, turn = bytes([1]) * 16, bytes([2]) * 16
        await router.start(
            stories.start(turn_id=step, step_timeout_ms=100, **slow),
            stories.start(turn_id=turn, turn_timeout_ms=100, **slow),
        )
        assert failure_of(await router.ending(step)).reason == reasons.ERROR_REASON_MODEL_TIMEOUT
        assert failure_of(await router.ending(turn)).reason == reasons.ERROR_REASON_TURN_TIMEOUT


async def test_a_stop_closes_the_connection_to_the_model(start_brain: StartBrain, model_server: ModelServer) -> None:
    brain = await start_brain()
    model_server.script(Say("word " * 1000, delay_s=0.01))
    async with brain.router() as router:
        await router.start(stories.start(**MODEL))
        await router.until(lambda: len(router.texts) > 2)
        await router.stop(stories.TURN, 1)
        await router.until(lambda: not brain.brain.unwinding)
        await asyncio.sleep(0.1)
        assert not model_server.calls[0].completed


@pytest.mark.parametrize(
    ("model", "reason", "words"),
    [
        ("openai/gpt-x", reasons.ERROR_REASON_MODEL_UNAVAILABLE, "SOMA_OPENAI_BASE_URL"),
        ("nobody/knows", reasons.ERROR_REASON_MODEL_REJECTED, "offline/..."),
        ("echo/nonsense", reasons.ERROR_REASON_MODEL_REJECTED, "echo/words-NxMms"),
    ],
)
async def test_a_model_that_is_not_there_fails_at_once_and_says_what_to_do(
    start_brain: StartBrain, model: str, reason: reasons.ErrorReason.ValueType, words: str
) -> None:
    brain = await start_brain(openai_base_url=None)
    async with brain.router() as router:
        await router.start(stories.start(model=model))
        failed = failure_of(await router.ending())
        assert failed.reason == reason
        assert words in failed.message


async def test_arguments_that_cannot_be_read_are_told_to_the_model(
    start_brain: StartBrain, model_server: ModelServer
) -> None:
    brain = await start_brain()
    model_server.script(CallTools(ToolRequest("calculate", '{"expression": ')), Say("sorry"))
    async with brain.router() as router:
        await router.start(stories.start(**MODEL))
        assert answer_of(await router.ending()) == "sorry"
    results = turn_pb2.StepBody.FromString(router.proposals[1].body).tool_results.results
    assert [r.error.reason for r in results] == [reasons.ERROR_REASON_TOOL_ARGUMENTS_INVALID]
    assert "not a JSON object" in model_server.calls[1].last_text


async def test_the_endpoint_serves_plain_answers_and_lists_models_too(model_server: ModelServer) -> None:
    """The witness itself, as other clients use it."""
    async with client_of(model_server) as client:
        models = await client.models.list()
        model_server.script(Say("plain"), CallTools(ToolRequest("calculate", {"expression": "1+1"})))
        messages: Any = [{"role": "user", "content": "hi"}]
        plain = await client.chat.completions.create(model="witness-1", messages=messages)
        called = await client.chat.completions.create(model="witness-1", messages=messages)
    assert [model.id for model in models.data] == ["witness-1"]
    assert plain.choices[0].message.content == "plain"
    assert called.choices[0].finish_reason == "tool_calls"
    assert [call.completed for call in model_server.calls] == [True, True]


async def test_roles_and_files_are_told_as_text(model_server: ModelServer) -> None:
    file = message_pb2.FileReference(uri="https://example.org/a.pdf", media_type="application/pdf", name="a.pdf")
    message = message_pb2.Message(parts=[message_pb2.Part(text="read this"), message_pb2.Part(file=file)])
    conversation = Conversation([], [message.SerializeToString()], [])
    await ask(model_server, request(conversation=conversation, instructions="", tools=[]))
    content = "read this\n[a.pdf (application/pdf): https://example.org/a.pdf]"
    assert model_server.calls[0].messages == [{"role": "user", "content": content}]
    assert "tools" not in model_server.calls[0].body
