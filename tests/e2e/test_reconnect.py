"""An adapter that loses its stream and comes back has lost nothing and is told nothing twice."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from soma.common.v1.turn_pb2 import Delivery
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, ConnectResponse, Hello, InboundMessage

from soma_common.client.channel_client import text_message
from tests.e2e.record import Record
from tests.e2e.stack import ECHO, Stack

READ_TIMEOUT_S = 15.0


async def test_a_gateways_death_loses_and_repeats_nothing(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, gateway=0, on_delivery=seen.on_delivery) as adapter:
        before = await asyncio.gather(*(adapter.send(ECHO, f"s-{n % 20}", f"message {n}") for n in range(100)))
        await stack.kill("gateway-0")
        after = await asyncio.gather(*(adapter.send(ECHO, f"s-{n % 20}", f"more {n}") for n in range(100)))
        assert adapter.streams > 1
        await seen.all_answered([receipt.message_id for receipt in (*before, *after)])


async def test_what_was_processed_is_not_sent_again(stack: Stack, channel: str) -> None:
    """The stream breaks before the ack: the next hello names the delivery, and only the following one comes."""
    async with _stream(stack, channel, Hello(credit=1)) as (call, _):
        await call.write(_messages("first", "second"))
        first = await _next_delivery(call)
    assert first.position == 1
    async with _stream(stack, channel, Hello(credit=8, processed=[first.delivery_id])) as (call, _):
        second = await _next_delivery(call)
        await call.write(ConnectRequest(acks=[second.delivery_id]))
        assert second.position == 2


async def test_what_was_not_processed_comes_again(stack: Stack, channel: str) -> None:
    async with _stream(stack, channel, Hello(credit=1)) as (call, _):
        await call.write(_messages("first", "second"))
        first = await _next_delivery(call)
    async with _stream(stack, channel, Hello(credit=8)) as (call, _):
        again = await _next_delivery(call)
        await call.write(ConnectRequest(acks=[again.delivery_id]))
        second = await _next_delivery(call)
        await call.write(ConnectRequest(acks=[second.delivery_id]))
    assert (again.delivery_id, again.position, again.message_ids) == (
        first.delivery_id,
        first.position,
        first.message_ids,
    )
    assert second.position == 2


async def test_the_next_delivery_waits_for_the_ack(stack: Stack, channel: str) -> None:
    async with _stream(stack, channel, Hello(credit=8)) as (call, _):
        await call.write(_messages("first", "second"))
        first = await _next_delivery(call)
        early = asyncio.create_task(_next_delivery(call))
        done, _ = await asyncio.wait([early], timeout=0.7)
        assert not done, "the second delivery came before the first was acknowledged"
        await call.write(ConnectRequest(acks=[first.delivery_id]))
        second = await early
        await call.write(ConnectRequest(acks=[second.delivery_id]))
    assert (first.position, second.position) == (1, 2)


async def test_a_second_stream_of_an_instance_replaces_the_first(stack: Stack, channel: str) -> None:
    async with (
        _stream(stack, channel, Hello(credit=8)) as (old, _),
        _stream(stack, channel, Hello(credit=8)) as (new, _),
    ):
        await _ended(old)
        await new.write(_messages("hello"))
        delivery = await _next_delivery(new)
        await new.write(ConnectRequest(acks=[delivery.delivery_id]))


@asynccontextmanager
async def _stream(stack: Stack, channel: str, hello: Hello) -> AsyncIterator[tuple[Any, ConnectResponse]]:
    """A bare stream of the instance `raw`, after hello and welcome; broken off at the end of the block."""
    hello.tenant, hello.channel, hello.instance, hello.protocol = "demo", channel, "raw", 1
    async with stack.channels() as gateway:
        call = gateway.Connect()
        await call.write(ConnectRequest(hello=hello))
        welcome = await asyncio.wait_for(call.read(), READ_TIMEOUT_S)
        assert isinstance(welcome, ConnectResponse)
        assert welcome.HasField("welcome")
        try:
            yield call, welcome
        finally:
            call.cancel()


def _messages(*texts: str) -> ConnectRequest:
    return ConnectRequest(
        messages=[
            InboundMessage(ref=ref, agent=ECHO, session="s", idempotency_key=text, message=text_message(text))
            for ref, text in enumerate(texts, 1)
        ]
    )


async def _next_delivery(call: Any) -> Delivery:
    """Read on to the next delivery; with one unacknowledged at a time no frame holds two of a session."""
    async with asyncio.timeout(READ_TIMEOUT_S):
        while True:
            frame = await call.read()
            assert isinstance(frame, ConnectResponse), "the stream ended"
            assert not frame.refusals
            if frame.deliveries:
                (delivery,) = frame.deliveries
                return delivery


async def _ended(call: Any) -> None:
    async with asyncio.timeout(READ_TIMEOUT_S):
        while not call.done():
            try:
                if not isinstance(await call.read(), ConnectResponse):
                    return
            except Exception:  # noqa: BLE001 - however it ends, it has ended
                return
