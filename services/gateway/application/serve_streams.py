"""The adapter streams of this gateway: who is connected, and what the routers know of it.

One instance has one stream: a second one replaces the first, whose call then has a moment to leave. Presence of a
tenant is announced every second and on each change: the first at once, those of the next moment together. A tenant
whose last stream left is announced once more, empty. The deliveries that a resuming instance says it has processed go
with the announcements of the stream's first seconds, in pieces that fit the bus.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from typing import Final

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.gateway.v1.channel_service_pb2 import Hello
from soma.router.v1.outbound_pb2 import OutBatch, Presence

from services.gateway.application.accept_message import AcceptMessage
from services.gateway.application.adapter_stream import AdapterStream, StreamBounds
from services.gateway.application.ports import BusSilent, Directory, Routers
from services.gateway.application.return_acks import ReturnAcks
from services.gateway.domain.refusal import Refused, draining, queue_full
from services.gateway.domain.stream_number import StreamNumbers

PROTOCOL: Final = 1
ANNOUNCE_S: Final = 1.0
"""At least so often; routers take a gateway that is silent for three seconds for gone."""
GATHER_S: Final = 0.005
STREAMS_RETRY_MS: Final = 1000
PROCESSED_S: Final = 3.0
PROCESSED_PER_ANNOUNCEMENT: Final = 16384
"""256 kB of delivery ids; a stream names at most 65536, so all have been told before PROCESSED_S is over."""


class ServeStreams:
    """Opens, finds and ends streams, and announces them."""

    def __init__(
        self,
        gateway: str,
        *,
        directory: Directory,
        accept: AcceptMessage,
        acks: ReturnAcks,
        routers: Routers,
        numbers: StreamNumbers,
        bounds: StreamBounds,
        clock: Callable[[], float],
    ) -> None:
        """`gateway` is this process's id: another one after each start, so that routers see a restart as a new
        gateway.
        """
        self.gateway = gateway
        self.bounds = bounds
        self._directory = directory
        self._accept = accept
        self._acks = acks
        self._routers = routers
        self._numbers = numbers
        self._clock = clock
        self._streams: dict[int, AdapterStream] = {}
        self._instances: dict[str, dict[tuple[str, str], dict[int, AdapterStream]]] = {}
        """By tenant, by channel and instance: the streams whose calls have not left. The newest is the last, those
        before it were replaced.
        """
        self._tenants: dict[str, dict[int, AdapterStream]] = {}
        self._dirty: set[str] = set()
        self._news = asyncio.Event()
        self._draining = False
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, hello: Hello) -> AdapterStream:
        """A new stream for an adapter; ends the one that the same instance has. Its call tells with `leave` that it is
        over, whatever became of the stream.

        The tenant's bound counts instances that have a call here. So an adapter that connects again finds its own
        place, and is not refused because of streams, its own or others', that were replaced and have yet to leave; a
        place is free when the last call of its instance has left. An instance has two calls at most: that of its
        stream, and that of the stream before, which has LAST_FRAMES_S to leave. If another is replaced within that
        time, the older one is cut, and leaves in the next rounds of the loop.

        Raises:
            Refused: the tenant is unknown or suspended or has as many instances connected as it may, the versions do
                not overlap, or the gateway is going away.
        """
        if self._draining:
            raise draining()
        if hello.protocol < PROTOCOL:
            raise Refused(
                ErrorReason.ERROR_REASON_PROTOCOL_VERSION,
                f"hello.protocol: {hello.protocol}; this gateway speaks {PROTOCOL}: set it, or use a newer client",
                metadata={"protocol": str(PROTOCOL)},
            )
        self._directory.check_tenant(hello.tenant)
        instances = self._instances.get(hello.tenant, {})
        name = (hello.channel, hello.instance)
        before = instances.get(name)
        if before is not None:
            self._replace(before)
        elif len(instances) >= self.bounds.tenant_streams:
            raise queue_full("gateway.tenant_streams", self.bounds.tenant_streams, STREAMS_RETRY_MS)
        stream = AdapterStream(
            self._numbers.next(),
            hello,
            accept=self._accept,
            acks=self._acks,
            bounds=self.bounds,
            clock=self._clock,
            changed=self._changed,
        )
        self._streams[stream.number] = stream
        self._empty.clear()
        self._instances.setdefault(stream.tenant, {}).setdefault(name, {})[stream.number] = stream
        self._tenants.setdefault(stream.tenant, {})[stream.number] = stream
        self._changed(stream)
        return stream

    def leave(self, stream: AdapterStream) -> None:
        """The stream's call is over: the routers hear of it, what it had not acknowledged goes back to them, and its
        place is free.
        """
        self._forget(stream)
        instances = self._instances.get(stream.tenant, {})
        name = (stream.channel, stream.instance)
        of_instance = instances.get(name, {})
        of_instance.pop(stream.number, None)
        if not of_instance:
            instances.pop(name, None)
        if not instances:
            self._instances.pop(stream.tenant, None)
        stream.leave()

    def hand_over(self, tenant: str, batch: OutBatch) -> None:
        """Gives deliveries and live events to their streams; what has no stream here goes back."""
        streams = self._tenants.get(tenant, {})
        for handover in batch.deliveries:
            stream = streams.get(handover.stream)
            if stream is not None:
                stream.offer(batch.router, handover.delivery)
            else:
                self._acks.give_back(
                    tenant,
                    batch.router,
                    handover.delivery.delivery_id,
                    delay_ms=0,
                    counts=False,
                    cause="the stream is gone",
                )
        for live in batch.live:
            stream = streams.get(live.stream)
            if stream is not None:
                stream.offer_live(live.event)

    async def run(self) -> None:
        """Announces and looks after the streams until cancelled."""
        interval = min(ANNOUNCE_S, self.bounds.heartbeat_s / 3)
        due = self._clock() + interval
        while True:
            try:
                async with asyncio.timeout(max(due - self._clock(), 0)):
                    await self._news.wait()
            except TimeoutError:
                due = self._clock() + interval
                self._dirty.update(self._tenants)
                for stream in list(self._streams.values()):
                    stream.tick()
            await self._announce()
            # The first is told at once; a crowd that comes back after it, together.
            await asyncio.sleep(GATHER_S)

    async def drain(self, grace_s: float) -> None:
        """Takes no new streams, tells the adapters to connect elsewhere, and waits until they have left, at most so
        long.
        """
        self._draining = True
        for stream in list(self._streams.values()):
            stream.drain(int(grace_s * 1000))
        if self._streams:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._empty.wait()
        for stream in list(self._streams.values()):
            stream.end(draining())

    async def farewell(self) -> None:
        """Tells the routers that no stream is here any more."""
        tenants = set(self._tenants) | self._dirty
        self._tenants.clear()
        self._dirty = tenants
        await self._announce()

    def _replace(self, of_instance: dict[int, AdapterStream]) -> None:
        """Ends the newest stream of an instance. All that are older than the two newest were cut already."""
        newest, *older = islice(reversed(of_instance.values()), 2)
        for stream in older:
            stream.cut()
        self._forget(newest)
        newest.end(_replaced(newest.instance))

    def _forget(self, stream: AdapterStream) -> None:
        """The stream gets nothing any more, and is not announced."""
        if self._streams.pop(stream.number, None) is None:
            return
        of_tenant = self._tenants.get(stream.tenant, {})
        of_tenant.pop(stream.number, None)
        if not of_tenant:
            self._tenants.pop(stream.tenant, None)
        if not self._streams:
            self._empty.set()
        self._changed(stream)

    def _changed(self, stream: AdapterStream) -> None:
        self._dirty.add(stream.tenant)
        self._news.set()

    async def _announce(self) -> None:
        self._news.clear()
        dirty, self._dirty = self._dirty, set()
        for tenant in dirty:
            presence = self._presence(tenant, self._tenants.get(tenant, {}).values())
            try:
                await self._routers.announce(tenant, presence)
            except BusSilent:
                continue  # told again within a second; until then the bus carries no deliveries either
            for announced in presence.streams:
                stream = self._streams.get(announced.stream)
                if stream is not None:
                    stream.told()

    def _presence(self, tenant: str, streams: Iterable[AdapterStream]) -> Presence:
        presence = Presence(gateway=self.gateway, losses=self._routers.losses)
        room = PROCESSED_PER_ANNOUNCEMENT
        for stream in streams:
            if not stream.takes_deliveries:
                continue
            presence.streams.add(
                stream=stream.number,
                channel=stream.channel,
                instance=stream.instance,
                window=stream.window,
                live=stream.live,
                processed=self._processed_part(stream, room),
            )
            room -= len(presence.streams[-1].processed)
            stream.announced()
        return presence

    def _processed_part(self, stream: AdapterStream, room: int) -> tuple[bytes, ...]:
        """The next piece of what the stream's instance has processed; pieces follow each other in a circle."""
        processed = stream.processed
        if not processed or room <= 0:
            return ()
        if self._clock() - stream.opened_at > PROCESSED_S:
            stream.processed = ()
            return ()
        part = processed[:room]
        stream.processed = processed[len(part) :] + part
        return part


def _replaced(instance: str) -> Refused:
    return Refused(
        ErrorReason.ERROR_REASON_ALREADY_EXISTS,
        f"replaced by a newer stream of instance {instance!r}: give each adapter process its own instance name",
        metadata={"instance": instance},
    )
