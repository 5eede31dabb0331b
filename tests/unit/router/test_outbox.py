"""What goes to gateways and watchers fits the bus, whatever gathers in one moment, and keeps its order."""

import asyncio
from typing import Any, cast

import pytest
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import Delivery
from soma.router.v1.outbound_pb2 import LiveBatch, OutBatch

from services.router.adapters.exchange_nats import NatsOutbox
from soma_common.testing.eventually import eventually

BUS_BYTES = 1024 * 1024
TENANT, GATEWAY = "demo", "gateway-0"


class Bus:
    """Takes what is published."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []

    async def publish(self, subject: str, payload: bytes) -> None:
        self.taken.append((subject, payload))


def delivery(number: int, size: int) -> Delivery:
    return Delivery(turn_id=number.to_bytes(16, "big"), message=Message(parts=[Part(text="x" * size)]))


@pytest.mark.parametrize(("count", "size", "batches"), [(1, 10, 1), (256, 10, 1), (700, 10, 3), (6, 200_000, 3)])
async def test_deliveries_and_live_events_go_in_as_many_batches_as_they_need(
    count: int, size: int, batches: int
) -> None:
    bus = Bus()
    outbox = NatsOutbox(cast(Any, bus), "router-0", lambda: True)
    for number in range(count):
        outbox.hand_over(TENANT, GATEWAY, number, delivery(number, size))
    for number in range(3):
        outbox.for_adapter(TENANT, GATEWAY, number).text.text = "y" * size
        outbox.for_watchers(TENANT, b"s" * 16).text.text = str(number) * size
    publishing = asyncio.create_task(outbox.run())
    await eventually(lambda: any(".live." in subject for subject, _ in bus.taken))
    publishing.cancel()
    assert all(len(payload) <= BUS_BYTES for _, payload in bus.taken)
    out = [OutBatch.FromString(payload) for subject, payload in bus.taken if ".out." in subject]
    assert {batch.router for batch in out} == {"router-0"}
    handed = [handover for batch in out for handover in batch.deliveries]
    assert [(h.stream, h.delivery) for h in handed] == [(n, delivery(n, size)) for n in range(count)]
    assert [(event.stream, len(event.event.text.text)) for batch in out for event in batch.live] == [
        (number, size) for number in range(3)
    ]
    assert batches <= len(out) <= batches + 2
    live = [LiveBatch.FromString(payload) for subject, payload in bus.taken if ".live." in subject]
    assert [event.text.text for batch in live for event in batch.events] == [str(n) * size for n in range(3)]


async def test_who_may_not_speak_says_nothing() -> None:
    bus, may_speak = Bus(), False
    outbox = NatsOutbox(cast(Any, bus), "router-0", lambda: may_speak)
    publishing = asyncio.create_task(outbox.run())
    outbox.hand_over(TENANT, GATEWAY, 1, delivery(1, 10))
    await eventually(lambda: not outbox._out)
    may_speak = True
    outbox.hand_over(TENANT, GATEWAY, 2, delivery(2, 10))
    await eventually(lambda: bool(bus.taken))
    publishing.cancel()
    ((_, payload),) = bus.taken
    assert [handover.stream for handover in OutBatch.FromString(payload).deliveries] == [2]
