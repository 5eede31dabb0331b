"""A tenant tries everything that the contracts offer to reach another one. Its token has every right, in its tenant.

Every method of every service is tried: a new one is in the list by itself.
"""

from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from soma.common.v1 import authz_pb2
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.controlplane.v1.tenant_service_pb2 import GetTenantRequest
from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceStub
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, Hello, Nack, SendMessageRequest
from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceStub
from soma.router.v1.session_service_pb2 import ListSessionsRequest
from soma.router.v1.turn_service_pb2 import GetTurnRequest, WatchTurnRequest
from soma.toolgw.v1.tool_service_pb2 import InvokeToolRequest
from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceStub

from soma_common import ids
from soma_common.authz.tokens import load_signing_key, sign_token
from soma_common.client.channel_client import text_message
from soma_common.errors import from_rpc_error
from soma_common.grpc.channel import open_channel
from soma_common.ids import SessionName, TurnName
from soma_common.testing.eventually import eventually
from tests.contract.test_method_rules import METHODS
from tests.e2e.record import Record, answer
from tests.e2e.stack import ECHO, Stack
from tests.streams import write

VICTIM, STRANGER = "demo", "acme"


def _rule(method: MethodDescriptor) -> authz_pb2.AuthzRule:
    rule: authz_pb2.AuthzRule = method.GetOptions().Extensions[authz_pb2.authz]
    return rule


@pytest.mark.parametrize("role", ["admin", "service", "channel"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_no_method_serves_another_tenant(stack: Stack, method: MethodDescriptor, role: str) -> None:
    request = GetMessageClass(method.input_type)()
    _name_tenant(request, _rule(method).tenant_field, VICTIM)
    error = await _called(stack, method, request, role)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert from_rpc_error(error).reason == ErrorReason.ERROR_REASON_PERMISSION_DENIED


@pytest.mark.parametrize("method", [m for m in METHODS if _rule(m).tenant_field], ids=lambda method: method.full_name)
@pytest.mark.parametrize("tenant", ["*", "", "acme,demo", "acme/../demo", "ACME", "tenants/acme\0"])
async def test_what_names_no_tenant_is_nobodys(stack: Stack, method: MethodDescriptor, tenant: str) -> None:
    """Not even an administrator of the platform gets further with it."""
    request = GetMessageClass(method.input_type)()
    _name_tenant(request, _rule(method).tenant_field, tenant)
    error = await _called(stack, method, request, "admin", token_tenant="*")
    expected = {grpc.StatusCode.INVALID_ARGUMENT}
    if tenant == "acme/../demo":  # as a resource name, it is one of acme's that does not exist
        expected |= {grpc.StatusCode.NOT_FOUND}
    assert error.code() in expected


async def test_a_name_of_ones_own_tenant_never_reads_anothers_turn(stack: Stack, channel: str) -> None:
    """The ids of demo's session and turn in names that say acme."""
    turn, session = await _a_private_turn(stack, channel)
    mine = SessionName(STRANGER, session.agent, session.channel, session.session)
    async with stack.turns(STRANGER) as turns:
        for name in (TurnName(mine, turn), TurnName(mine, ids.turn_id(session.id, turn))):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await turns.GetTurn(GetTurnRequest(name=str(name)), timeout=10)
            assert from_rpc_error(refused.value).reason == ErrorReason.ERROR_REASON_TURN_NOT_FOUND
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await turns.WatchTurn(WatchTurnRequest(name=str(name)), timeout=10).read()
            assert from_rpc_error(refused.value).reason == ErrorReason.ERROR_REASON_TURN_NOT_FOUND


async def test_a_page_token_of_another_tenant_opens_nothing(stack: Stack, channel: str) -> None:
    for session in ("a", "b"):
        await _a_private_turn(stack, channel, session)
    parent = f"tenants/{VICTIM}/agents/{ECHO}/channels/{channel}"
    async with stack.sessions(VICTIM) as sessions:
        page = await sessions.ListSessions(ListSessionsRequest(parent=parent, page_size=1), timeout=10)
    assert page.next_page_token
    request = ListSessionsRequest(parent=f"tenants/{STRANGER}", page_size=1, page_token=page.next_page_token)
    async with stack.sessions(STRANGER) as sessions:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await sessions.ListSessions(request, timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_deliveries_are_acknowledged_by_their_own_tenant_only(stack: Stack, channel: str) -> None:
    """A stranger guesses the delivery's id, and says in every way it has that it was processed, before and after."""
    session = SessionName(VICTIM, ECHO, channel, "s")
    guessed = ids.turn_id(session.id, ids.message_id(VICTIM, ECHO, channel, "s", "key"))
    hello = Hello(tenant=STRANGER, channel=channel, instance="a", credit=10, protocol=1, processed=[guessed])
    async with open_channel(",".join(stack.gateways), token=lambda: stack.token(STRANGER), service="gateway") as raw:
        stranger = ChannelServiceStub(raw).Connect()
        await stranger.write(ConnectRequest(hello=hello))
        await stranger.read()
        async with stack.channels(VICTIM) as gateway:
            key = SessionKey(tenant=VICTIM, agent=ECHO, channel=channel, session="s")
            await gateway.SendMessage(
                SendMessageRequest(session=key, idempotency_key="key", message=text_message("private")), timeout=10
            )
        async with stack.turns(VICTIM) as turns:
            name = str(TurnName(session, guessed))
            await eventually(lambda: _has_ended(turns, name), 15, "the turn ends")
        await stranger.write(ConnectRequest(acks=[guessed], nacks=[Nack(delivery_id=guessed, delay_ms=86_400_000)]))
        seen = Record()
        async with stack.adapter(channel, instance="a", on_delivery=seen.on_delivery):
            delivery = await eventually(lambda: seen.of_session("s"), 15, "the delivery reaches its own tenant")
        stranger.cancel()
    assert delivery[0].delivery_id == guessed
    assert "private" in answer(delivery[0])


async def test_keys_of_tool_calls_are_the_tenants_own(stack: Stack, channel: str) -> None:
    """The same key in two tenants is two calls, and what one remembers the other does not recall."""
    results = []
    for tenant, tool, arguments in (
        (VICTIM, "remember_note", {"note": "the code is 4711"}),
        (STRANGER, "recall_notes", {}),
        (VICTIM, "recall_notes", {}),
    ):
        request = InvokeToolRequest(
            session=SessionKey(tenant=tenant, agent="offline", channel=channel, session="s"),
            tool=tool,
            idempotency_key=f"key-{channel}-{tool}",
        )
        request.arguments.update(arguments)
        token = _token(stack, tenant, "service")
        async with open_channel(stack.layout.targets("toolgw"), token=lambda: token, service="toolgw") as raw:  # noqa: B023
            response = await ToolServiceStub(raw).InvokeTool(request, timeout=10)
        assert not response.replayed
        results.append(str(response.result))
    assert "4711" not in results[1]
    assert "4711" in results[2]


async def test_a_tenants_token_reads_its_own_tenant(stack: Stack) -> None:
    """What the tests above refuse is refused because of the tenant, not because nothing works."""
    token = _token(stack, STRANGER, "admin")
    async with open_channel(stack.layout.targets("controlplane"), token=lambda: token, service="controlplane") as raw:
        name = f"tenants/{STRANGER}"
        assert (await TenantServiceStub(raw).GetTenant(GetTenantRequest(name=name), timeout=10)).tenant.name == name


async def _a_private_turn(stack: Stack, channel: str, session: str = "s") -> tuple[bytes, SessionName]:
    seen = Record()
    async with stack.adapter(channel, tenant=VICTIM, on_delivery=seen.on_delivery) as adapter:
        receipt = await adapter.send(ECHO, session, "private")
        delivery = await seen.outcome_of(receipt.message_id)
    return delivery.turn_id, SessionName(VICTIM, ECHO, channel, session)


async def _has_ended(turns: Any, name: str) -> bool:
    try:
        return bool((await turns.GetTurn(GetTurnRequest(name=name), timeout=10)).turn.outcome)
    except grpc.aio.AioRpcError:
        return False


def _name_tenant(request: Message, field: str, tenant: str) -> None:
    """Put the tenant where the method's rule looks for it, as a resource name where names are used."""
    if not field:
        return
    *parents, leaf = field.split(".")
    for parent in parents:
        getattr(request, parent).SetInParent()
        request = getattr(request, parent)
    setattr(request, leaf, tenant if leaf == "tenant" else f"tenants/{tenant}")


def _token(stack: Stack, tenant: str, role: str) -> str:
    key = load_signing_key(stack.auth.home.auth / "signing.key")
    return sign_token(key, "stranger", tenant, [role], ttl_s=600)


async def _called(
    stack: Stack, method: MethodDescriptor, request: Message, role: str, token_tenant: str = STRANGER
) -> grpc.aio.AioRpcError:
    """Call any method of any service and return the error it ends in."""
    service = method.full_name.split(".")[1]
    path = f"/{method.containing_service.full_name}/{method.name}"
    token = _token(stack, token_tenant, role)
    target = stack.layout.targets(service).split(",")[0]
    async with open_channel(target, token=lambda: token, service=service) as channel:
        data = request.SerializeToString()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await _first_answer(channel, path, method, data)
    return raised.value


async def _first_answer(channel: grpc.aio.Channel, path: str, method: MethodDescriptor, data: bytes) -> None:
    call: Any
    if method.client_streaming:
        call = channel.stream_stream(path)(timeout=10)
        await write(call, data)
        await call.read()
    elif method.server_streaming:
        call = channel.unary_stream(path)
        await call(data, timeout=10).read()
    else:
        call = channel.unary_unary(path)
        await call(data, timeout=10)
