"""What comes over the wire and is no proper request: refused with a code, one reason and a word on what to change."""

import signal
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.controlplane.v1.agent_service_pb2 import Agent, UpdateAgentRequest
from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceStub
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, Hello, InboundMessage, SendMessageRequest

from soma_common.client.channel_client import text_message
from soma_common.errors import DOMAIN, STATUS_DETAILS_KEY, from_rpc_error
from soma_common.grpc.channel import open_channel
from tests.e2e.record import Record, answer
from tests.e2e.stack import ECHO, Stack

NOT_UTF8 = {"a broken sequence": b"\xff\xfe", "a lone surrogate": b"\xed\xa0\x80"}


@pytest.mark.parametrize("case", NOT_UTF8)
async def test_text_that_is_no_utf8_is_refused(stack: Stack, channel: str, case: str) -> None:
    """gRPC libraries of other languages send what they are given; here it is put into a serialized request."""
    bad = NOT_UTF8[case]
    message = text_message("#" * len(bad))
    key = SessionKey(tenant="demo", agent=ECHO, channel=channel, session="s")
    request = SendMessageRequest(session=key, idempotency_key="one", message=message).SerializeToString()
    item = InboundMessage(agent=ECHO, session="s", idempotency_key="one", message=message)
    hello = Hello(tenant="demo", channel=channel, instance="a", protocol=1)
    frame = ConnectRequest(messages=[item]).SerializeToString()
    good, broken = b"#" * len(bad), bad
    token = stack.token("demo")
    async with open_channel(stack.gateways[0], token=lambda: token, service="gateway") as raw:
        send: Any = raw.unary_unary("/soma.gateway.v1.ChannelService/SendMessage")
        error = await _failure(send(request.replace(good, broken), timeout=10))
        assert _the_error_info(error).reason == "INVALID_REQUEST"
        assert "UTF-8" in (error.details() or "")
        stream: Any = raw.stream_stream("/soma.gateway.v1.ChannelService/Connect")(timeout=10)
        await stream.write(ConnectRequest(hello=hello).SerializeToString())
        await stream.read()
        await stream.write(frame.replace(good, broken))
        error = await _failure(stream.read())
        assert _the_error_info(error).reason == "INVALID_REQUEST"
    seen = Record()
    async with stack.adapter(channel, gateway=0, on_delivery=seen.on_delivery) as adapter:
        receipt = await adapter.send(ECHO, "s", "goes on")
        assert "goes on" in answer(await seen.outcome_of(receipt.message_id))


async def test_a_wrong_etag_is_refused(stack: Stack) -> None:
    async with open_channel(
        stack.layout.targets("controlplane"), token=lambda: stack.admin_token, service="controlplane"
    ) as raw:
        wrong = Agent(name=f"tenants/demo/agents/{ECHO}", display_name="x", etag="never-given")
        error = await _failure(AgentServiceStub(raw).UpdateAgent(UpdateAgentRequest(agent=wrong), timeout=10))
    assert error.code() is grpc.StatusCode.ABORTED
    info = _the_error_info(error)
    assert (info.reason, info.domain) == ("ETAG_MISMATCH", DOMAIN)
    assert error.details()


UNARY = [
    ("gateway", "/soma.gateway.v1.ChannelService/SendMessage"),
    ("router", "/soma.router.v1.SessionService/GetSession"),
    ("router", "/soma.router.v1.TurnService/CancelTurn"),
    ("toolgw", "/soma.toolgw.v1.ToolService/InvokeTool"),
    ("controlplane", "/soma.controlplane.v1.AgentService/GetAgent"),
]


@pytest.mark.parametrize(("service", "method"), UNARY)
async def test_an_expired_deadline_ends_a_call_in_every_service(stack: Stack, service: str, method: str) -> None:
    """The process is frozen for a moment, so that it cannot answer in time."""
    token = stack.admin_token
    process = stack.supervisor.parts[f"{service}-0"].process
    assert process is not None
    async with open_channel(stack.layout.targets(service).split(",")[0], token=lambda: token, service=service) as raw:
        call: Any = raw.unary_unary(method)
        await _failure(call(b"", timeout=10))  # connects
        process.send(signal.SIGSTOP)
        try:
            error = await _failure(call(b"", timeout=0.2))
        finally:
            process.send(signal.SIGCONT)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert from_rpc_error(error).reason == ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED
        # The next call is served: an empty request is one that breaks the rules.
        error = await _failure(call(b"", timeout=10))
        assert _the_error_info(error).reason == "INVALID_REQUEST"


async def _failure(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def _the_error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    packed = dict(error.trailing_metadata() or ())[STATUS_DETAILS_KEY]
    assert isinstance(packed, bytes)
    [info] = [d for d in status_pb2.Status.FromString(packed).details if "ErrorInfo" in d.type_url]
    return error_details_pb2.ErrorInfo.FromString(info.value)
