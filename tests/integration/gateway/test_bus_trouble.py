"""The bus dies, freezes or loses answers: order holds, receipts stay true, callers are told what is known."""

import asyncio

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, SendMessageRequest

from services.gateway.adapters.lanes_nats import NatsLanes
from services.gateway.main import main
from soma_common import errors, ids
from soma_common.layout import LaneLayout, LaneMismatch
from soma_common.lifecycle import Lifecycle
from soma_common.nats.connection import connect_nats
from soma_common.nats.lanes import find_layout, stream_name
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually
from tests.integration.gateway.harness import AGENT, CHANNEL, PARTITIONS, TENANT, World, delivery, inbound, message


async def test_killed_and_restarted_in_the_middle_everything_is_stored_once_in_order(world: World) -> None:
    adapter = await world.adapter(await world.gateway())

    async def talk() -> None:
        for ref in range(400):
            await adapter.say(ref)
            await asyncio.sleep(0.002)

    talking = asyncio.create_task(talk())
    await eventually(lambda: len(adapter.receipts) > 50)
    await world.nats_server.kill9()
    await asyncio.sleep(0.3)
    await world.nats_server.restart()
    await talking
    await eventually(lambda: len(adapter.order) == 400, timeout_s=10)
    assert adapter.order == list(range(400))
    assert not adapter.refusals
    stored = [item.message_id for _, item in await world.router.stored()]
    assert stored == [adapter.receipts[ref] for ref in range(400)]


async def test_a_frozen_bus_gives_up_together_and_later_items_do_not_overtake(world: World) -> None:
    target = await world.gateway(publish_attempt_s=0.2, publish_deadline_s=0.7)
    adapter = await world.adapter(target)
    await adapter.say(0)
    await eventually(lambda: adapter.receipts)
    world.nats_server.sigstop()
    try:
        await adapter.say(1)
        await asyncio.sleep(0.1)
        await adapter.say(2, 3)
        await eventually(lambda: len(adapter.refusals) == 3)
    finally:
        world.nats_server.sigcont()
    assert adapter.order == [0, 1, 2, 3]
    for error in adapter.refusals.values():
        assert error.reason == ErrorReason.ERROR_REASON_BUS_UNAVAILABLE
        assert error.retry_delay_ms > 0
    # "Not known" is the truth: the frozen server may have stored the first of them, but none behind it.
    await adapter.say(1)
    await adapter.say(2, 3)
    await eventually(lambda: len(adapter.receipts) == 4)
    ids_in_order = [adapter.receipts[ref] for ref in range(4)]
    stored = [item.message_id for _, item in await world.router.stored()]
    first_seen = list(dict.fromkeys(stored))
    assert first_seen == ids_in_order


async def test_a_lost_answer_is_asked_for_again_under_the_same_id(world: World) -> None:
    target = await world.gateway(publish_attempt_s=0.2, publish_deadline_s=5.0)
    adapter = await world.adapter(target)
    await adapter.say(0)
    await eventually(lambda: adapter.receipts)
    world.nats_server.sigstop()
    await adapter.say(1)
    await asyncio.sleep(0.7)  # several tries wait in the frozen server
    world.nats_server.sigcont()
    await eventually(lambda: len(adapter.receipts) == 2)
    await adapter.say(2)
    await eventually(lambda: len(adapter.receipts) == 3)
    assert [item.message_id for _, item in await world.router.stored()] == [adapter.receipts[ref] for ref in range(3)]


async def test_a_unary_call_is_told_that_the_outcome_is_unknown(world: World) -> None:
    stub = await world.stub(await world.gateway(publish_attempt_s=0.1, publish_deadline_s=0.3))
    await world.nats_server.kill9()
    key = SessionKey(tenant=TENANT, agent=AGENT, channel=CHANNEL, session="s")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SendMessage(SendMessageRequest(session=key, idempotency_key="k", message=message("x")), timeout=10)
    error = errors.from_rpc_error(caught.value)
    assert isinstance(error, errors.Unavailable)
    assert error.reason == ErrorReason.ERROR_REASON_BUS_UNAVAILABLE
    assert error.retry_delay_s


async def test_a_lane_that_is_gone_is_made_again(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    await world.router.nc.jetstream().delete_stream("SOMA_IN_0")
    await adapter.say(1)
    await eventually(lambda: 1 in adapter.receipts)
    assert len(await world.router.stored()) == 1


async def test_a_lane_is_made_again_with_the_form_of_ids_that_it_had(world: World) -> None:
    """Of a database that release 0.1 made: in the other form, a retry would be another message."""
    world.id_form = ids.IDS_ANYWHERE
    adapter = await world.adapter(await world.gateway())
    await adapter.say(1)
    await eventually(lambda: 1 in adapter.receipts)
    js = world.router.nc.jetstream()
    made = (await js.stream_info(stream_name(0))).config.metadata
    await js.delete_stream(stream_name(0))
    await adapter.say(2)
    await eventually(lambda: 2 in adapter.receipts)
    assert (await js.stream_info(stream_name(0))).config.metadata == made
    for ref in (1, 2):
        assert adapter.receipts[ref] == ids.message_id(TENANT, AGENT, CHANNEL, "s", f"k{ref}", ids.IDS_ANYWHERE)


async def test_it_waits_for_the_lanes_of_a_router(world: World) -> None:
    """Only a router knows which form of ids the database has."""
    settings = world.settings(start_patience_s=0.6)
    lifecycle = Lifecycle()
    with pytest.raises(errors.Unavailable, match="a router makes them"):
        await main(lifecycle, settings)
    await lifecycle.stop()
    starting = asyncio.create_task(world.gateway(make_lanes=False))
    await asyncio.sleep(0.2)
    await world.make_lanes(settings)
    adapter = await world.adapter(await starting)
    await adapter.say(1)
    await eventually(lambda: 1 in adapter.receipts)


async def test_it_refuses_to_start_beside_lanes_of_another_layout(nats_server: FaultyNats) -> None:
    nc = await connect_nats(nats_server.url, nats_server.token_file, "test")
    try:
        await NatsLanes(nc, LaneLayout(PARTITIONS, 1), 100).ensure()
        for other in (LaneLayout(PARTITIONS * 2, 1), LaneLayout(PARTITIONS, 1, ids.IDS_ANYWHERE)):
            with pytest.raises(LaneMismatch, match="SOMA_PARTITIONS"):
                await NatsLanes(nc, other, 100).ensure()
        with pytest.raises(LaneMismatch, match="SOMA_PARTITIONS"):
            await find_layout(nc.jetstream(), LaneLayout(PARTITIONS * 2, 1))
    finally:
        await nc.close()


async def test_tenants_do_not_wait_for_each_other(world: World) -> None:
    target = await world.gateway(tenant_queue_items=8, stream_unanswered_items=100)
    demo = await world.adapter(target, "a")
    other = await world.adapter(target, "b", tenant="other")
    world.nats_server.sigstop()
    try:
        await demo.say(*range(50))
        await eventually(lambda: len(demo.refusals) == 42)
        await other.send_many([inbound(ref, key=f"k{ref}") for ref in range(8)])
        await asyncio.sleep(0.1)
        assert not other.refusals
    finally:
        world.nats_server.sigcont()
    await eventually(lambda: len(other.receipts) == 8 and len(demo.receipts) == 8)


async def test_acks_survive_the_bus(world: World) -> None:
    adapter = await world.adapter(await world.gateway())
    gateway, stream = await world.router.stream("a")
    await world.router.hand_over(gateway, stream.stream, delivery(1, "s1"), delivery(2, "s2", 1))
    await eventually(lambda: len(adapter.deliveries) == 2)
    await adapter.send(ConnectRequest(acks=[delivery(1).delivery_id]))
    await eventually(lambda: world.router.acks)
    await world.nats_server.kill9()
    await adapter.send(ConnectRequest(acks=[delivery(2).delivery_id]))
    await asyncio.sleep(0.2)
    await world.nats_server.restart()
    # The one from while the bus was away arrives, and the one before again: nobody knows whether it had.
    first, second = delivery(1).delivery_id, delivery(2).delivery_id
    await eventually(lambda: world.router.acks.count(first) >= 2 and second in world.router.acks)
    await eventually(lambda: world.router.announced[-1][1].streams)
