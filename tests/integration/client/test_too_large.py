"""What no gateway can take stops nothing: too large an item is refused by the kit, and no frame is too large."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery
from soma.gateway.v1.channel_service_pb2 import Cancel, ConnectRequest, InboundMessage
from structlog.testing import capture_logs

from soma_common import errors
from soma_common.client import ChannelClient
from soma_common.client.channel_client import MAX_CONTENT_BYTES, text_message
from soma_common.testing.eventually import eventually
from tests.integration.client.scripted import MAX_MESSAGE_BYTES, adapter, receipts, scripted_gateway, welcome
from tests.integration.client.test_channel_client import client
from tests.integration.gateway.harness import AGENT, World

TOO_LARGE = ErrorReason.ERROR_REASON_CONTENT_TOO_LARGE
FAR_TOO_LARGE = "x" * (MAX_MESSAGE_BYTES + 1)

Frames = AsyncIterator[ConnectRequest]


def of_size(size: int) -> str:
    """A text whose message is stored in so many bytes."""
    text = "x" * (size - 16)
    text += "x" * (size - text_message(text).ByteSize())
    assert text_message(text).ByteSize() == size
    return text


async def serve(frames: Frames, context: Any) -> None:
    await context.write(welcome())
    async for frame in frames:
        await context.write(receipts(frame))


async def refuse_first_frame(frames: Frames, context: Any) -> None:
    """As a gateway does to which a frame is too large: it ends the stream."""
    await anext(frames)
    await context.write(welcome())
    await anext(frames)
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max")


async def refused(c: ChannelClient, field: str) -> errors.SomaError:
    item = InboundMessage(agent="a", session="s", idempotency_key="k", message=text_message("x"))
    if field == "message":
        item.message.CopyFrom(text_message(FAR_TOO_LARGE))
    else:
        setattr(item, field, FAR_TOO_LARGE)
    with pytest.raises(errors.InvalidRequest) as caught:
        c.post(item, lambda *_: None)
    return caught.value


async def test_an_item_beyond_the_transport_is_refused_and_what_follows_goes() -> None:
    async with scripted_gateway(serve) as target, adapter(target) as c, asyncio.timeout(20):
        assert (await refused(c, "message")).reason == TOO_LARGE
        for field in ("session", "idempotency_key", "traceparent"):
            assert (await refused(c, field)).reason == ErrorReason.ERROR_REASON_INVALID_REQUEST
        with pytest.raises(errors.InvalidRequest):
            c.post(Cancel(agent="a", session=FAR_TOO_LARGE), lambda *_: None)
        with pytest.raises(errors.InvalidRequest) as caught:
            await c.send("a", "s", FAR_TOO_LARGE)
        assert caught.value.reason == TOO_LARGE
        assert caught.value.metadata == {"max_content_bytes": str(256 * 1024)}
        assert c.unanswered == 0
        await c.send("a", "s", "small")
        assert c.streams == 1


async def test_content_at_the_bound_goes_and_above_it_does_not(world: World) -> None:
    async with client(world, await world.gateway()) as c:
        assert c.welcome is not None
        bound = c.welcome.max_content_bytes
        at_bound = text_message(of_size(bound))
        at_bound.ClearField("role")  # the gateway sets it, and counts it
        await c.send(AGENT, "s", at_bound)
        with pytest.raises(errors.InvalidRequest) as caught:
            await c.send(AGENT, "s", of_size(bound + 1))
        assert caught.value.reason == TOO_LARGE


async def test_before_the_first_welcome_the_bound_is_a_fixed_one_and_a_lost_stream_keeps_the_last() -> None:
    may_welcome = asyncio.Event()
    streams = 0

    async def connect(frames: Frames, context: Any) -> None:
        nonlocal streams
        streams += 1
        if streams == 2:
            await asyncio.Event().wait()
        await may_welcome.wait()
        await anext(frames)
        await context.write(welcome(max_content_bytes=2000))
        await context.write(receipts(await anext(frames)))

    answers: list[Error | None] = []

    def post(c: ChannelClient, size: int) -> None:
        item = InboundMessage(agent="a", session="s", idempotency_key="k", message=text_message(of_size(size)))
        c.post(item, lambda _, error: answers.append(error))

    async with scripted_gateway(connect) as target:
        c = adapter(target)
        entering = asyncio.create_task(c.__aenter__())
        await eventually(lambda: streams == 1)
        with pytest.raises(errors.InvalidRequest):
            post(c, MAX_CONTENT_BYTES + 1)
        post(c, MAX_CONTENT_BYTES)
        may_welcome.set()
        await entering
        await eventually(lambda: answers == [None], timeout_s=10)
        await eventually(lambda: streams == 2)
        assert c.welcome is None
        with pytest.raises(errors.InvalidRequest):
            post(c, 2001)
        post(c, 2000)
        await c.close(timeout_s=0)


async def test_no_frame_is_too_large_however_many_deliveries_go_back() -> None:
    """Together they are more than a message of the transport holds."""
    nacks: list[bytes] = []
    acks: list[bytes] = []

    async def connect(frames: Frames, context: Any) -> None:
        await context.write(welcome())
        async for frame in frames:
            assert frame.ByteSize() < 4 * 1024 * 1024
            nacks.extend(nack.delivery_id for nack in frame.nacks)
            acks.extend(frame.acks)
            await context.write(receipts(frame))

    deliveries = [Delivery(delivery_id=number.to_bytes(16), session=str(number)) for number in range(20_000)]
    async with scripted_gateway(connect) as target, adapter(target) as c:
        for number, delivery in enumerate(deliveries):
            if number % 4:
                await c.ack(delivery)
            else:
                await c.nack(delivery, cause="\U0001f511" * 1024)
        await c.send("a", "s", "x")
        await eventually(lambda: len(nacks) + len(acks) == len(deliveries))
        assert nacks == [delivery.delivery_id for delivery in deliveries[::4]]
        assert acks == [d.delivery_id for number, d in enumerate(deliveries) if number % 4]
        assert c.streams == 1


async def test_streams_that_answer_nothing_are_opened_ever_more_slowly() -> None:
    """A welcome alone is no reason to come back at once: the gateway may be unable to take what comes first."""
    with capture_logs() as logs:
        async with scripted_gateway(refuse_first_frame) as target, adapter(target) as c:
            c.post(InboundMessage(agent="a", session="s", message=text_message("x")), lambda *_: None)
            await eventually(lambda: c.streams == 5, timeout_s=10)
            await c.close(timeout_s=0)
    waits = [line["backoff_s"] for line in logs if line["event"] == "channel_client.stream_lost"]
    assert waits[:4] == [0.05, 0.1, 0.2, 0.4]


async def test_streams_that_answer_are_opened_again_at_once() -> None:
    async def answer_one(frames: Frames, context: Any) -> None:
        await anext(frames)
        await context.write(welcome())
        await context.write(receipts(await anext(frames)))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    with capture_logs() as logs:
        async with scripted_gateway(answer_one) as target, adapter(target) as c, asyncio.timeout(10):
            for _ in range(6):
                await c.send("a", "s", "x")
            await c.close(timeout_s=0)
    waits = [line["backoff_s"] for line in logs if line["event"] == "channel_client.stream_lost"]
    assert set(waits[:5]) == {0.05}


async def test_a_stream_that_lived_for_some_time_is_opened_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an adapter that sends nothing."""
    monkeypatch.setattr("soma_common.client.kept_stream.LONGEST_BACKOFF_S", 0.2)

    async def leave(frames: Frames, context: Any) -> None:
        await anext(frames)
        await context.write(welcome())
        await asyncio.sleep(0.25)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    with capture_logs() as logs:
        async with scripted_gateway(leave) as target, adapter(target) as c:
            await eventually(lambda: c.streams == 4, timeout_s=10)
            await c.close(timeout_s=0)
    waits = [line["backoff_s"] for line in logs if line["event"] == "channel_client.stream_lost"]
    assert set(waits) == {0.05}
