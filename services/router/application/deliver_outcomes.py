"""Hands outcomes to the channel's adapters: in order per session, the next after the acknowledgement of the former.

The deliveries table is the truth: what is in it is not acknowledged. Memory holds deliveries only for channels that
have an adapter which takes any, and only so much (`DeliveryRoom`); what does not fit is paged in from the table
(`Backlog`). What is in memory when the last such adapter goes is left to the table a little later (`LEFT_S`), so a
vanished adapter costs nothing but rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import structlog
from soma.router.v1.outbound_pb2 import AckBatch, Presence

from services.router.application.delivery_lines import Backlog, Channel, ChannelKey, Line, Pending
from services.router.application.outcomes import AckItem, EndItem, RefusalItem
from services.router.application.read_backlogs import BacklogReader
from services.router.domain.adapters import AdapterStream, choose
from services.router.domain.delivery_room import DeliveryRoom
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
LEFT_S: Final = 5.0
"""How long a channel's deliveries stay in memory when nobody takes any: longer than anything waits for an instance."""
_RECENT_PROCESSED: Final = 100_000
_TRIED: Final = 20_000
"""Most deliveries in the table only whose tries are remembered."""
_CHOICES: Final = 4096
"""Most sessions whose stream is remembered: about 100 bytes each, kept by idle ones too, and one hash makes it anew."""

log = structlog.get_logger(__name__)

DELIVERED = counter("soma_router_deliveries_total", "Deliveries by what became of them.", ["result"])
_ACKED, _RETURNED, _DEAD, _TIMED_OUT = (DELIVERED.labels(r) for r in ("acked", "returned", "dead_letter", "timed_out"))
WAITING = gauge("soma_router_deliveries_waiting", "Deliveries held in memory.")


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
        room: DeliveryRoom | None = None,
    ) -> None:
        self._state = state
        self._outbox = outbox
        self._ack_wait_s = ack_wait_s
        self._max_tries = max_tries
        self._retry_s = retry_s
        self._room = room = room or DeliveryRoom()
        self._streams: dict[ChannelKey, dict[int, AdapterStream]] = {}
        """Never an empty one."""
        self._streams_at: dict[tuple[str, str], dict[int, AdapterStream]] = {}
        """The same by (gateway, tenant)."""
        self._gateways: dict[tuple[str, str], float] = {}
        """(gateway, tenant) -> when it was last heard."""
        self._losses: dict[tuple[str, str], tuple[int, int]] = {}
        """(gateway, tenant) -> how often it had lost the bus by then, and how often this router had."""
        self._channels: dict[ChannelKey, Channel] = {}
        """Those that have anything in memory or in the table."""
        self._served: set[ChannelKey] = set()
        """Channels with an adapter that takes deliveries, or did a moment ago."""
        self._by_id: dict[bytes, Pending] = {}
        self._backlogs = BacklogReader(state, history, spawn, room, self._served, self._append)
        self._choices: dict[bytes, AdapterStream] = {}
        self._delayed: dict[bytes, Channel] = {}
        """Sessions whose first delivery is to wait, with their channel."""
        self._tried: dict[bytes, tuple[int, float]] = {}
        """Of deliveries that were in memory and are in the table only: how often they were tried, and until when they
        are to wait.
        """
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
        channel = self._channels.get(key) or self._channel(key)
        partition = item.partition
        if item.position <= channel.paged.get(partition.id, 0):
            return  # a page that was read after the commit has brought it already
        size = item.answer.ByteSize()
        backlog = channel.backlogs.get(partition.id)
        if backlog is not None:
            backlog.grow(size)
            return
        if channel.key not in self._served or not self._room.fits(channel.share, size):
            backlog = channel.backlogs[partition.id] = Backlog(item.position - 1, size, size)
            self._backlogs.read(partition, channel, backlog)
            return
        self._append(Pending(partition, item.position, item.answer, size, channel, session.id))

    def adopt(self, partition: Partition, channels: list[ChannelKey]) -> None:
        """A partition was taken over: everything undelivered in it is backlog."""
        for key in channels:
            channel = self._channel(key)
            backlog = channel.backlogs[partition.id] = Backlog(0)
            self._backlogs.read(partition, channel, backlog)

    def drop(self, partition: Partition) -> None:
        """A partition is lost: its deliveries are the new owner's."""
        had: list[AdapterStream] = []
        for channel in self._channels.values():
            channel.backlogs.pop(partition.id, None)
            channel.paged.pop(partition.id, None)
            for session_id, line in list(channel.lines.items()):
                first = line.items[0]
                if first.partition is partition:
                    del channel.lines[session_id]
                    if first.stream is not None:
                        had.append(first.stream)
                    for pending in line.items:
                        self._forget(pending)
                        self._take_back(pending)
        for stream in had:
            self._fill(stream)
        self._backlogs.room_came()

    def adapter_of(self, session: Session) -> tuple[str, int] | None:
        """The adapter stream that wants the live events of a session."""
        chosen = self._choose(session.id, (session.key.tenant, session.key.channel))
        return (chosen.gateway, chosen.stream) if chosen is not None and chosen.live else None

    def _channel(self, key: ChannelKey) -> Channel:
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = Channel(key, self._room.share(key[0]))
        return channel

    def _append(self, pending: Pending) -> None:
        delivery_id = pending.delivery.delivery_id
        channel = pending.channel
        processed = (channel.key[0], delivery_id)
        if processed in self._processed:
            del self._processed[processed]
            self.committer.put_later(AckItem(pending.partition, pending.position, channel.key[0]))
            return
        line = channel.lines.get(pending.session_id)
        if line is None:
            line = channel.lines[pending.session_id] = Line()
        line.items.append(pending)
        self._by_id[delivery_id] = pending
        self._room.take(channel.share, 1, pending.size)
        if self._tried and delivery_id in self._tried:
            pending.tries, not_before = self._tried.pop(delivery_id)
            if len(line.items) == 1:
                pending.not_before = not_before
                self._delayed[pending.session_id] = channel
        if len(line.items) == 1:
            self._send(line)

    def _forget(self, pending: Pending) -> None:
        self._by_id.pop(pending.delivery.delivery_id, None)
        self._room.give_back(pending.channel.share, 1, pending.size)

    def _send(self, line: Line) -> None:
        """Hands the first delivery of a session over, if somebody can take it."""
        pending = line.items[0]
        if pending.stream is not None or line.queued_at is not None:
            return
        if pending.not_before > monotonic():
            streams = self._streams.get(pending.key, {}).values()
            stream = next((s for s in streams if s.instance == pending.awaits and s.window > 0), None)
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
        stream.in_hand[pending.session_id] = None
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

    def _settle(self, pending: Pending, item: AckItem) -> None:
        self._forget(pending)
        stream = pending.stream
        self._take_back(pending)
        channel = pending.channel
        line = channel.lines.get(pending.session_id)
        if line is not None and pending in line.items:
            line.items.remove(pending)  # not always the first: an adapter names what it has processed in any order
            if line.items:
                self._send(line)
            else:
                del channel.lines[pending.session_id]
        self.committer.put_later(item)
        if stream is not None:
            self._fill(stream)
        self._backlogs.room_came(channel)

    def _give_up(self, pending: Pending, cause: str) -> None:
        _DEAD.inc()
        log.warning("router.delivery_dead", tenant=pending.key[0], turn=pending.delivery.turn_id.hex(), cause=cause)
        item = AckItem(
            pending.partition, pending.position, pending.key[0], pending.delivery, cause or "tried too often"
        )
        self._settle(pending, item)

    def _delay(self, pending: Pending, delay_s: float) -> None:
        stream = pending.stream
        self._take_back(pending)
        pending.not_before = monotonic() + delay_s
        self._delayed[pending.session_id] = pending.channel
        if stream is not None:
            self._fill(stream)

    def _take_back(self, pending: Pending) -> None:
        if pending.stream is not None:
            del pending.stream.in_hand[pending.session_id]
            pending.stream = None

    def _fill(self, stream: AdapterStream) -> None:
        """Gives a stream that has room the sessions that waited for it."""
        if not stream.waiting:
            return
        lines = self._lines(stream)
        while stream.waiting and stream.has_room:
            line = lines.get(stream.waiting.popleft())
            if line is not None and line.queued_at is stream:
                line.queued_at = None
                self._send(line)

    def _lines(self, stream: AdapterStream) -> dict[bytes, Line]:
        """The lines of the channel that a stream serves."""
        channel = self._channels.get((stream.tenant, stream.channel))
        return channel.lines if channel is not None else {}

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
        known = self._streams_at.get((gateway, tenant), {})
        gone = [s for s in known.values() if s.stream not in announced or announced[s.stream].channel != s.channel]
        self._leave(gone, grace_s)
        changed: set[ChannelKey] = set()
        arrived: set[int] = set()
        for number, stream in announced.items():
            for delivery_id in stream.processed:
                self._was_processed(tenant, delivery_id)
            key = (tenant, stream.channel)
            streams = self._streams.get(key, {})
            known_stream = streams.get(number)
            if known_stream is None:
                others = [s for s in streams.values() if s.instance == stream.instance]
                if any(s.stream > number for s in others):
                    continue  # the same instance has a newer stream at another gateway
                self._leave(others, STREAM_GRACE_S)
                self._enter(
                    AdapterStream(gateway, number, tenant, stream.channel, stream.instance, stream.window, stream.live)
                )
                changed.add(key)
                arrived.add(number)
            elif known_stream.window != stream.window:
                self._resize(known_stream, stream.window)
                changed.add(key)
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
        for stream in self._streams_at.get(place, {}).values():
            lines = self._lines(stream)
            for session_id in stream.in_hand:
                self._outbox.hand_over(tenant, stream.gateway, stream.stream, lines[session_id].items[0].delivery)

    def _resize(self, stream: AdapterStream, window: int) -> None:
        """A stream takes more or less; sessions that wait there are to be woken and choose anew."""
        if (stream.window > 0) != (window > 0):
            self._choices.clear()
        stream.window = window
        self._unqueue(stream)
        if window > 0:
            self._served.add((stream.tenant, stream.channel))

    def _unqueue(self, stream: AdapterStream) -> list[Line]:
        """The lines that waited for room at a stream, and do so no more."""
        lines = self._lines(stream)
        freed = []
        for session_id in stream.waiting:
            line = lines.get(session_id)
            if line is not None and line.queued_at is stream:
                line.queued_at = None
                freed.append(line)
        stream.waiting.clear()
        return freed

    def _was_processed(self, tenant: str, delivery_id: bytes) -> None:
        pending = self._by_id.get(delivery_id)
        if pending is not None and pending.key[0] == tenant:
            self._settle(pending, AckItem(pending.partition, pending.position, tenant))
        else:
            self._processed[tenant, delivery_id] = None
            while len(self._processed) > _RECENT_PROCESSED:
                self._processed.popitem(last=False)

    def _enter(self, stream: AdapterStream) -> None:
        self._streams.setdefault((stream.tenant, stream.channel), {})[stream.stream] = stream
        self._streams_at.setdefault((stream.gateway, stream.tenant), {})[stream.stream] = stream
        self._choices.clear()
        if stream.window > 0:
            self._served.add((stream.tenant, stream.channel))

    def _leave(self, gone: list[AdapterStream], grace_s: float) -> None:
        """Adapters are gone, all at once, so that nothing is given to one that is about to be found gone. What waited
        for them goes to others; what they had in hand too, unless the instance is back in time.
        """
        for stream in gone:
            for index, place in (
                (self._streams, (stream.tenant, stream.channel)),
                (self._streams_at, (stream.gateway, stream.tenant)),
            ):
                del index[place][stream.stream]
                if not index[place]:
                    del index[place]
            self._choices.clear()
            if (stream.tenant, stream.channel) not in self._streams:
                self._served.discard((stream.tenant, stream.channel))
        freed: list[Line] = []
        not_before = monotonic() + grace_s
        for stream in gone:
            lines = self._lines(stream)
            for session_id in list(stream.in_hand):
                pending = lines[session_id].items[0]
                pending.tries -= 1
                self._take_back(pending)
                pending.awaits, pending.not_before = stream.instance, not_before
                self._delayed[session_id] = pending.channel
            freed += self._unqueue(stream)
        for line in freed:
            self._send(line)

    def _wake(self, key: ChannelKey) -> None:
        channel = self._channels.get(key)
        if channel is None:
            return
        for line in channel.lines.values():
            self._send(line)
        self._backlogs.read_all(channel)

    def sweep(self) -> None:
        """Notices silent gateways and adapters that do not acknowledge, and sends what was delayed. Called twice a
        second.
        """
        now = monotonic()
        for gateway, tenant in [k for k, heard in self._gateways.items() if heard < now - PRESENCE_S]:
            log.warning("router.gateway_silent", gateway=gateway, tenant=tenant)
            self.on_presence(tenant, Presence(gateway=gateway), GATEWAY_GRACE_S)
        for session_id, channel in list(self._delayed.items()):
            line = channel.lines.get(session_id)
            if line is None:
                del self._delayed[session_id]
            elif line.items[0].not_before <= now:
                del self._delayed[session_id]
                self._send(line)
        for channel in list(self._channels.values()):
            self._leave_to_table(channel, now)
        self._backlogs.sweep()
        for channel in list(self._channels.values()):
            self._backlogs.read_all(channel)
            self._tidy(channel)
        for pending in self._late(now - self._ack_wait_s):
            _TIMED_OUT.inc()
            if pending.tries >= self._max_tries:
                self._give_up(pending, "the adapter did not acknowledge it in time")
            else:
                self._delay(pending, 0.0)

    def _late(self, before: float) -> list[Pending]:
        """What was handed over before that time and is still in hand."""
        late = []
        for streams in self._streams.values():
            for stream in streams.values():
                lines = self._lines(stream)
                for session_id in stream.in_hand:
                    pending = lines[session_id].items[0]
                    if pending.sent_at >= before:
                        break
                    late.append(pending)
        return late

    def _leave_to_table(self, channel: Channel, now: float) -> None:
        """Lets go of what memory holds of a channel of which nobody has taken anything for a while."""
        streams = self._streams.get(channel.key, {}).values()
        if any(stream.window > 0 or stream.in_hand for stream in streams):
            channel.left_at = 0.0
            return
        channel.left_at = channel.left_at or now
        if now - channel.left_at < LEFT_S:
            return
        self._served.discard(channel.key)
        for line in channel.lines.values():
            for pending in line.items:
                self._forget(pending)
                channel.hand_back(pending)
                if pending.tries or pending.not_before > now:
                    self._tried[pending.delivery.delivery_id] = pending.tries, pending.not_before
        channel.lines.clear()
        while len(self._tried) > _TRIED:
            del self._tried[next(iter(self._tried))]

    def _tidy(self, channel: Channel) -> None:
        """Forgets a channel of which there is nothing."""
        if channel.share.items or channel.lines or channel.backlogs or channel.key in self._streams:
            return
        for number, position in channel.paged.items():
            partition = self._state.partitions.get(number)
            if partition is not None and partition.head < position:
                return  # an outcome was read from the table before the desk is told of it
        self._room.end(channel.share)
        del self._channels[channel.key]
