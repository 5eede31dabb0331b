"""Streams whose peer has no room for what they send, and answers everything else: each ends when it has to, is answered
with its status, and gives its place and its deliveries back.
"""

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, WindowUpdateFrame
from soma.common.v1.turn_pb2 import Delivery
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, ConnectResponse, Hello

from services.gateway.application import adapter_stream
from services.gateway.application.adapter_stream import GONE_DELAY_MS, UNSENT_DELAY_MS
from services.gateway.domain.delivery_window import SLACK
from soma_common.testing.eventually import eventually
from tests.integration.gateway.harness import CHANNEL, TENANT, World, delivery
from tests.integration.soma_common.h2_peer import Peer, Stream, message, messages, peer, request

CONNECT = "/soma.gateway.v1.ChannelService/Connect"
NO_ROOM = {SettingCodes.INITIAL_WINDOW_SIZE: 0}
OK, DEADLINE_EXCEEDED, ALREADY_EXISTS, UNAVAILABLE, UNAUTHENTICATED = 0, 4, 6, 14, 16
CREDIT = 4
NEVER_S = 3600.0


@pytest.fixture
def all_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends does not end because its time is over."""
    monkeypatch.setattr(adapter_stream, "LAST_FRAMES_S", NEVER_S)


def port_of(target: str) -> int:
    return int(target.rpartition(":")[2])


async def connect(world: World, client: Peer, instance: str = "a", *, ttl_s: float = 3600) -> int:
    """Opens an adapter stream and returns its number on the connection."""
    token = world.identities.token("adapter", TENANT, ["channel"], ttl_s)
    number = await client.open(request(CONNECT, ("authorization", f"Bearer {token}")))
    hello = Hello(tenant=TENANT, channel=CHANNEL, instance=instance, protocol=1, credit=CREDIT)
    await client.write(number, message(ConnectRequest(hello=hello).SerializeToString()))
    return number


async def hand_over(world: World, *deliveries: Delivery, instance: str = "a") -> None:
    gateway, stream = await world.router.stream(instance)
    await world.router.hand_over(gateway, stream.stream, *deliveries)


async def fill(world: World) -> int:
    """Hands over one delivery more than the stream keeps and returns how many those are: all others are there when
    that one comes back.
    """
    kept = CREDIT + SLACK
    await hand_over(world, *(delivery(number, f"s{number}", 1) for number in range(1, kept + 2)))
    await eventually(lambda: len(world.router.returns) == 1)
    return kept


async def all_back(world: World, count: int) -> None:
    """The deliveries that were kept came back as the unsent ones of a stream that has left."""
    await eventually(lambda: len(world.router.returns) == 1 + count)
    assert {back.delay_ms for back in world.router.returns[1:]} == {UNSENT_DELAY_MS}
    assert not any(back.counts for back in world.router.returns)


async def nobody_is_here(world: World) -> None:
    await eventually(lambda: not any(presence.streams for presence in world.router.presence.values()))


def frames(stream: Stream) -> list[ConnectResponse]:
    return [ConnectResponse.FromString(data) for data in messages(bytes(stream.data))]


async def test_the_end_of_its_token_ends_the_call(world: World) -> None:
    target = await world.gateway()
    async with peer(port_of(target), NO_ROOM) as client:
        stream = await client.end_of(await connect(world, client, ttl_s=2))
        assert stream.status == UNAUTHENTICATED
        assert "token" in stream.status_message
        assert "grpc-status-details-bin" in stream.trailers
        assert not stream.data
        await nobody_is_here(world)


async def test_a_peer_that_answers_pings_and_says_nothing_is_ended(world: World) -> None:
    target = await world.gateway(heartbeat_interval_s=0.3)
    async with peer(port_of(target), NO_ROOM) as client:
        stream = await client.end_of(await connect(world, client))
        assert stream.status == DEADLINE_EXCEEDED
        await nobody_is_here(world)


async def test_a_replaced_stream_is_answered_and_its_place_is_free_once_it_has_left(world: World) -> None:
    target = await world.gateway(tenant_streams=1)
    async with peer(port_of(target), NO_ROOM) as client:
        number = await connect(world, client)
        kept = await fill(world)
        second = await world.adapter(target, "a")
        assert not second.ended, "it takes the place of the first"
        stream = await client.end_of(number)
        assert stream.status == ALREADY_EXISTS
        await all_back(world, kept)
        assert not second.ended
        assert (await world.adapter(target, "b")).error is not None
        await second.close()

        async def connects() -> bool:
            return not (await world.adapter(target, "b")).ended

        await eventually(connects)


async def test_a_stream_in_the_middle_of_a_frame_is_reset(world: World) -> None:
    target = await world.gateway()
    room = 2000
    async with peer(port_of(target), NO_ROOM, window_updates=False) as client:
        number = await connect(world, client)
        await client.send(WindowUpdateFrame(number, room))
        await hand_over(world, delivery(1, text="x" * 10 * room))
        await client.until(lambda: len(client.stream(number).data) == room, "a part of the delivery comes")
        assert not (await world.adapter(target, "a")).ended
        assert (await client.end_of(number)).reset == ErrorCodes.CANCEL
        [back] = await eventually(lambda: world.router.returns)
        assert (back.delay_ms, back.counts) == (GONE_DELAY_MS, False), "the adapter may have it"


@pytest.mark.usefixtures("all_patience")
async def test_an_instance_that_connects_again_and_again_has_two_calls(world: World) -> None:
    target = await world.gateway(tenant_streams=1)
    async with peer(port_of(target), NO_ROOM) as client:
        *cut, leaving, newest = [await connect(world, client) for _ in range(50)]
        for number in cut:
            assert (await client.end_of(number)).status == ALREADY_EXISTS
        await client.round_trip()
        assert not client.stream(leaving).over
        assert not client.stream(newest).over
        assert (await world.adapter(target, "b")).error is not None, "they hold a place"

    async def connects() -> bool:
        return not (await world.adapter(target, "b")).ended

    await eventually(connects)


@pytest.mark.usefixtures("all_patience")
async def test_the_servers_stop_ends_a_stream_that_was_ended(world: World) -> None:
    target = await world.gateway(drain_timeout_s=0.1)
    async with peer(port_of(target), NO_ROOM) as client:
        number = await connect(world, client)
        kept = await fill(world)
        await world.lifecycles[0].stop()
        stream = await client.end_of(number)
        assert (stream.status, stream.status_message) == (UNAVAILABLE, "the server is stopping")
        await all_back(world, kept)


async def test_a_half_closed_stream_with_deliveries_ends_when_there_is_room(world: World) -> None:
    target = await world.gateway()
    async with peer(port_of(target), NO_ROOM, window_updates=False) as client:
        number = await connect(world, client)
        kept = await fill(world)
        gateway, _ = await world.router.stream("a")
        await client.send(DataFrame(number, flags=["END_STREAM"]))
        await eventually(lambda: [s.window for s in world.router.presence[TENANT, gateway].streams] == [0])
        await client.send(WindowUpdateFrame(number, 2000))
        stream = await client.end_of(number)
        assert stream.status == OK
        [welcome] = frames(stream)
        assert welcome.HasField("welcome")
        await all_back(world, kept)
        await nobody_is_here(world)


async def test_a_half_closed_peer_that_never_has_room_is_ended(world: World) -> None:
    target = await world.gateway(heartbeat_interval_s=0.3)
    async with peer(port_of(target), NO_ROOM) as client:
        number = await connect(world, client)
        await client.send(DataFrame(number, flags=["END_STREAM"]))
        assert (await client.end_of(number)).status == DEADLINE_EXCEEDED
        await nobody_is_here(world)
