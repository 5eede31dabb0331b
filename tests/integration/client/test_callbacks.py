"""Callbacks that raise, and closing: nobody who waits on the client waits for ever."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery, LiveEvent
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, ConnectResponse, InboundMessage
from structlog.testing import capture_logs

from soma_common import errors
from soma_common.client import ChannelClient, ClientClosed
from soma_common.client.channel_client import text_message
from soma_common.testing.eventually import eventually
from tests.integration.client.scripted import adapter, receipts, scripted_gateway, welcome

Frames = AsyncIterator[ConnectRequest]

OWN_ERRORS = [
    TimeoutError,
    asyncio.InvalidStateError,
    asyncio.CancelledError,
    lambda text: errors.Unavailable(ErrorReason.ERROR_REASON_BUS_UNAVAILABLE, text),
    ValueError,
]
"""What the application's own code raises; all but the last are what the end of a stream looks like as well."""


async def silent(frames: Frames, context: Any) -> None:
    """Answers nothing."""
    await context.write(welcome())
    async for _ in frames:
        pass


async def served(frames: Frames, context: Any) -> None:
    await context.write(welcome())
    async for frame in frames:
        await context.write(receipts(frame))


def item() -> InboundMessage:
    return InboundMessage(agent="a", session="s", idempotency_key="k", message=text_message("x"))


async def next_event(c: ChannelClient) -> object:
    return await anext(c.events())


async def ends_of(*waiting: asyncio.Task[Any]) -> list[type]:
    async with asyncio.timeout(5):
        return [type(end) for end in await asyncio.gather(*waiting, return_exceptions=True)]


async def test_closing_ends_a_send_that_waits_for_room() -> None:
    async with scripted_gateway(silent) as target:
        c = await adapter(target, outbox=1).__aenter__()
        sends = [asyncio.create_task(c.send("a", "s", str(number))) for number in range(3)]
        cancel = asyncio.create_task(c.cancel("a", "s"))
        await eventually(lambda: c.unanswered == 1)
        await c.close(timeout_s=0.1)
        assert await ends_of(*sends, cancel) == [ClientClosed] * 4


async def test_closing_ends_entering() -> None:
    c = adapter("127.0.0.1:1")
    entering = asyncio.create_task(c.__aenter__())
    await asyncio.sleep(0.1)
    await c.close()
    with pytest.raises(ClientClosed):
        async with asyncio.timeout(5):
            await entering


async def test_callbacks_that_raise_stop_neither_each_other_nor_closing() -> None:
    told: list[Error | None] = []
    async with scripted_gateway(silent) as target:
        c = await adapter(target).__aenter__()

        def again(_: bytes, error: Error | None) -> None:
            told.append(error)
            c.post(item(), again)  # which raises: the client is closed

        for _ in range(3):
            c.post(item(), again)
        sending = asyncio.create_task(c.send("a", "s", "of another part of the program"))
        await eventually(lambda: c.unanswered == 4)
        with capture_logs() as logs:
            await c.close(timeout_s=0.1)
        with pytest.raises(ClientClosed):
            async with asyncio.timeout(5):
                await sending
        assert c._grpc.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    assert len(told) == 3
    assert [line["exc_info"] for line in logs if line["event"] == "channel_client.answer_failed"] == [True] * 3


async def test_cancelling_the_close_twice_still_closes_the_channel() -> None:
    """The second comes while it waits for its own task, which takes its time to end."""
    told: list[Error | None] = []
    async with scripted_gateway(silent) as target:
        c = await adapter(target).__aenter__()
        c.post(item(), lambda _, error: told.append(error))
        task = c._task
        assert task is not None
        closing = asyncio.create_task(c.close())
        await asyncio.sleep(0.05)
        closing.cancel()
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing, task})
        assert closing.cancelled()
        assert len(told) == 1
        assert c._grpc.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def test_an_answer_that_raises_leaves_the_stream_as_it_is() -> None:
    def fail(_: bytes, error: Error | None) -> None:
        raise ValueError("no")

    async with scripted_gateway(served) as target, adapter(target) as c, asyncio.timeout(10):
        c.post(item(), fail)
        await c.send("a", "s", "x")
        assert c.streams == 1


async def test_a_failure_for_good_ends_every_wait_whatever_callbacks_raise() -> None:
    over = asyncio.Event()

    async def expire(frames: Frames, context: Any) -> None:
        await context.write(welcome())
        await over.wait()
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is over")

    async with scripted_gateway(expire) as target:
        c = await adapter(target, outbox=2).__aenter__()

        def again(_: bytes, error: Error | None) -> None:
            c.post(item(), again)

        c.post(item(), again)
        waiting: list[asyncio.Task[Any]] = [asyncio.create_task(c.send("a", "s", str(number))) for number in range(2)]
        waiting.append(asyncio.create_task(next_event(c)))
        await eventually(lambda: c.unanswered == 2)
        over.set()
        assert await ends_of(*waiting) == [errors.Unauthenticated] * 3
        await c.close()


@pytest.mark.parametrize("raised", OWN_ERRORS)
async def test_what_on_live_raises_ends_the_client_and_is_not_taken_for_a_lost_stream(raised: Any) -> None:
    async def tell(frames: Frames, context: Any) -> None:
        await context.write(welcome())
        await anext(frames)
        await anext(frames)
        await context.write(ConnectResponse(live=[LiveEvent(turn_id=b"t" * 16, dispatch=1)]))
        await asyncio.Event().wait()

    def fail(_: LiveEvent) -> None:
        raise raised("my own")

    async with scripted_gateway(tell) as target:
        c = await adapter(target, on_live=fail).__aenter__()
        with capture_logs() as logs:
            sending = asyncio.create_task(c.send("a", "s", "x"))
            reading = asyncio.create_task(next_event(c))
            assert await ends_of(sending, reading) == [errors.Internal] * 2
        with pytest.raises(errors.Internal, match="my own"):
            await c.send("a", "s", "x")
        assert c.streams == 1
        await c.close()
    assert [line["exc_info"] for line in logs if line["event"] == "channel_client.failed"] == [True]


@pytest.mark.parametrize("raised", OWN_ERRORS)
async def test_what_on_delivery_raises_gives_the_delivery_back(raised: Any) -> None:
    nacks: list[str] = []

    async def deliver(frames: Frames, context: Any) -> None:
        await context.write(welcome())
        await context.write(ConnectResponse(deliveries=[Delivery(delivery_id=b"d" * 16, session="s", position=1)]))
        async for frame in frames:
            nacks.extend(nack.cause for nack in frame.nacks)

    def fail(_: Delivery) -> None:
        raise raised("my own")

    async with scripted_gateway(deliver) as target, adapter(target, on_delivery=fail) as c:
        await eventually(lambda: nacks)
        assert "my own" in nacks[0]
        assert c.streams == 1


async def test_a_defect_of_the_writer_ends_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader alone would go on for ever with nobody to send."""
    async with scripted_gateway(served) as target:
        c = await adapter(target).__aenter__()

        def fail(*_: object) -> None:
            raise TypeError("my own")

        monkeypatch.setattr(c._outbox, "take", fail)
        with pytest.raises(errors.Internal, match="TypeError: my own"):
            async with asyncio.timeout(5):
                await c.send("a", "s", "x")
        await c.close()


async def test_a_task_that_others_cancel_leaves_nobody_waiting() -> None:
    async with scripted_gateway(silent) as target:
        c = await adapter(target).__aenter__()
        sending = asyncio.create_task(c.send("a", "s", "x"))
        reading = asyncio.create_task(next_event(c))
        await eventually(lambda: c.unanswered)
        assert c._task is not None
        c._task.cancel()
        assert await ends_of(sending, reading) == [errors.Internal] * 2
        await c.close()
