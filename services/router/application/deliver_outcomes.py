"""Hands outcomes to the channel's adapters: in order per session, the next after the acknowledgement of the former.

The deliveries table is the truth: what is in it is not acknowledged. Memory holds deliveries only for channels that
have an adapter, and only so many; what does not fit is paged in from the table (`_Backlog`), so a vanished adapter
costs nothing but rows.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import structlog
from soma.common.v1.turn_pb2 import Delivery
from soma.router.v1.outbound_pb2 import AckBatch, Presence

from services.router.application.group import StoreLost
from services.router.application.outcomes import AckItem, EndItem, RefusalItem
from services.router.domain.adapters import AdapterStream, choose
from soma_common.clock import monotonic
from soma_common.telemetry.metrics import counter, gauge

if TYPE_CHECKING:
    from services.router.application.commit_group import GroupCommitter
    from services.router.application.ports import HistoryStore, Outbox
    from services.router.application.state import RouterState
    from services.router.domain.partition import Partition
    from services.router.domain.session import Session

PRESENCE_S: Final = 3.0
"""A gateway that is silent for so long has no adapters."""
STREAM_GRACE_S: Final = 1.0
"""How long deliveries in hand wait for the instance whose stream is gone."""
GATEWAY_GRACE_S: Final = 3.0
"""The same when its whole gateway is silent: the instance has to find another, or to wait for that one's restart."""
_PAGE: Final = 256
_IN_MEMORY: Final = 20_000
"""Most deliveries held in memory, over all channels; the others wait in the table."""
_OF_ONE_CHANNEL: Final = 4096
_SHARES: Final = 64
"""A channel that holds less than one in so many of them gets in although others have filled the memory: adapters that
acknowledge nothing cost nobody else's theirs.
"""
_RECENT_PROCESSED: Final = 100_000
_CHOICES: Final = 4096
"""Most sessions whose stream is remembered: about 100 bytes each, kept by idle ones too, and one hash makes it anew."""

log = structlog.get_logger(__name__)

DELIVERED = counter("soma_router_deliveries_total", "Deliveries by what became of them.", ["result"])
_ACKED, _RETURNED, _DEAD, _TIMED_OUT = (DELIVERED.labels(r) for r in ("acked", "returned", "dead_letter", "timed_out"))
WAITING = gauge("soma_router_deliveries_waiting", "Deliveries held in memory.")

ChannelKey = tuple[str, str]


@dataclass(slots=True, eq=False)
class _Pending:
    """A delivery that is not acknowledged."""

    partition: Partition
    position: int
    delivery: Delivery
    key: ChannelKey
    session_id: bytes
    stream: AdapterStream | None = None
    """Who has it in hand."""
    sent_at: float = 0.0
    not_before: float = 0.0
    awaits: str = ""
    """The instance that had it when its stream went away: it may have processed it, so until `not_before` only it is
    given it again."""
    tries: int = 0


@dataclass(slots=True)
class _Line:
    """The deliveries of one session, the first of which may be in hand."""

    items: deque[_Pending] = field(default_factory=deque)
    queued_at: AdapterStream | None = None


@dataclass(slots=True)
class _Backlog:
    """A channel of a partition whose newest deliveries are only in the table."""

    after: int
    """Position up to which memory has them."""
    grown: int = 0
    """Counts deliveries that went to the table only, to see whether a page was the last."""
    loading: bool = False


class DeliveryDesk:
    """Deliveries in memory, adapter streams, and the backlog in the table."""

    def __init__(
        self,
        state: RouterState,
        history: HistoryStore,
        outbox: Outbox,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        *,
        ack_wait_s: float,
        max_tries: int,
        retry_s: float,
    ) -> None:
        self._state = state
        self._history = history
        self._outbox = outbox
        self._spawn = spawn
        self._ack_wait_s = ack_wait_s
        self._max_tries = max_tries
        self._retry_s = retry_s
        self._streams: dict[ChannelKey, dict[int, AdapterStream]] = {}
        self._gateways: dict[tuple[str, str], float] = {}
        """(gateway, tenant) -> when it was last heard."""
        self._losses: dict[tuple[str, str], tuple[int, int]] = {}
        """(gateway, tenant) -> how often it had lost the bus by then, and how often this router had."""
        self._lines: dict[bytes, _Line] = {}
        self._by_id: dict[bytes, _Pending] = {}
        self._held: Counter[ChannelKey] = Counter()
        """Deliveries in memory by channel."""
        self._backlogs: dict[tuple[int, ChannelKey], _Backlog] = {}
        self._paged: dict[tuple[int, ChannelKey], int] = {}
        """Position up to which a channel of a partition was read from the table."""
        self._choices: dict[bytes, AdapterStream] = {}
        self._delayed: OrderedDict[bytes, None] = OrderedDict()
        self._processed: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        """Deliveries, with their tenant, that adapters say they have processed, and that may still be in the table."""
        WAITING.set_function(lambda: len(self._by_id))
        self.committer: GroupCommitter
        self.on_arrival: Callable[[str, str, set[int]], None] = lambda tenant, channel, streams: None
        """Told of adapter streams that are new on a channel."""

    # ---- what is to be delivered

    def add(self, item: EndItem | RefusalItem) -> None:
        """An outcome is durable: hands it over, or leaves it to the backlog."""
        if not item.turn.deliver:
            return
        session = item.turn.session
        key = (session.key.tenant, session.key.channel)
        if item.position <= self._paged.get((item.partition.id, key), 0):
            return  # a page that was read after the commit has brought it already
        backlog = self._backlogs.get((item.partition.id, key))
        if backlog is not None:
            backlog.grown += 1
            return
        if key not in self._streams or not self._has_room(key):
            self._backlogs[item.partition.id, key] = _Backlog(item.position - 1, 1)
            return
        self._append(_Pending(item.partition, item.position, item.answer, key, session.id))

    def adopt(self, partition: Partition, channels: list[ChannelKey]) -> None:
        """A partition was taken over: everything undelivered in it is backlog."""
        for key in channels:
            self._backlogs[partition.id, key] = _Backlog(0, 1)
            self._page(partition, key)

    def drop(self, partition: Partition) -> None:
        """A partition is lost: its deliveries are the new owner's."""
        for key in [key for key in self._backlogs if key[0] == partition.id]:
            del self._backlogs[key]
        for key in [key for key in self._paged if key[0] == partition.id]:
            del self._paged[key]
        had: list[AdapterStream] = []
        for session_id, line in list(self._lines.items()):
            if line.items and line.items[0].partition is partition:
                del self._lines[session_id]
                if line.items[0].stream is not None:
                    had.append(line.items[0].stream)
                for pending in line.items:
                    self._forget(pending)
                    self._take_back(pending)
        for stream in had:
            self._fill(stream)

    def adapter_of(self, session: Session) -> tuple[str, int] | None:
        """The adapter stream that wants the live events of a session."""
        chosen = self._choose(session.id, (session.key.tenant, session.key.channel))
        return (chosen.gateway, chosen.stream) if chosen is not None and chosen.live else None

    def _append(self, pending: _Pending) -> None:
        processed = (pending.key[0], pending.delivery.delivery_id)
        if processed in self._processed:
            del self._processed[processed]
            self.committer.put_later(AckItem(pending.partition, pending.position, pending.key[0]))
            return
        line = self._lines.get(pending.session_id)
        if line is None:
            line = self._lines[pending.session_id] = _Line()
        line.items.append(pending)
        self._held[pending.key] += pending.delivery.delivery_id not in self._by_id
        self._by_id[pending.delivery.delivery_id] = pending
        if len(line.items) == 1:
            self._send(line)

    def _forget(self, pending: _Pending) -> None:
        if self._by_id.pop(pending.delivery.delivery_id, None) is None:
            return
        self._held[pending.key] -= 1
        if not self._held[pending.key]:
            del self._held[pending.key]

    def _has_room(self, key: ChannelKey, more: int = 1) -> bool:
        """Whether so many more deliveries of a channel fit in memory."""
        held = self._held[key]
        if held + more <= _IN_MEMORY // _SHARES:
            return True
        return held + more <= _OF_ONE_CHANNEL and len(self._by_id) + more <= _IN_MEMORY

    def _send(self, line: _Line) -> None:
        """Hands the first delivery of a session over, if somebody can take it."""
        pending = line.items[0]
        if pending.stream is not None or line.queued_at is not None:
            return
        if pending.not_before > monotonic():
            streams = self._streams.get(pending.key, {}).values()
            stream = next((s for s in streams if s.instance == pending.awaits), None)
        else:
            stream = self._choose(pending.session_id, pending.key)
        if stream is None:
            return
        pending.awaits = ""
        if not stream.has_room:
            stream.waiting.append(pending.session_id)
            line.queued_at = stream
            return
        pending.stream = stream
        pending.sent_at = monotonic()
        pending.tries += 1
        pending.delivery.attempt = pending.tries
        stream.in_flight += 1
        self._outbox.hand_over(pending.key[0], stream.gateway, stream.stream, pending.delivery)

    def _choose(self, session_id: bytes, key: ChannelKey) -> AdapterStream | None:
        """The stream for a session; remembered until the streams change, because it is asked several times per turn."""
        streams = self._streams.get(key)
        if not streams:
            return None
        stream = self._choices.get(session_id)
        if stream is None:
            stream = choose(session_id, streams.values())
            if stream is not None:
                if len(self._choices) >= _CHOICES:
                    self._choices.clear()
                self._choices[session_id] = stream
        return stream

    # ---- what adapters say

    def on_acks(self, tenant: str, batch: AckBatch) -> None:
        """Deliveries were processed, or come back."""
        acked = 0
        for delivery_id in batch.acks:
            pending = self._by_id.get(delivery_id)
            if pending is not None and pending.key[0] == tenant:
                acked += 1
                self._settle(pending, AckItem(pending.partition, pending.position, tenant))
        _ACKED.inc(acked)
        for returned in batch.returns:
            pending = self._by_id.get(returned.delivery_id)
            if pending is None or pending.key[0] != tenant or pending.stream is None:
                continue
            _RETURNED.inc()
            if not returned.counts:
                pending.tries -= 1
            if pending.tries >= self._max_tries:
                self._give_up(pending, returned.cause)
            else:
                self._delay(pending, returned.delay_ms / 1000 or self._retry_s)

    def _settle(self, pending: _Pending, item: AckItem) -> None:
        self._forget(pending)
        stream = pending.stream
        self._take_back(pending)
        line = self._lines.get(pending.session_id)
        if line is not None and pending in line.items:
            line.items.remove(pending)  # not always the first: an adapter names what it has processed in any order
            if line.items:
                self._send(line)
            else:
                del self._lines[pending.session_id]
        self.committer.put_later(item)
        if stream is not None:
            self._fill(stream)
        if self._backlogs:
            self._page(pending.partition, pending.key)

    def _give_up(self, pending: _Pending, cause: str) -> None:
        _DEAD.inc()
        log.warning("router.delivery_dead", tenant=pending.key[0], turn=pending.delivery.turn_id.hex(), cause=cause)
        item = AckItem(
            pending.partition, pending.position, pending.key[0], pending.delivery, cause or "tried too often"
        )
        self._settle(pending, item)

    def _delay(self, pending: _Pending, delay_s: float) -> None:
        stream = pending.stream
        self._take_back(pending)
        pending.not_before = monotonic() + delay_s
        self._delayed[pending.session_id] = None
        if stream is not None:
            self._fill(stream)

    def _take_back(self, pending: _Pending) -> None:
        if pending.stream is not None:
            pending.stream.in_flight -= 1
            pending.stream = None

    def _fill(self, stream: AdapterStream) -> None:
        """Gives a stream that has room the sessions that waited for it."""
        while stream.waiting and stream.has_room:
            line = self._lines.get(stream.waiting.pop(0))
            if line is not None and line.queued_at is stream:
                line.queued_at = None
                self._send(line)

    # ---- who is there

    def on_presence(self, tenant: str, presence: Presence, grace_s: float = STREAM_GRACE_S) -> None:
        """A gateway says which adapters of a tenant it has. What those had in hand that are gone waits `grace_s` for
        their instances to come back, here or elsewhere.
        """
        gateway = presence.gateway
        if presence.streams:
            self._gateways[gateway, tenant] = monotonic()
        else:
            self._gateways.pop((gateway, tenant), None)
        announced = {stream.stream: stream for stream in presence.streams}
        for streams in [s for (t, _), s in self._streams.items() if t == tenant]:
            for known in [s for s in streams.values() if s.gateway == gateway and s.stream not in announced]:
                self._leave(known, grace_s)
        changed: set[ChannelKey] = set()
        arrived: set[int] = set()
        for number, stream in announced.items():
            for delivery_id in stream.processed:
                self._was_processed(tenant, delivery_id)
            key = (tenant, stream.channel)
            streams = self._streams.setdefault(key, {})
            known_stream = streams.get(number)
            if known_stream is None:
                others = [s for s in streams.values() if s.instance == stream.instance]
                if any(s.stream > number for s in others):
                    continue  # the same instance has a newer stream at another gateway
                for older in others:
                    self._leave(older, STREAM_GRACE_S)
                streams[number] = AdapterStream(
                    gateway, number, tenant, stream.channel, stream.instance, stream.window, stream.live
                )
                self._choices.clear()
                changed.add(key)
                arrived.add(number)
            elif known_stream.window != stream.window:
                self._resize(known_stream, stream.window)
                changed.add(key)
        for key in [key for key, streams in self._streams.items() if not streams]:
            del self._streams[key]
        for key in changed:
            self._wake(key)
            self.on_arrival(*key, arrived)
        self._check_losses(tenant, presence)

    def _check_losses(self, tenant: str, presence: Presence) -> None:
        """Hands over again what a gateway has in hand if its connection to the bus was lost since it was last heard,
        or ours: the bus keeps nothing. Now that it is heard, both are back; what it has got it drops.
        """
        place = (presence.gateway, tenant)
        losses = (presence.losses, self._outbox.losses)
        before = self._losses.get(place, losses)
        if presence.streams:
            self._losses[place] = losses
        else:
            self._losses.pop(place, None)
        if before == losses:
            return
        for pending in self._by_id.values():
            stream = pending.stream
            if stream is not None and (stream.gateway, stream.tenant) == place:
                self._outbox.hand_over(tenant, stream.gateway, stream.stream, pending.delivery)

    def _resize(self, stream: AdapterStream, window: int) -> None:
        """A stream takes more or less; sessions that wait there are to be woken and choose anew."""
        stream.window = window
        stream.waiting.clear()
        for line in self._lines.values():
            if line.queued_at is stream:
                line.queued_at = None
        self._choices.clear()

    def _was_processed(self, tenant: str, delivery_id: bytes) -> None:
        pending = self._by_id.get(delivery_id)
        if pending is not None and pending.key[0] == tenant:
            self._settle(pending, AckItem(pending.partition, pending.position, tenant))
        else:
            self._processed[tenant, delivery_id] = None
            while len(self._processed) > _RECENT_PROCESSED:
                self._processed.popitem(last=False)

    def _leave(self, stream: AdapterStream, grace_s: float) -> None:
        """An adapter is gone: what waited for it goes to others; what it had in hand too, unless its instance is back
        in time.
        """
        streams = self._streams.get((stream.tenant, stream.channel), {})
        streams.pop(stream.stream, None)
        self._choices.clear()
        freed = [line for line in self._lines.values() if line.items[0].stream is stream or line.queued_at is stream]
        stream.waiting.clear()
        for line in freed:
            line.queued_at = None
            if line.items[0].stream is stream:
                pending = line.items[0]
                pending.tries -= 1
                self._take_back(pending)
                pending.awaits, pending.not_before = stream.instance, monotonic() + grace_s
                self._delayed[pending.session_id] = None
            self._send(line)

    def _wake(self, key: ChannelKey) -> None:
        for line in list(self._lines.values()):
            if line.items and line.items[0].key == key:
                self._send(line)
        for partition_id, backlog_key in list(self._backlogs):
            partition = self._state.partitions.get(partition_id)
            if backlog_key == key and partition is not None:
                self._page(partition, key)

    def sweep(self) -> None:
        """Notices silent gateways and adapters that do not acknowledge, and sends what was delayed. Called twice a
        second.
        """
        now = monotonic()
        for gateway, tenant in [k for k, heard in self._gateways.items() if heard < now - PRESENCE_S]:
            log.warning("router.gateway_silent", gateway=gateway, tenant=tenant)
            self.on_presence(tenant, Presence(gateway=gateway), GATEWAY_GRACE_S)
        for session_id in list(self._delayed):
            line = self._lines.get(session_id)
            if line is None:
                del self._delayed[session_id]
            elif line.items[0].not_before <= now:
                del self._delayed[session_id]
                self._send(line)
        for partition_id, key in list(self._backlogs):
            if partition_id in self._state.partitions:
                self._page(self._state.partitions[partition_id], key)
        late = now - self._ack_wait_s
        for pending in [p for p in self._by_id.values() if p.stream is not None and p.sent_at < late]:
            _TIMED_OUT.inc()
            if pending.tries >= self._max_tries:
                self._give_up(pending, "the adapter did not acknowledge it in time")
            else:
                self._delay(pending, 0.0)

    # ---- the backlog

    def _page(self, partition: Partition, key: ChannelKey) -> None:
        """Brings the next deliveries of a channel into memory, if there is an adapter and room."""
        backlog = self._backlogs.get((partition.id, key))
        if backlog is None or backlog.loading or key not in self._streams or not self._has_room(key, _PAGE):
            return
        backlog.loading = True
        self._spawn(self._load(partition, key, backlog))

    async def _load(self, partition: Partition, key: ChannelKey, backlog: _Backlog) -> None:
        grown = backlog.grown
        try:
            page = await self._history.deliveries(key[0], partition.id, key[1], backlog.after, _PAGE)
        except StoreLost:
            return
        finally:
            backlog.loading = False
        if partition.lost or self._backlogs.get((partition.id, key)) is not backlog:
            return
        if len(page) < _PAGE and backlog.grown == grown:
            del self._backlogs[partition.id, key]
        for stored in page:
            backlog.after = self._paged[partition.id, key] = stored.position
            delivery = Delivery.FromString(stored.payload)
            self._append(_Pending(partition, stored.position, delivery, key, stored.session_id))
        if backlog.grown != grown and len(page) < _PAGE:
            self._page(partition, key)
