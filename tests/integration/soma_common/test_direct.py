"""Messages handed over where they are read, over the real NATS: all, in order, whatever the handler or the connection
does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from soma_common.nats import direct
from soma_common.nats.connection import connect_nats
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually

NUMBERS = [b"%d" % number for number in range(500)]


@pytest.fixture
async def bus(nats_server: FaultyNats) -> AsyncIterator[Client]:
    client = await connect_nats(nats_server.url, nats_server.token_file, "direct")
    yield client
    await client.close()


async def test_all_come_in_order_and_one_that_the_handler_fails_on_is_over(bus: Client) -> None:
    got: list[bytes] = []

    def handle(message: Msg) -> None:
        got.append(message.data)
        if message.data == b"7":
            raise ValueError("seven")

    subscription = await direct.subscribe(bus, "soma.direct", handle)
    for number in NUMBERS:
        await bus.publish("soma.direct", number)
    await eventually(lambda: len(got) == len(NUMBERS))
    assert got == NUMBERS
    assert subscription.pending_bytes == subscription.pending_msgs == 0


async def test_nothing_comes_after_the_end_and_draining_waits_for_nobody(bus: Client) -> None:
    ended: list[bytes] = []
    drained: list[bytes] = []
    first = await direct.subscribe(bus, "soma.ended", lambda message: ended.append(message.data))
    second = await direct.subscribe(bus, "soma.drained", lambda message: drained.append(message.data))
    await bus.publish("soma.ended", b"1")
    await eventually(lambda: ended == [b"1"])
    await first.unsubscribe()
    for number in NUMBERS:
        await bus.publish("soma.ended", number)
        await bus.publish("soma.drained", number)
    await bus.flush()  # its ping overtakes what waits to be sent, so a drain alone would not wait for that
    await second.drain()  # type: ignore[no-untyped-call]
    assert drained == NUMBERS
    assert ended == [b"1"]


async def test_it_goes_on_after_a_lost_connection(bus: Client, nats_server: FaultyNats) -> None:
    got: list[bytes] = []
    await direct.subscribe(bus, "soma.back", lambda message: got.append(message.data))
    await nats_server.kill9()
    await eventually(lambda: not bus.is_connected, what="the loss is noticed")
    await nats_server.restart()
    await eventually(lambda: bus.is_connected, what="the connection is back")
    await bus.publish("soma.back", b"again")
    await eventually(lambda: got == [b"again"])
