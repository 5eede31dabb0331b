"""Gathers accepted items per (tenant, lane) and stores them, one batch in flight for each.

Order: nothing later of a (tenant, lane) is sent while an earlier batch is unresolved. A batch without an answer is
sent again under the same id; when that goes on too long, the batch and everything gathered behind it fail together
as "not known", so that no item is stored before an older one of its session. Tenants do not wait for each other.

Bounds: items and bytes per tenant. Over them an item is refused at once, before anything is stored. What is stored and
not taken in by the routers is bounded per (tenant, lane) by a window: the next batch waits for it, a little.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.router.v1.inbound_pb2 import Inbound

from services.gateway.application.ports import BatchUnacceptable, BusSilent, LaneFull, Lanes, Sink
from services.gateway.domain.ingest_window import IngestWindow, LaneProgress
from services.gateway.domain.refusal import Refused, bus_unavailable, queue_full
from soma_common.failpoints import failpoint_async

ITEM_OVERHEAD_BYTES: Final = 512
"""More than an Inbound takes beside its content: ids, names and lengths at their largest are 480 bytes."""
BATCH_ID_BYTES: Final = 16
LINGER_S: Final = 0.001
LINGER_AFTER: Final = 8
"""A batch of so many says that there is load ..."""
LINGER_BELOW: Final = 32
"""... and so few gathered that waiting a moment makes fewer, larger batches."""
log = structlog.get_logger(__name__)

FIRST_PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 0.25
LONGEST_WINDOW_WAIT_S: Final = 1.0
"""A batch waits no longer for the routers: they may be alive and held up by their store, and accepting goes on."""


@dataclass(frozen=True, slots=True)
class LaneBounds:
    """How much may wait and how it is cut."""

    batch_items: int = 512
    batch_bytes: int = 768 * 1024
    """Must leave room for one item below the bus's largest payload."""
    tenant_items: int = 16384
    tenant_bytes: int = 64 * 1024 * 1024
    ingest_window: int = 256
    """Items of a (tenant, lane) that may be stored and not taken in."""
    attempt_s: float = 1.0
    """How long one try waits for its answer."""
    deadline_s: float = 5.0
    """How long a batch is tried."""
    full_retry_ms: int = 500
    """When to send again what a full queue refused."""
    silent_retry_ms: int = 1000


@dataclass(slots=True)
class WaitingItem:
    """An admitted item on its way to its lane."""

    inbound: Inbound
    size: int
    sink: Sink
    ref: int


class LaneWriters:
    """All lanes of all tenants."""

    def __init__(
        self, lanes: Lanes, bounds: LaneBounds, progress: LaneProgress, *, observe: Callable[[int, float], None]
    ) -> None:
        """`observe` is told of each stored batch: its number of items and the seconds from its first try to its
        receipt.
        """
        self._progress = progress
        self._lanes = lanes
        self._bounds = bounds
        self._observe = observe
        self._tenants: dict[str, _TenantQueue] = {}
        self._held_back: set[_LaneWriter] = set()
        """Those whose next batch waits for the routers."""

    def put(self, tenant: str, lane: int, inbound: Inbound, sink: Sink, ref: int) -> int:
        """Queues an item; its sink is told later, once. Returns the bytes the item counts for. Never waits.

        Raises:
            Refused: the tenant's queue is full; nothing is stored and the sink is not told.
        """
        queue = self._tenants.get(tenant)
        if queue is None:
            queue = self._tenants[tenant] = _TenantQueue()
        bounds = self._bounds
        size = len(inbound.content) + ITEM_OVERHEAD_BYTES
        self.check_room(tenant)
        if queue.bytes + size > bounds.tenant_bytes:
            raise queue_full("gateway.tenant_bytes", bounds.tenant_bytes, bounds.full_retry_ms)
        queue.items += 1
        queue.bytes += size
        writer = queue.lanes.get(lane)
        if writer is None:
            writer = queue.lanes[lane] = _LaneWriter(
                tenant, lane, queue, self._lanes, bounds, self._progress, self._held_back, self._observe
            )
        writer.put(WaitingItem(inbound, size, sink, ref))
        return size

    def check_room(self, tenant: str) -> None:
        """Raises Refused when as many of the tenant's items wait as may."""
        queue = self._tenants.get(tenant)
        if queue is not None and queue.items >= self._bounds.tenant_items:
            raise queue_full("gateway.tenant_items", self._bounds.tenant_items, self._bounds.full_retry_ms)

    def on_progress(self, lane: int, router: str, seq: int) -> None:
        """A router has taken a lane in up to a place."""
        self._progress.heard(lane, router, seq)
        for writer in self._held_back:
            writer.look_again()

    @property
    def waiting(self) -> int:
        """Items whose fate is open."""
        return sum(queue.items for queue in self._tenants.values())

    async def drain(self, timeout_s: float) -> None:
        """Waits until nothing waits any more, at most so long."""
        tasks = [
            writer.task
            for queue in self._tenants.values()
            for writer in queue.lanes.values()
            if writer.task is not None and not writer.task.done()
        ]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)


class _TenantQueue:
    """What waits for one tenant, over its lanes. Kept while the process lives: tenants are few compared with
    messages.
    """

    __slots__ = ("bytes", "items", "lanes")

    def __init__(self) -> None:
        self.items = 0
        self.bytes = 0
        self.lanes: dict[int, _LaneWriter] = {}


class _LaneWriter:
    """One (tenant, lane): a list and, while it is not empty, a task that stores it batch by batch."""

    __slots__ = (
        "_bounds", "_held_back", "_lane", "_lanes", "_observe", "_previous", "_progress", "_queue", "_room", "_tenant",
        "_waiting", "_window", "task",
    )  # fmt: skip

    def __init__(
        self,
        tenant: str,
        lane: int,
        queue: _TenantQueue,
        lanes: Lanes,
        bounds: LaneBounds,
        progress: LaneProgress,
        held_back: set[_LaneWriter],
        observe: Callable[[int, float], None],
    ) -> None:
        self._tenant = tenant
        self._lane = lane
        self._queue = queue
        self._lanes = lanes
        self._bounds = bounds
        self._progress = progress
        self._held_back = held_back
        self._observe = observe
        self._window = IngestWindow()
        self._room: asyncio.Event | None = None
        """Set by news of the routers while a batch waits for them."""
        self._waiting: deque[WaitingItem] = deque()
        self._previous = 0
        self.task: asyncio.Task[None] | None = None

    def put(self, item: WaitingItem) -> None:
        self._waiting.append(item)
        if self.task is None:
            self.task = asyncio.get_running_loop().create_task(self._run())

    def look_again(self) -> None:
        """The routers have said something new."""
        if self._room is not None:
            self._room.set()

    async def _run(self) -> None:
        try:
            while self._waiting:
                room = self._room_in_window()
                if room <= 0:
                    room = await self._until_room()
                if self._previous >= LINGER_AFTER and len(self._waiting) < LINGER_BELOW:
                    await asyncio.sleep(LINGER_S)
                batch = self._cut(room)
                self._previous = len(batch)
                await self._store(batch)
        finally:
            self.task = None

    def _room_in_window(self) -> int:
        return self._bounds.ingest_window - self._window.ahead(self._progress.floor(self._lane))

    async def _until_room(self) -> int:
        """Waits until the routers have taken in enough, or do not speak any more, or a second is over; returns how
        many items may go.
        """
        self._room = asyncio.Event()
        self._held_back.add(self)
        try:
            async with asyncio.timeout(LONGEST_WINDOW_WAIT_S):
                while (room := self._room_in_window()) <= 0:
                    await self._room.wait()
                    self._room.clear()
                return room
        except TimeoutError:
            return self._bounds.ingest_window
        finally:
            self._held_back.discard(self)
            self._room = None

    def _cut(self, room_in_window: int) -> list[WaitingItem]:
        """The next batch: at most so many items and bytes, at least one item."""
        waiting, bounds = self._waiting, self._bounds
        batch = [waiting.popleft()]
        room = bounds.batch_bytes - batch[0].size
        most = min(bounds.batch_items, room_in_window)
        while waiting and len(batch) < most and waiting[0].size <= room:
            item = waiting.popleft()
            room -= item.size
            batch.append(item)
        return batch

    async def _store(self, batch: list[WaitingItem]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            try:
                await self._store_until(batch, started + self._bounds.deadline_s)
            except Refused:
                raise
            except Exception as error:
                # Boundary: nobody else tells the senders, and what is not settled would count against the tenant for
                # ever.
                log.exception("lanes.store_failed", tenant=self._tenant, lane=self._lane, items=len(batch))
                raise bus_unavailable(loop.time() - started, self._bounds.silent_retry_ms) from error
        except Refused as refused:
            if refused.error.reason == ErrorReason.ERROR_REASON_BUS_UNAVAILABLE:
                batch.extend(self._waiting)
                self._waiting.clear()
            self._settle(batch)
            for item in batch:
                item.sink.refused(item.ref, refused.error, item.size)
            return
        await failpoint_async("gateway.after_publish_before_ack")
        self._observe(len(batch), loop.time() - started)
        self._settle(batch)
        for item in batch:
            item.sink.accepted(item.ref, item.inbound.message_id, item.size)

    async def _store_until(self, batch: list[WaitingItem], deadline: float) -> None:
        """Sends a batch under one id until it is resolved. Raises Refused."""
        loop, bounds = asyncio.get_running_loop(), self._bounds
        batch_id = os.urandom(BATCH_ID_BYTES).hex()
        items = [item.inbound for item in batch]
        pause = FIRST_PAUSE_S
        while True:
            try:
                left = deadline - loop.time()
                seq = await self._lanes.store(self._tenant, self._lane, batch_id, items, min(bounds.attempt_s, left))
                self._window.stored(seq, len(items))
                return
            except BusSilent:
                if loop.time() + pause >= deadline:
                    raise bus_unavailable(bounds.deadline_s, bounds.silent_retry_ms) from None
            except LaneFull as full:
                raise queue_full(full.bound, full.value, bounds.full_retry_ms) from None
            except BatchUnacceptable as error:
                raise Refused(
                    ErrorReason.ERROR_REASON_CONTENT_TOO_LARGE, f"not stored: the message bus refuses it: {error}"
                ) from None
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)

    def _settle(self, batch: list[WaitingItem]) -> None:
        self._queue.items -= len(batch)
        self._queue.bytes -= sum(item.size for item in batch)
