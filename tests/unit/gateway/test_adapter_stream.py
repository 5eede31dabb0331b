"""What one stream's frames cost the others."""

import asyncio
from typing import Any, cast

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Message, Part
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, Hello

from services.gateway.adapters.lanes_memory import MemoryLanes
from services.gateway.application.accept_message import AcceptMessage
from services.gateway.application.adapter_stream import ITEMS_AT_ONCE, AdapterStream, StreamBounds
from services.gateway.application.write_lanes import LaneBounds, LaneWriters
from services.gateway.domain.ingest_window import LaneProgress
from services.gateway.domain.mailbox_bounds import MailboxBounds
from soma_common.clock import monotonic
from soma_common.layout import LaneLayout


class AnyTenant:
    """Port `Directory`: everything exists."""

    def check_tenant(self, tenant: str) -> None: ...

    def check_agent(self, tenant: str, agent: str) -> None: ...


def a_stream(number: int, tenant: str, writers: LaneWriters) -> AdapterStream:
    accept = AcceptMessage(
        AnyTenant(),
        writers,
        MailboxBounds(per_tenant=10**6, per_session=10**6, clock=monotonic),
        LaneLayout(8, 1),
        max_content_bytes=10_000,
        now_ms=lambda: 1,
    )
    return AdapterStream(
        number,
        Hello(tenant=tenant, channel="line", instance=f"line-{number}"),
        accept=accept,
        acks=cast(Any, None),
        bounds=StreamBounds(),
        clock=monotonic,
        changed=lambda _: None,
    )


def a_frame(items: int) -> ConnectRequest:
    frame = ConnectRequest()
    for ref in range(1, items + 1):
        frame.messages.add(
            ref=ref, agent="echo", session=f"s{ref}", idempotency_key=f"k{ref}", message=Message(parts=[Part(text="x")])
        )
    return frame


async def test_a_large_frame_holds_up_no_other_stream() -> None:
    writers = LaneWriters(MemoryLanes(), LaneBounds(), LaneProgress(monotonic), observe=lambda *_: None)
    flood, small = a_stream(1, "flood", writers), a_stream(2, "small", writers)
    order: list[str] = []

    async def receive(name: str, stream: AdapterStream, frame: ConnectRequest) -> None:
        await stream.receive(frame)
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(receive("flood", flood, a_frame(4 * ITEMS_AT_ONCE)))
        group.create_task(receive("small", small, a_frame(1)))
    assert order == ["small", "flood"]


async def test_a_stream_that_ends_in_the_middle_of_a_frame_takes_no_more_of_it() -> None:
    lanes = MemoryLanes()
    writers = LaneWriters(lanes, LaneBounds(), LaneProgress(monotonic), observe=lambda *_: None)
    stream = a_stream(1, "demo", writers)
    async with asyncio.TaskGroup() as group:
        group.create_task(stream.receive(a_frame(4 * ITEMS_AT_ONCE)))
        await asyncio.sleep(0)
        stream.end()
    await writers.drain(1.0)
    assert sum(len(batch) for batch in lanes.batches["demo", 0]) == ITEMS_AT_ONCE


async def test_items_beyond_the_tenants_queue_are_refused_before_they_are_looked_at() -> None:
    writers = LaneWriters(MemoryLanes(), LaneBounds(tenant_items=2), LaneProgress(monotonic), observe=lambda *_: None)
    stream = a_stream(1, "demo", writers)
    frame = a_frame(3)
    frame.messages[2].ClearField("message")  # nothing is said: refused for that reason if it were looked at
    await stream.receive(frame)
    down = await stream.next_frame()
    assert down is not None
    assert [(refusal.ref, refusal.error.reason) for refusal in down.refusals] == [
        (3, ErrorReason.ERROR_REASON_QUEUE_FULL)
    ]
    await writers.drain(1.0)
