"""Two tenants side by side, with the same names for everything, share nothing."""

import asyncio

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.router.v1.session_service_pb2 import GetSessionRequest, ListSessionsRequest

from soma_common.client.channel_client import ChannelClient
from soma_common.errors import PermissionDenied, from_rpc_error
from soma_common.ids import SessionName
from tests.e2e.record import Record, answer
from tests.e2e.stack import ECHO, OFFLINE, Stack


async def test_the_same_names_are_different_things(stack: Stack, channel: str) -> None:
    demo, acme = Record(), Record()
    async with (
        stack.adapter(channel, tenant="demo", instance="a", on_delivery=demo.on_delivery) as here,
        stack.adapter(channel, tenant="acme", instance="a", on_delivery=acme.on_delivery) as there,
    ):
        ours, theirs = await asyncio.gather(
            here.send(ECHO, "s", "from demo", idempotency_key="one"),
            there.send(ECHO, "s", "from acme", idempotency_key="one"),
        )
        assert ours.message_id != theirs.message_id
        assert "from demo" in answer(await demo.outcome_of(ours.message_id))
        assert "from acme" in answer(await acme.outcome_of(theirs.message_id))
    demo.check([ours.message_id])
    acme.check([theirs.message_id])


async def test_a_note_stays_with_its_tenant(stack: Stack, channel: str) -> None:
    demo, acme = Record(), Record()
    async with (
        stack.adapter(channel, tenant="demo", on_delivery=demo.on_delivery) as here,
        stack.adapter(channel, tenant="acme", on_delivery=acme.on_delivery) as there,
    ):
        told = await here.send(OFFLINE, "s", "remember that the code is 4711")
        await demo.outcome_of(told.message_id)
        asked = await there.send(OFFLINE, "s", "what did I ask you to remember")
        assert "4711" not in answer(await acme.outcome_of(asked.message_id))


async def test_a_stream_for_another_tenant_is_refused(stack: Stack, channel: str) -> None:
    intruder = ChannelClient(
        stack.gateways[0], token=stack.token("acme"), tenant="demo", channel=channel, instance="intruder"
    )
    with pytest.raises(PermissionDenied):
        await intruder.__aenter__()


async def test_another_tenants_sessions_cannot_be_read(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, tenant="demo", on_delivery=seen.on_delivery) as adapter:
        receipt = await adapter.send(ECHO, "s", "private")
        await seen.outcome_of(receipt.message_id)
    name = str(SessionName("demo", ECHO, channel, "s"))
    async with stack.sessions("acme") as sessions:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await sessions.GetSession(GetSessionRequest(name=name), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as list_refused:
            await sessions.ListSessions(ListSessionsRequest(parent="tenants/demo"), timeout=10)
        own = await sessions.ListSessions(ListSessionsRequest(parent="tenants/acme", page_size=1000), timeout=10)
    for error in (refused, list_refused):
        assert from_rpc_error(error.value).reason == ErrorReason.ERROR_REASON_PERMISSION_DENIED
    assert all(session.key.tenant == "acme" for session in own.sessions)
