"""Reads the lanes: one bounded pull consumer per lane, from the lowest cursor of this router's partitions, without
acks.

What was read and not committed is lost with the router and read again by the next owner: the cursor in PostgreSQL is
the only acknowledgement. A gap in the consumer's numbering, a missing heartbeat or a new connection makes the reader
attach again, and attaching compares each cursor with the stream: its incarnation, and the batch id at the cursor's
place. A stream that is gone is made anew. Whatever is found missing is told loudly: `router.ingest_gap` and the metric
beside it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, NotFoundError

from services.router.application.items import CursorItem
from services.router.domain.lane_window import CommittedPlace, LaneExtent, LaneWindow
from services.router.domain.partition import Cursor, Partition
from soma_common.clock import monotonic
from soma_common.ids import lane_of
from soma_common.nats import direct
from soma_common.nats.lanes import ensure_lanes, stream_name
from soma_common.nats.subjects import tenant_of
from soma_common.telemetry.metrics import counter, gauge

if TYPE_CHECKING:
    from services.router.application.commit_group import GroupCommitter
    from services.router.application.ingest_messages import Ingest
    from services.router.application.state import RouterState

_PULL_BATCH: Final = 256
_PULL_EXPIRES_S: Final = 30.0
_HEARTBEAT_S: Final = 1.0
_SILENT_S: Final = 2.5
_REQUEST_TIMEOUT_S: Final = 2.0
_RETRY_S: Final = 0.2
_MSG_ID: Final = "Nats-Msg-Id"

log = structlog.get_logger(__name__)

LANE_LAG = gauge("soma_router_lane_lag_messages", "Lane messages that are stored and not read.", ["lane"])
GAPS = counter("soma_router_ingest_gaps_total", "Lanes found without messages that should have been there.")
ATTACHED = counter("soma_router_lane_attached_total", "Times a lane reader attached, by lane.", ["lane"])
WINDOW = gauge(
    "soma_router_lane_window_seconds",
    "How old a copy of the database may be, as far as this router has seen, for the lane to hold all accepted since.",
    ["lane"],
)


@dataclass(slots=True)
class _Consumer:
    """A pull consumer in use."""

    name: str
    inbox: str
    expected: int = 1
    """Consumer sequence of the next message."""
    outstanding: int = 0
    """Messages asked for and not yet received."""
    heard_at: float = 0.0
    next_seq: int = 0
    """Stream sequence of the next message: the stream has no holes, so another one says that something was removed."""


class LaneReader:
    """Reads one lane for this router."""

    def __init__(
        self,
        client: Client,
        js: JetStreamContext,
        state: RouterState,
        ingest: Ingest,
        lane: int,
        backlog: int,
        window: LaneWindow,
        tenant_lane_batches: int,
    ) -> None:
        self._client = client
        self._js = js
        self._state = state
        self._ingest = ingest
        self._lane = lane
        self._backlog = backlog
        self._window = window
        self._tenant_lane_batches = tenant_lane_batches
        self._stream = stream_name(lane)
        self._lag = LANE_LAG.labels(lane)
        self._created = ""
        self._consumer: _Consumer | None = None
        self._changed = asyncio.Event()
        self._pulling: asyncio.Task[None] | None = None
        self.last_seq = 0
        """Last lane message seen: partitions for which it held nothing may move their cursor there."""
        self.last_batch = ""
        self.committer: GroupCommitter

    def attach(self, partition: Partition) -> None:
        """Has the reader go back to where the partition needs it."""
        partition.attached = True
        self._changed.set()

    def partitions(self) -> list[Partition]:
        """This router's partitions that the lane carries."""
        lanes = self._state.layout.lanes
        return [p for p in self._state.partitions.values() if lane_of(p.id, lanes) == self._lane]

    async def run(self) -> None:
        """Reads until cancelled."""
        while True:
            self._changed.clear()
            if not self.partitions():
                await self._changed.wait()
                continue
            try:
                await self._read()
            except NotFoundError:
                await self._make_anew()
            except (NatsError, APIError, TimeoutError, OSError) as error:
                log.warning("router.lane_read_failed", lane=self._lane, error=str(error) or type(error).__name__)
                await asyncio.sleep(_RETRY_S)

    async def _read(self) -> None:
        """Attaches and reads until something asks for a new start."""
        start = await self._check_cursors()
        reconnects = self._client.stats["reconnects"]
        inbox = self._client.new_inbox()
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=start,
            ack_policy=AckPolicy.NONE,
            inactive_threshold=30.0,
            mem_storage=True,
        )
        info = await self._js.add_consumer(self._stream, config)
        consumer = self._consumer = _Consumer(info.name, inbox, heard_at=monotonic(), next_seq=start)
        subscription = await direct.subscribe(self._client, inbox, self._handler(consumer))
        ATTACHED.labels(self._lane).inc()
        log.info("router.lane_attached", lane=self._lane, from_seq=start)
        try:
            while not self._changed.is_set():
                await self._pull(consumer)
                if monotonic() - consumer.heard_at > _SILENT_S or self._client.stats["reconnects"] != reconnects:
                    log.warning("router.lane_silent", lane=self._lane)
                    return
                try:
                    async with asyncio.timeout(_HEARTBEAT_S / 2):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            self._consumer = None
            # The connection may be gone; an error here must not take the place of a cancellation.
            with suppress(NatsError):
                await subscription.unsubscribe()

    def _has_room(self, consumer: _Consumer) -> bool:
        return consumer.outstanding <= _PULL_BATCH // 2 and self._ingest.backlog < self._backlog

    async def _pull(self, consumer: _Consumer) -> None:
        """Asks for more, if less than half a batch is outstanding and what was read is nearly committed."""
        if not self._has_room(consumer):
            if not consumer.outstanding:
                consumer.heard_at = monotonic()  # nothing was asked for, so nobody is silent
            return
        consumer.outstanding += _PULL_BATCH
        request = {
            "batch": _PULL_BATCH,
            "expires": int(_PULL_EXPIRES_S * 1e9),
            "idle_heartbeat": int(_HEARTBEAT_S * 1e9),
        }
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer.name}"
        await self._client.publish(subject, json.dumps(request).encode(), reply=consumer.inbox)

    def _handler(self, consumer: _Consumer) -> Callable[[Msg], None]:
        def on_message(message: Msg) -> None:
            if consumer is not self._consumer or self._changed.is_set():
                return
            consumer.heard_at = monotonic()
            if not message.data and message.headers and "Status" in message.headers:
                self._on_status(consumer, message.headers)
                return
            seq, number, pending = _places(message.reply)
            if number != consumer.expected:
                log.warning("router.lane_gap", lane=self._lane, expected=consumer.expected, got=number)
                self._changed.set()
                return
            consumer.expected += 1
            consumer.outstanding -= 1
            if seq != consumer.next_seq:
                GAPS.inc()
                log.error("router.ingest_gap", lane=self._lane, cursor=consumer.next_seq - 1, first=seq, removed=True)
            consumer.next_seq = seq + 1
            batch_id = (message.headers or {}).get(_MSG_ID, "")
            self._ingest.on_message(self._lane, tenant_of(message.subject), self._created, seq, batch_id, message.data)
            self.last_seq, self.last_batch = seq, batch_id
            self._lag.set(pending)
            if self._has_room(consumer) and (self._pulling is None or self._pulling.done()):
                self._pulling = asyncio.get_running_loop().create_task(self._pull_on(consumer))

        return on_message

    async def _pull_on(self, consumer: _Consumer) -> None:
        try:
            await self._pull(consumer)
        except (NatsError, OSError) as error:
            log.warning("router.lane_read_failed", lane=self._lane, error=str(error) or type(error).__name__)
            self._changed.set()

    def _on_status(self, consumer: _Consumer, headers: dict[str, str]) -> None:
        status = headers["Status"]
        if status == "100":
            return
        if status == "408":  # the request ran out: what it had left will not come
            left = headers.get("Nats-Pending-Messages")
            consumer.outstanding = max(0, consumer.outstanding - int(left)) if left else 0
            return
        log.warning("router.lane_status", lane=self._lane, status=status, text=headers.get("Description", ""))
        self._changed.set()

    # ---- is the lane still the one that the cursors were made for?

    async def _check_cursors(self) -> int:
        """Compares the cursors with the stream, moves those back that do not fit; returns where to start reading."""
        # What is attached from here on is for the next check: its former owner may have gone beyond this answer.
        partitions = self.partitions()
        info = await self._js.stream_info(self._stream)
        self._created = str(info.created)
        first, last = info.state.first_seq, info.state.last_seq
        found: dict[int, str | None] = {}
        start = last + 1
        for partition in partitions:
            cursor = partition.cursor
            if not cursor.batch:
                # It has read nothing: of a lane that has its first message, or that began there after a gap.
                fits = cursor.stream in ("", self._created) and max(first, 1) == cursor.seq + 1
            else:
                fits = cursor.stream == self._created and cursor.seq <= last
                if fits and cursor.seq not in found:
                    found[cursor.seq] = await self._batch_at(cursor.seq)
                fits = fits and found[cursor.seq] == cursor.batch
            if not fits:
                GAPS.inc()
                facts = {"lane": self._lane, "partition": partition.id, "first": first, "last": last}
                log.error("router.ingest_gap", cursor=cursor.seq, **facts)
                # Everything that is there is read again: what is known already is dropped by its message id. The
                # store is told too: a cursor that counts what is gone would let others purge what is not read yet.
                partition.read_seq = min(partition.read_seq, first - 1)
                partition.known_seq = last
                self.committer.put(CursorItem(partition, Cursor(self._created, max(first - 1, 0), "")))
            # What was read beyond the end is on its way to the mailbox; its sequences are given to other messages now.
            partition.read_seq = min(partition.read_seq, last)
            partition.known_seq = last if partition.known_seq is None else min(partition.known_seq, last)
            start = min(start, partition.read_seq + 1)
        self.last_seq = min(self.last_seq, start - 1) if self.last_seq else start - 1
        return max(start, first, 1)

    async def _batch_at(self, seq: int) -> str | None:
        try:
            message = await self._js.get_msg(self._stream, seq=seq)
        except NotFoundError:
            return None
        return str((message.headers or {}).get(_MSG_ID, ""))

    async def move_idle_cursors(self) -> None:
        """Moves cursors of partitions for which the lane held nothing lately; purges what all partitions have."""
        if self._changed.is_set() or self._consumer is None or not self.last_batch:
            return  # the reader is about to go back: what it has seen says nothing about partitions that are new here
        for partition in self.partitions():
            cursor = partition.cursor
            behind = cursor.seq < self.last_seq or cursor.stream != self._created
            if behind and partition.read_seq < self.last_seq and partition.attached:
                partition.read_seq = self.last_seq
                self.committer.put(CursorItem(partition, Cursor(self._created, self.last_seq, self.last_batch)))

    async def tend(self, created: str, floor: int, place: CommittedPlace) -> None:
        """Purges what every partition has had for long enough. `floor` is the lowest cursor of the lane's partitions
        and `place` how far the database was after it was read.
        """
        state = (await self._js.stream_info(self._stream)).state
        extent = LaneExtent(state.first_seq, state.last_seq, state.bytes)
        below = self._window.purge_below(monotonic(), created, floor, place, extent)
        WINDOW.labels(self._lane).set(self._window.reaches_back_s(monotonic(), extent))
        if below > extent.first:
            await self.purge(created, below)

    async def purge(self, created: str, floor: int) -> None:
        """Removes lane messages below `floor` if the stream is the incarnation that the cursors count, and goes as far;
        the message at `floor` stays as the anchor that cursors are checked against.
        """
        if floor <= 1:
            return
        info = await self._js.stream_info(self._stream)
        if str(info.created) == created and floor <= info.state.last_seq:
            await self._js.purge_stream(self._stream, seq=floor)

    async def _make_anew(self) -> None:
        """The stream is gone. What it held and nobody had read is lost, and the next attachment says so."""
        log.error("router.lane_gone", lane=self._lane)
        try:
            await ensure_lanes(self._js, self._state.layout, self._tenant_lane_batches)
        except (NatsError, APIError, TimeoutError, OSError) as error:
            log.warning("router.lane_read_failed", lane=self._lane, error=str(error) or type(error).__name__)
            await asyncio.sleep(_RETRY_S)


def _places(reply: str) -> tuple[int, int, int]:
    """Stream sequence, consumer sequence and number pending from a JetStream reply subject.

    `$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>`, or with domain and account
    hash after ACK.
    """
    tokens = reply.split(".")
    base = 5 if len(tokens) == 9 else 7
    return int(tokens[base]), int(tokens[base + 1]), int(tokens[base + 3])


class LaneReaders:
    """All lanes of this router: ownership attaches and detaches partitions here."""

    def __init__(self, readers: list[LaneReader], state: RouterState) -> None:
        self._readers = readers
        self._state = state

    def attach(self, partition: Partition) -> None:
        """Has the partition's lane read from its cursor on."""
        self._readers[lane_of(partition.id, self._state.layout.lanes)].attach(partition)

    def detach(self, partition: Partition) -> None:
        """The lane goes on for the others; items of a partition that is not ours are skipped."""
