"""From a frame to the lane and back: receipts, refusals, order."""

import asyncio

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import FileReference, Message, Part, Role, SessionKey
from soma.gateway.v1.channel_service_pb2 import (
    Cancel,
    ConnectRequest,
    Hello,
    InboundMessage,
    SendMessageRequest,
    StreamTurnRequest,
)
from soma.router.v1.inbound_pb2 import InboundKind

from soma_common import errors, ids
from soma_common.telemetry.metrics import REGISTRY
from soma_common.testing.eventually import eventually
from tests.integration.gateway.harness import AGENT, CHANNEL, TENANT, World, inbound, message


async def test_receipts_come_in_order_and_name_the_derived_id(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    for start in range(0, 300, 100):
        await adapter.say(*range(start, start + 100))
    await eventually(lambda: len(adapter.receipts) == 300)
    assert adapter.order == list(range(300))
    assert adapter.receipts[7] == ids.message_id(TENANT, AGENT, CHANNEL, "s", "k7")
    stored = await world.router.stored()
    assert [item.message_id for _, item in stored] == [adapter.receipts[ref] for ref in range(300)]
    assert {tenant for tenant, _ in stored} == {TENANT}
    first = stored[0][1]
    assert first.session_id == ids.session_id(TENANT, AGENT, CHANNEL, "s")
    assert first.deliver
    assert Message.FromString(first.content) == message("hi")
    assert first.content_hash == ids.content_hash(first.content)


REFUSED = {
    "unknown agent": (InboundMessage(agent="nobody"), ErrorReason.ERROR_REASON_AGENT_NOT_FOUND),
    "suspended agent": (InboundMessage(agent="paused"), ErrorReason.ERROR_REASON_SUSPENDED),
    "bad session": (InboundMessage(session="a b"), ErrorReason.ERROR_REASON_INVALID_REQUEST),
    "no key": (InboundMessage(idempotency_key=""), ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_MISSING),
    "long key": (InboundMessage(idempotency_key="k" * 257), ErrorReason.ERROR_REASON_INVALID_REQUEST),
    "no content": (InboundMessage(message=Message()), ErrorReason.ERROR_REASON_CONTENT_EMPTY),
    "empty text": (InboundMessage(message=message("")), ErrorReason.ERROR_REASON_CONTENT_EMPTY),
    "U+0000": (InboundMessage(message=message("a\0b")), ErrorReason.ERROR_REASON_CONTENT_INVALID),
    "too large": (InboundMessage(message=message("x" * 262144)), ErrorReason.ERROR_REASON_CONTENT_TOO_LARGE),
    "as assistant": (
        InboundMessage(message=Message(role=Role.ROLE_ASSISTANT, parts=[Part(text="x")])),
        ErrorReason.ERROR_REASON_INVALID_REQUEST,
    ),
    "policy not known": (
        InboundMessage(policy=99),  # type: ignore[arg-type] # a number that no release has
        ErrorReason.ERROR_REASON_INVALID_REQUEST,
    ),
}


async def test_each_bad_item_is_refused_with_its_reason_and_the_stream_goes_on(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    before = _refusals("CONTENT_EMPTY")
    for ref, (bad, _) in enumerate(REFUSED.values(), 1):
        item = inbound(ref)
        for field, value in bad.ListFields():
            item.ClearField(field.name)  # type: ignore[arg-type] # the fields of the same message type
            if field.message_type:
                getattr(item, field.name).CopyFrom(value)
            else:
                setattr(item, field.name, value)
        if bad.HasField("message"):
            item.message.CopyFrom(bad.message)
        if ref == list(REFUSED).index("no key") + 1:
            item.idempotency_key = ""
        await adapter.send(ConnectRequest(messages=[item]))
    await adapter.say(99)
    await eventually(lambda: 99 in adapter.receipts)
    told = {name: adapter.refusals[ref].reason for ref, name in enumerate(REFUSED, 1)}
    assert told == {name: reason for name, (_, reason) in REFUSED.items()}
    assert len(await world.router.stored()) == 1
    assert _refusals("CONTENT_EMPTY") == before + 2


def _refusals(reason: str) -> float:
    return REGISTRY.get_sample_value("soma_gateway_refusals_total", {"reason": reason}) or 0


async def test_items_in_the_frame_of_the_hello_are_refused_one_by_one_too(world: World) -> None:
    """They are items like later ones: what is wrong with them does not end the stream that the hello opens."""
    adapter = await world.adapter(await world.gateway(), hello=False)
    hello = Hello(tenant=TENANT, channel=CHANNEL, instance="a", protocol=1)
    empty = inbound(1)
    empty.message.ClearField("parts")
    odd = inbound(2)
    odd.message.parts.add(file=FileReference(uri=""))
    await adapter.send(ConnectRequest(hello=hello, messages=[empty, odd, inbound(3)]))
    await eventually(lambda: 3 in adapter.receipts)
    assert {ref: error.reason for ref, error in adapter.refusals.items()} == {
        1: ErrorReason.ERROR_REASON_CONTENT_EMPTY,
        2: ErrorReason.ERROR_REASON_INVALID_REQUEST,
    }
    assert not adapter.ended


@pytest.mark.parametrize(
    "case", sorted(REFUSED.keys() - {"bad session"})
)  # a session key is checked as a whole, before
async def test_a_message_by_itself_is_refused_for_the_same_reasons(world: World, case: str) -> None:
    bad, reason = REFUSED[case]
    key = SessionKey(tenant=TENANT, agent=bad.agent or AGENT, channel=CHANNEL, session="s")
    said = bad.message if bad.HasField("message") else message("x")
    idempotency_key = "" if case == "no key" else bad.idempotency_key or "k"
    stub = await world.stub(await world.gateway())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SendMessage(
            SendMessageRequest(session=key, idempotency_key=idempotency_key, message=said, policy=bad.policy)
        )
    assert errors.from_rpc_error(caught.value).reason == reason
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.StreamTurn(
            StreamTurnRequest(session=key, idempotency_key=idempotency_key, message=said, policy=bad.policy)
        ).read()
    assert errors.from_rpc_error(caught.value).reason == reason


async def test_a_message_one_byte_under_the_bound_is_taken(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    around = len(message("x" * 262_000).SerializeToString()) - 262_000
    await adapter.say(1, text="x" * (262_144 - around))
    await adapter.say(2, text="x" * (262_144 - around + 1))
    await eventually(lambda: len(adapter.order) == 2)
    assert set(adapter.receipts) == {1}
    assert set(adapter.refusals) == {2}


async def test_many_large_messages_are_cut_into_batches_the_bus_takes(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    for ref in range(12):
        await adapter.say(ref, text="x" * 200_000)
    await eventually(lambda: len(adapter.receipts) == 12)
    assert adapter.order == list(range(12))


async def test_the_same_key_in_flight_twice_gets_the_same_id(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    await adapter.say(1, key="same")
    await adapter.say(2, key="same")
    await eventually(lambda: len(adapter.receipts) == 2)
    assert adapter.receipts[1] == adapter.receipts[2]


async def test_a_cancel_is_ordered_behind_the_messages_before_it(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    cancel = Cancel(ref=2, agent=AGENT, session="s", idempotency_key="c")
    await adapter.send(ConnectRequest(messages=[inbound(1)], cancels=[cancel]))
    await eventually(lambda: len(adapter.receipts) == 2)
    kinds = [item.kind for _, item in await world.router.stored()]
    assert kinds == [InboundKind.INBOUND_KIND_MESSAGE, InboundKind.INBOUND_KIND_CANCEL]


async def test_over_max_unanswered_items_are_refused_and_acks_are_still_read(world: World) -> None:
    target = await world.gateway(stream_unanswered_items=4)
    adapter = await world.adapter(target)
    world.nats_server.sigstop()
    try:
        await adapter.say(*range(10))
        await eventually(lambda: len(adapter.refusals) == 6)
        assert {error.reason for error in adapter.refusals.values()} == {ErrorReason.ERROR_REASON_QUEUE_FULL}
    finally:
        world.nats_server.sigcont()
    await eventually(lambda: len(adapter.receipts) == 4)
    assert await world.router.sessions() == ["s"] * 4


async def test_a_full_lane_refuses_one_tenant_with_a_retry_delay_and_not_the_other(world: World) -> None:
    target = await world.gateway(tenant_lane_batches=100)
    stub = await world.stub(target)
    key = SessionKey(tenant=TENANT, agent=AGENT, channel=CHANNEL, session="s")
    for number in range(100):
        await stub.SendMessage(SendMessageRequest(session=key, idempotency_key=str(number), message=message("x")))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SendMessage(SendMessageRequest(session=key, idempotency_key="100", message=message("x")))
    error = errors.from_rpc_error(caught.value)
    assert isinstance(error, errors.ResourceExhausted)
    assert error.reason == ErrorReason.ERROR_REASON_QUEUE_FULL
    assert error.retry_delay_s
    assert error.metadata == {"bound": "lane.tenant_batches", "value": "100"}
    other = await world.stub(target, "other")
    key = SessionKey(tenant="other", agent=AGENT, channel=CHANNEL, session="s")
    await other.SendMessage(SendMessageRequest(session=key, idempotency_key="1", message=message("x")))
    assert len(await world.router.stored()) == 101


async def test_send_message_returns_the_names(world: World) -> None:
    stub = await world.stub(await world.gateway())
    key = SessionKey(tenant=TENANT, agent=AGENT, channel=CHANNEL, session="s")
    request = SendMessageRequest(session=key, idempotency_key="k", message=message("x"), no_delivery=True)
    one, two = await asyncio.gather(stub.SendMessage(request), stub.SendMessage(request))
    assert one == two
    message_id = ids.message_id(TENANT, AGENT, CHANNEL, "s", "k")
    assert one.message_id == message_id.hex()
    session = ids.SessionName.parse(one.session_name)
    assert ids.TurnName.parse(one.turn_name).turn_id == ids.turn_id(session.id, message_id)
    assert not any(item.deliver for _, item in await world.router.stored())


@pytest.mark.parametrize(
    ("tenant", "agent", "reason"),
    [
        ("asleep", AGENT, ErrorReason.ERROR_REASON_SUSPENDED),
        ("nowhere", AGENT, ErrorReason.ERROR_REASON_TENANT_NOT_FOUND),
        ("demo", "nobody", ErrorReason.ERROR_REASON_AGENT_NOT_FOUND),
    ],
)
async def test_unary_refusals_are_typed(world: World, tenant: str, agent: str, reason: ErrorReason.ValueType) -> None:
    stub = await world.stub(await world.gateway(), tenant)
    key = SessionKey(tenant=tenant, agent=agent, channel=CHANNEL, session="s")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SendMessage(SendMessageRequest(session=key, idempotency_key="k", message=message("x")))
    assert errors.from_rpc_error(caught.value).reason == reason
