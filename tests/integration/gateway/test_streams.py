"""The life of an adapter stream: hello, presence, deliveries, credit, resume, replacement, drain."""

import asyncio

import pytest
from nats.aio.msg import Msg
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import LiveEvent, TextDelta
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, Hello, Nack
from soma.router.v1.inbound_pb2 import InBatch
from soma.router.v1.outbound_pb2 import Presence

from soma_common import errors
from soma_common.testing.eventually import eventually
from tests.integration.gateway.harness import AGENT, CHANNEL, TENANT, Adapter, World, delivery, inbound


def error_of(adapter: Adapter) -> errors.SomaError:
    assert adapter.error is not None
    return errors.from_rpc_error(adapter.error)


async def test_welcome_states_the_bounds(world: World) -> None:
    adapter = await world.adapter(await world.gateway(heartbeat_interval_s=2.0))
    welcome = adapter.frames[0].welcome
    assert welcome.gateway.startswith("gateway-0-")
    assert (welcome.heartbeat_ms, welcome.max_content_bytes, welcome.max_unanswered) == (2000, 262_144, 4096)
    assert welcome.protocol == 1


async def test_a_stream_without_hello_ends_with_protocol_order(world: World) -> None:
    adapter = await world.adapter(await world.gateway(), hello=False)
    await adapter.send(ConnectRequest(messages=[inbound(1)]))
    await eventually(lambda: adapter.ended)
    assert error_of(adapter).reason == ErrorReason.ERROR_REASON_PROTOCOL_ORDER
    assert isinstance(error_of(adapter), errors.FailedPrecondition)


async def test_a_second_hello_ends_with_protocol_order(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    hello = Hello(tenant=TENANT, channel=CHANNEL, instance="a", protocol=1)
    await adapter.send(ConnectRequest(hello=hello))
    await eventually(lambda: adapter.ended)
    assert error_of(adapter).reason == ErrorReason.ERROR_REASON_PROTOCOL_ORDER


@pytest.mark.parametrize(
    ("hello", "token_tenant", "reason"),
    [
        (Hello(tenant=TENANT, channel=CHANNEL, instance="a"), TENANT, ErrorReason.ERROR_REASON_PROTOCOL_VERSION),
        (
            Hello(tenant=TENANT, channel=CHANNEL, instance="a", protocol=1),
            "other",
            ErrorReason.ERROR_REASON_PERMISSION_DENIED,
        ),
        (Hello(tenant=TENANT, channel="Bad", instance="a"), TENANT, ErrorReason.ERROR_REASON_INVALID_REQUEST),
        (
            Hello(tenant="nowhere", channel=CHANNEL, instance="a", protocol=1),
            "nowhere",
            ErrorReason.ERROR_REASON_TENANT_NOT_FOUND,
        ),
    ],
)
async def test_a_wrong_hello_is_refused(
    world: World, hello: Hello, token_tenant: str, reason: ErrorReason.ValueType
) -> None:
    adapter = await world.adapter(await world.gateway(), tenant=token_tenant, hello=False)
    await adapter.send(ConnectRequest(hello=hello))
    await eventually(lambda: adapter.ended)
    assert error_of(adapter).reason == reason


async def test_a_tenant_has_a_bounded_number_of_streams(world: World) -> None:
    target = await world.gateway(tenant_streams=2)
    adapters = [await world.adapter(target, instance) for instance in ("a", "b")]
    refused = await world.adapter(target, "c")
    assert isinstance(error_of(refused), errors.ResourceExhausted)
    assert error_of(refused).metadata == {"bound": "gateway.tenant_streams", "value": "2"}
    replacing = await world.adapter(target, "a")
    assert not replacing.ended, "it takes the place of one"
    await eventually(lambda: adapters[0].ended)
    other = await world.adapter(target, "c", tenant="other")
    assert not other.ended
    await adapters[1].close()

    async def connects() -> bool:
        return not (await world.adapter(target, "c")).ended

    await eventually(connects)


async def test_an_expired_token_ends_the_stream(world: World) -> None:
    adapter = await world.adapter(await world.gateway(), ttl_s=2)
    await eventually(lambda: adapter.ended, timeout_s=4)
    assert isinstance(error_of(adapter), errors.Unauthenticated)


async def test_half_closed_the_stream_ends_well_after_its_receipts(world: World) -> None:
    adapter = await world.adapter(await world.gateway(), credit=0)
    await adapter.say(*range(20))
    await adapter.call.done_writing()
    await eventually(lambda: adapter.ended)
    assert adapter.error is None
    assert len(adapter.receipts) == 20


async def test_presence_names_streams_and_is_empty_after_the_last_left(world: World) -> None:
    target = await world.gateway()
    adapter = await world.adapter(target, "a", credit=16, live=True)
    sender = await world.adapter(target, "only-sends", credit=0)
    gateway, stream = await world.router.stream("a")
    assert (stream.channel, stream.window, stream.live) == (CHANNEL, 16, True)
    assert [s.instance for s in world.router.presence[TENANT, gateway].streams] == ["a"]
    await sender.close()
    await adapter.close()
    await eventually(lambda: not world.router.presence[TENANT, gateway].streams)


async def test_routers_know_of_a_live_stream_before_its_first_message(world: World) -> None:
    target = await world.gateway()
    known: set[str] = set()
    early: list[str] = []

    async def look(message: Msg) -> None:
        if ".presence." in message.subject:
            known.update(stream.instance for stream in Presence.FromString(message.data).streams)
        elif ".in." in message.subject:
            said = [item.session for item in InBatch.FromString(message.data).items]
            early.extend(session for session in said if session not in known)

    await world.router.nc.subscribe("soma.>", cb=look)
    await world.router.nc.flush()
    adapters = [await world.adapter(target, hello=False) for _ in range(20)]
    hellos = [
        Hello(tenant=TENANT, channel=CHANNEL, instance=f"s{number}", protocol=1, credit=1, live=True)
        for number in range(20)
    ]
    # One after the other in no time: most open their streams while the announcement of the first is just out.
    for adapter, hello in zip(adapters, hellos, strict=True):
        await adapter.send(ConnectRequest(hello=hello, messages=[inbound(1, hello.instance)]))
    await eventually(lambda: all(1 in adapter.receipts for adapter in adapters))
    assert len(known) == 20
    assert not early


async def test_deliveries_wait_for_credit_and_acks_reach_the_router(world: World) -> None:
    adapter = await world.adapter(await world.gateway(), credit=2)
    gateway, stream = await world.router.stream("a")
    await world.router.hand_over(gateway, stream.stream, *(delivery(n, f"s{n}") for n in range(1, 5)))
    await eventually(lambda: len(adapter.deliveries) == 2)
    await asyncio.sleep(0.05)
    assert len(adapter.deliveries) == 2
    first = adapter.deliveries[0].delivery_id
    second = adapter.deliveries[1].delivery_id
    await adapter.send(
        ConnectRequest(acks=[first], nacks=[Nack(delivery_id=second, delay_ms=1500, cause="busy")], credit=2)
    )
    await eventually(lambda: len(adapter.deliveries) == 4)
    await eventually(lambda: world.router.acks and world.router.returns)
    assert world.router.acks == [first]
    [back] = world.router.returns
    assert (back.delivery_id, back.delay_ms, back.counts, back.cause) == (second, 1500, True, "busy")


async def test_a_delivery_in_hand_is_not_sent_twice_and_the_latest_router_gets_the_ack(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    other = await world.new_router("router-2")
    gateway, stream = await world.router.stream("a")
    await world.router.hand_over(gateway, stream.stream, delivery(1))
    await eventually(lambda: adapter.deliveries)
    await other.hand_over(gateway, stream.stream, delivery(1))
    await asyncio.sleep(0.1)
    assert len(adapter.deliveries) == 1
    await adapter.send(ConnectRequest(acks=[delivery(1).delivery_id]))
    await eventually(lambda: other.acks)
    assert not world.router.acks
    await world.router.hand_over(gateway, stream.stream, delivery(1))  # its ack was lost: answered, not shown
    await eventually(lambda: world.router.acks)
    assert len(adapter.deliveries) == 1


async def test_a_slow_adapter_costs_bounded_memory(world: World) -> None:
    adapter = await world.adapter(await world.gateway(), credit=8)
    adapter.paused.clear()
    gateway, stream = await world.router.stream("a")
    for start in range(1, 2001, 100):
        await world.router.hand_over(
            gateway, stream.stream, *(delivery(n, f"s{n}", 1) for n in range(start, start + 100))
        )
    await eventually(lambda: len(world.router.returns) == 2000 - 8 - 8 - 64)
    assert not any(back.counts for back in world.router.returns)
    assert all(back.delay_ms for back in world.router.returns)
    adapter.paused.set()


async def test_the_streams_deliveries_go_back_when_it_leaves(world: World) -> None:
    adapter = await world.adapter(await world.gateway(), credit=1)
    gateway, stream = await world.router.stream("a")
    await world.router.hand_over(gateway, stream.stream, delivery(1, "s1"), delivery(2, "s2", 1))
    await eventually(lambda: adapter.deliveries)
    await adapter.close()
    await eventually(lambda: len(world.router.returns) == 2)
    await world.router.hand_over(gateway, stream.stream, delivery(3, "s3", 1))
    await eventually(lambda: len(world.router.returns) == 3)
    assert {back.counts for back in world.router.returns} == {False}


async def test_a_stream_of_another_tenant_gets_nothing(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    gateway, stream = await world.router.stream("a")
    await world.router.hand_over(gateway, stream.stream, delivery(1), tenant="other")
    await eventually(lambda: world.router.returns)
    assert not adapter.deliveries


async def test_what_the_instance_has_processed_is_announced_and_acknowledged(world: World) -> None:
    processed = [delivery(n).delivery_id for n in range(1, 4)]
    no_ids = [b"", b"x" * 1_000_000]  # would make the tenant's announcements too large for the bus
    adapter = await world.adapter(await world.gateway(), processed=[*no_ids, *processed])
    gateway, stream = await world.router.stream("a")
    assert list(stream.processed) == processed
    await world.router.hand_over(gateway, stream.stream, delivery(2))
    await eventually(lambda: world.router.acks == [delivery(2).delivery_id])
    assert not adapter.deliveries


async def test_the_second_stream_of_an_instance_replaces_the_first(world: World) -> None:
    target = await world.gateway()
    first = await world.adapter(target, "a")
    _, old = await world.router.stream("a")
    second = await world.adapter(target, "a")
    await eventually(lambda: first.ended)
    assert isinstance(error_of(first), errors.AlreadyExists)
    await asyncio.sleep(0.1)
    _, new = await world.router.stream("a")
    assert new.stream > old.stream
    assert not second.ended


async def test_live_events_pass_and_are_dropped_when_the_adapter_does_not_read(world: World) -> None:
    target = await world.gateway()
    adapter = await world.adapter(target, "a", live=True)
    deaf = await world.adapter(target, "b", live=False)
    gateway, stream = await world.router.stream("a")
    _, silent = await world.router.stream("b")
    event = LiveEvent(agent=AGENT, session="s", turn_id=b"t" * 16, dispatch=1, step=1, text=TextDelta(text="x" * 9000))
    await world.router.hand_live(gateway, stream.stream, event)
    await world.router.hand_live(gateway, silent.stream, event)
    await eventually(lambda: adapter.live == [event])
    assert not deaf.live
    adapter.paused.clear()
    await world.router.hand_over(gateway, stream.stream, delivery(1))
    for _ in range(2000):
        await world.router.hand_live(gateway, stream.stream, event)
    await world.router.hand_over(gateway, stream.stream, delivery(2, "s2", 1))
    await asyncio.sleep(0.3)
    adapter.paused.set()
    await eventually(lambda: len(adapter.deliveries) == 2)
    assert len(adapter.live) < 1500


async def test_words_of_a_router_that_was_replaced_are_not_shown(world: World) -> None:
    adapter = await world.adapter(await world.gateway(), "a", live=True)
    gateway, stream = await world.router.stream("a")
    words = [
        LiveEvent(agent=AGENT, session="s", turn_id=b"t" * 16, dispatch=dispatch, step=1, text=TextDelta(text=text))
        for dispatch, text in ((1, "he"), (2, "hello"), (1, "llo"), (2, ", you"))
    ]
    await world.router.hand_live(gateway, stream.stream, *words)
    await eventually(lambda: words[-1] in adapter.live)
    assert [event.text.text for event in adapter.live] == ["he", "hello", ", you"]


async def test_heartbeats_go_out_and_a_dead_peer_is_ended(world: World) -> None:
    adapter = await world.adapter(await world.gateway(heartbeat_interval_s=0.3))
    await eventually(lambda: adapter.ended, timeout_s=4)
    assert any(frame.heartbeat for frame in adapter.frames)
    assert isinstance(error_of(adapter), errors.DeadlineExceeded)


async def test_on_shutdown_adapters_are_told_and_presence_ends_empty(world: World) -> None:
    target = await world.gateway()
    adapter = await world.adapter(target)
    gateway, _ = await world.router.stream("a")
    stopping = asyncio.create_task(world.lifecycles[0].stop())
    await eventually(lambda: any(frame.HasField("drain") for frame in adapter.frames))
    await adapter.say(1)
    await eventually(lambda: 1 in adapter.receipts)
    late = await world.adapter(target, "late")
    assert isinstance(error_of(late), errors.Unavailable)
    await eventually(lambda: adapter.ended)
    assert error_of(adapter).reason == ErrorReason.ERROR_REASON_DRAINING
    await stopping
    await eventually(lambda: not world.router.presence[TENANT, gateway].streams)
