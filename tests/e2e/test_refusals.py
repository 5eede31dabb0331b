"""What cannot be answered is refused with its reason before the receipt, or has a typed error as its outcome."""

import asyncio
from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error, Message, Role, SessionKey
from soma.common.v1.turn_pb2 import Outcome
from soma.gateway.v1.channel_service_pb2 import (
    ConnectRequest,
    ConnectResponse,
    Hello,
    InboundMessage,
    SendMessageRequest,
)
from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceStub

from soma_common.client.channel_client import text_message
from soma_common.errors import DOMAIN, STATUS_DETAILS_KEY, SomaError, from_proto, from_rpc_error
from soma_common.testing.eventually import eventually
from tests.e2e.record import Record, answer
from tests.e2e.stack import ECHO, WITNESS, Stack
from tests.streams import write

REFUSED: dict[str, tuple[InboundMessage, "ErrorReason.ValueType"]] = {
    "U+0000": (InboundMessage(message=text_message("a\0b")), ErrorReason.ERROR_REASON_CONTENT_INVALID),
    "unknown agent": (InboundMessage(agent="nobody"), ErrorReason.ERROR_REASON_AGENT_NOT_FOUND),
    "no parts": (InboundMessage(message=Message(role=Role.ROLE_USER)), ErrorReason.ERROR_REASON_CONTENT_EMPTY),
    "empty text": (InboundMessage(message=text_message("")), ErrorReason.ERROR_REASON_CONTENT_EMPTY),
    "bad session": (InboundMessage(session="with blank"), ErrorReason.ERROR_REASON_INVALID_REQUEST),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_bad_item_is_refused_and_its_neighbours_are_answered(stack: Stack, channel: str, case: str) -> None:
    bad, reason = REFUSED[case]
    items = [_item("before"), _item("bad", bad), _item("after")]
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        answers: dict[str, bytes | SomaError] = {}
        for item in items:
            adapter.post(item, _note(answers, item.idempotency_key))
        await eventually(lambda: len(answers) == 3, what="three answers")
        before, refused, after = (answers[key] for key in ("before", "bad", "after"))
        assert isinstance(before, bytes)
        assert isinstance(after, bytes)
        await seen.all_answered([before, after])
    assert isinstance(refused, SomaError)
    assert refused.reason == reason
    assert refused.message, "an error says what to change"


async def test_one_poison_item_in_a_frame_of_64(stack: Stack, channel: str) -> None:
    """63 are answered in order, one is refused."""
    seen = Record()
    answers: dict[str, bytes | SomaError] = {}
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        for number in range(64):
            item = _item(f"item {number:02}")
            if number == 31:
                item.message.parts[0].text = "poison\0"
            adapter.post(item, _note(answers, item.idempotency_key))
        await eventually(lambda: len(answers) == 64, what="64 answers")
        refused = answers.pop("item 31")
        accepted = [message_id for message_id in answers.values() if isinstance(message_id, bytes)]
        await seen.all_answered(accepted)
    assert isinstance(refused, SomaError)
    assert refused.reason == ErrorReason.ERROR_REASON_CONTENT_INVALID
    assert len(accepted) == 63
    assert [answer(delivery)[-7:] for delivery in seen.of_session("s")] == sorted(answers)


async def test_a_key_is_mandatory(stack: Stack, channel: str) -> None:
    request = SendMessageRequest(session=_key(channel), message=text_message("hello"))
    assert (await _refusal(stack, request)).reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_MISSING


async def test_content_over_the_bound_is_refused_and_content_at_it_is_answered(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        assert adapter.welcome is not None
        bound = adapter.welcome.max_content_bytes
        with pytest.raises(SomaError) as refused:
            await adapter.send(ECHO, "s", _of_size(bound + 1))
        assert refused.value.reason == ErrorReason.ERROR_REASON_CONTENT_TOO_LARGE
        receipt = await adapter.send(ECHO, "s", _of_size(bound - 1))
        delivery = await seen.outcome_of(receipt.message_id)
    assert delivery.outcome in (Outcome.OUTCOME_FINAL, Outcome.OUTCOME_ERROR), "answered one way or the other"


async def test_an_unknown_tenant_is_refused(stack: Stack, channel: str) -> None:
    """Nobody but an administrator can even ask: a tenant's token is good for its own."""
    request = SendMessageRequest(session=_key(channel), idempotency_key="one", message=text_message("hello"))
    request.session.tenant = "nowhere"
    assert (await _refusal(stack, request)).reason == ErrorReason.ERROR_REASON_PERMISSION_DENIED


async def test_a_refusal_carries_exactly_one_error_info(stack: Stack, channel: str) -> None:
    request = SendMessageRequest(session=_key(channel, "nobody"), idempotency_key="1", message=text_message("hello"))
    async with stack.channels() as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await gateway.SendMessage(request, timeout=10)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    trailers = dict(raised.value.trailing_metadata() or ())
    packed = trailers[STATUS_DETAILS_KEY]
    assert isinstance(packed, bytes)
    infos = [detail for detail in status_pb2.Status.FromString(packed).details if "ErrorInfo" in detail.type_url]
    assert len(infos) == 1
    info = error_details_pb2.ErrorInfo.FromString(infos[0].value)
    assert (info.reason, info.domain) == ("AGENT_NOT_FOUND", DOMAIN)


async def test_a_stream_begins_with_hello(stack: Stack, channel: str) -> None:
    error = await _stream_error(stack, ConnectRequest(messages=[_item("one")]))
    assert error.reason == ErrorReason.ERROR_REASON_PROTOCOL_ORDER


async def test_hello_comes_once(stack: Stack, channel: str) -> None:
    hello = ConnectRequest(hello=Hello(tenant="demo", channel=channel, instance="a", protocol=1))
    error = await _stream_error(stack, hello, hello)
    assert error.reason == ErrorReason.ERROR_REASON_PROTOCOL_ORDER


async def test_a_call_without_a_token_is_refused(stack: Stack, channel: str) -> None:
    request = SendMessageRequest(session=_key(channel), idempotency_key="one", message=text_message("hello"))
    async with grpc.aio.insecure_channel(stack.gateways[0]) as bare:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ChannelServiceStub(bare).SendMessage(request, timeout=10)
    assert from_rpc_error(raised.value).reason == ErrorReason.ERROR_REASON_UNAUTHENTICATED


async def test_an_agent_deleted_after_the_accept_still_gives_an_outcome(stack: Stack, channel: str) -> None:
    """Its running turn goes on with the revision it has; what waits behind it ends with AGENT_GONE."""
    await stack.add_agent("demo", "leaving", "openai/witness-1")
    await stack.agent_is_known("demo", "leaving")
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        running = await adapter.send("leaving", "s", f"slowly: {channel}")
        await eventually(lambda: stack.was_asked(channel), what="the model is asked")
        waiting = await adapter.send("leaving", "s", "second")
        await stack.delete_agent("demo", "leaving")
        await seen.all_answered([running.message_id, waiting.message_id])
        first, second = seen.of_session("s")
        assert answer(first).startswith("word word")
        assert second.outcome == Outcome.OUTCOME_ERROR
        assert second.error.reason == ErrorReason.ERROR_REASON_AGENT_GONE
    request = SendMessageRequest(
        session=_key(channel, "leaving"), idempotency_key="third", message=text_message("third"), no_delivery=True
    )
    assert (await _refusal(stack, request)).reason == ErrorReason.ERROR_REASON_AGENT_NOT_FOUND


async def test_a_failing_model_is_a_typed_error_and_the_session_goes_on(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        refused = await adapter.send(WITNESS, "s", "refuse: hello")
        failed = await seen.outcome_of(refused.message_id)
        again = await adapter.send(WITNESS, "s", "hello again")
        assert "hello again" in answer(await seen.outcome_of(again.message_id))
    assert failed.outcome == Outcome.OUTCOME_ERROR
    assert failed.error.reason == ErrorReason.ERROR_REASON_MODEL_REJECTED
    assert failed.error.message


async def test_a_cancelled_turn_ends_and_the_next_one_runs(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        running = await adapter.send(WITNESS, "s", f"for ever: {channel}")
        await eventually(lambda: stack.was_asked(channel), what="the model is asked")
        await adapter.cancel(WITNESS, "s")
        after = await adapter.send(WITNESS, "s", "next")
        await seen.all_answered([running.message_id, after.message_id])
    cancelled, final = seen.of_session("s")
    assert cancelled.outcome == Outcome.OUTCOME_CANCELLED
    assert "next" in answer(final)


def _item(key: str, given: InboundMessage | None = None) -> InboundMessage:
    """Return a good item, with what is given put over it."""
    item = InboundMessage(agent=ECHO, session="s", idempotency_key=key, message=text_message(key))
    if given is not None and given.HasField("message"):
        item.ClearField("message")
    if given is not None:
        item.MergeFrom(given)
    return item


def _note(answers: dict[str, bytes | SomaError], key: str) -> Callable[[bytes, Error | None], None]:
    def answer_came(message_id: bytes, error: Error | None) -> None:
        answers[key] = message_id if error is None else from_proto(error)

    return answer_came


def _key(channel: str, agent: str = ECHO) -> SessionKey:
    return SessionKey(tenant="demo", agent=agent, channel=channel, session="s")


def _of_size(size: int) -> Message:
    """Return a message of so many bytes, serialized."""
    message = text_message("")
    filling = size - message.ByteSize() - 16
    message.parts[0].text = "x" * filling
    message.parts[0].text += "x" * (size - message.ByteSize())
    assert message.ByteSize() == size
    return message


async def _refusal(stack: Stack, request: SendMessageRequest) -> SomaError:
    async with stack.channels() as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await gateway.SendMessage(request, timeout=10)
    return from_rpc_error(raised.value)


async def _stream_error(stack: Stack, *frames: ConnectRequest) -> SomaError:
    async with stack.channels() as gateway:
        call = gateway.Connect()
        for frame in frames:
            await write(call, frame)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(_read_to_the_end(call), 10)
    return from_rpc_error(raised.value)


async def _read_to_the_end(call: "grpc.aio.StreamStreamCall[ConnectRequest, ConnectResponse]") -> None:
    while isinstance(await call.read(), ConnectResponse):
        pass
