"""Core NATS: deliveries and live events out to gateways and watchers; acks, presence and watch queries in.

Nothing sent here is promised to arrive: what must arrive is in PostgreSQL until it is acknowledged. A router whose
lease is overdue says nothing at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from soma.common.v1.turn_pb2 import Delivery, LiveEvent
from soma.router.v1.outbound_pb2 import (
    AckBatch,
    Handover,
    LiveBatch,
    LiveHandover,
    OutBatch,
    Presence,
    WatchQuery,
    WatchSnapshot,
)

from soma_common.failpoints import failpoint
from soma_common.nats import direct, subjects
from soma_common.telemetry import spans
from soma_common.telemetry.metrics import counter

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

    from services.router.application.deliver_outcomes import DeliveryDesk

_BATCH_ITEMS: Final = 256
_BATCH_BYTES: Final = 512 * 1024
_MAX_QUESTIONS: Final = 1024
"""Questions of watchers that may wait for the store at once; further ones are not answered."""

log = structlog.get_logger(__name__)

LOST = counter("soma_router_exchange_lost_total", "Batches that could not be handed to the bus.")


class NatsOutbox:
    """Gathers what goes to each gateway and each watched session, and publishes it with the loop's next turn."""

    def __init__(self, client: Client, router: str, may_speak: Callable[[], bool]) -> None:
        self._client = client
        self._router = router
        self._may_speak = may_speak
        self._out: dict[tuple[str, str], OutBatch] = {}
        self._live: dict[tuple[str, bytes], LiveBatch] = {}
        self._wake = asyncio.Event()

    @property
    def losses(self) -> int:
        """How often the connection was lost and made again."""
        return self._client.stats["reconnects"]

    def hand_over(self, tenant: str, gateway: str, stream: int, delivery: Delivery) -> None:
        """Sends an outcome to an adapter stream."""
        if spans.watched:
            spans.stage("router.callbacks", (delivery.turn_id,))
        self._batch(tenant, gateway).deliveries.add(stream=stream, delivery=delivery)
        self._wake.set()

    def for_adapter(self, tenant: str, gateway: str, stream: int) -> LiveEvent:
        """A live event that goes to an adapter stream with the next batch: to be filled at once."""
        self._wake.set()
        handover = self._batch(tenant, gateway).live.add()
        handover.stream = stream
        return handover.event

    def for_watchers(self, tenant: str, session_id: bytes) -> LiveEvent:
        """A live event that goes to all watchers of a session with the next batch: to be filled at once."""
        batch = self._live.get((tenant, session_id))
        if batch is None:
            batch = self._live[tenant, session_id] = LiveBatch()
        self._wake.set()
        return batch.events.add()

    def _batch(self, tenant: str, gateway: str) -> OutBatch:
        batch = self._out.get((tenant, gateway))
        if batch is None:
            batch = self._out[tenant, gateway] = OutBatch(router=self._router)
        return batch

    async def run(self) -> None:
        """Publishes until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            out, self._out = self._out, {}
            live, self._live = self._live, {}
            if not self._may_speak():
                continue
            failpoint("router.before_handover")
            failed = [
                await self._publish(subjects.outbound(tenant, gateway), part)
                for (tenant, gateway), batch in out.items()
                for part in _parts(batch)
            ] + [
                await self._publish(subjects.live(tenant, session_id), part)
                for (tenant, session_id), events in live.items()
                for part in _live_parts(events)
            ]
            failpoint("router.after_handover")
            errors = [error for error in failed if error]
            if errors:
                LOST.inc(len(errors))
                log.warning("router.exchange_lost", batches=len(errors), error=errors[0])

    async def _publish(self, subject: str, batch: bytes) -> str:
        """Sends one batch. Returns why it could not be: what is wrong with one must not cost the others theirs."""
        try:
            await self._client.publish(subject, batch)
        except (NatsError, OSError) as error:
            return str(error) or type(error).__name__
        return ""


def _parts(batch: OutBatch) -> Iterator[bytes]:
    """A batch in pieces that fit the bus, serialized: nearly always it is one, so its size is not asked first."""
    if spans.watched:
        spans.stage("router.outbox", (handover.delivery.turn_id for handover in batch.deliveries))
    whole = batch.SerializeToString()
    if len(whole) <= _BATCH_BYTES and len(batch.deliveries) + len(batch.live) <= _BATCH_ITEMS:
        yield whole
        return
    part, size = OutBatch(router=batch.router), 0
    items: list[Handover | LiveHandover] = [*batch.deliveries, *batch.live]
    for item in items:
        more = item.ByteSize()
        if size and (size + more > _BATCH_BYTES or len(part.deliveries) + len(part.live) >= _BATCH_ITEMS):
            yield part.SerializeToString()
            part, size = OutBatch(router=batch.router), 0
        size += more
        if isinstance(item, Handover):
            part.deliveries.append(item)
        else:
            part.live.append(item)
    yield part.SerializeToString()


def _live_parts(batch: LiveBatch) -> Iterator[bytes]:
    """The events of one session in pieces that fit the bus, serialized."""
    whole = batch.SerializeToString()
    if len(whole) <= _BATCH_BYTES:
        yield whole
        return
    part, size = LiveBatch(), 0
    for event in batch.events:
        more = event.ByteSize()
        if size and size + more > _BATCH_BYTES:
            yield part.SerializeToString()
            part, size = LiveBatch(), 0
        size += more
        part.events.append(event)
    yield part.SerializeToString()


class NatsInbox:
    """What gateways and watchers say to this router."""

    def __init__(
        self,
        client: Client,
        router: str,
        desk: DeliveryDesk,
        query: Callable[[str, int, WatchQuery], Awaitable[WatchSnapshot | None]],
    ) -> None:
        self._client = client
        self._router = router
        self._desk = desk
        self._query = query
        self._subscriptions: list[Subscription] = []
        self._answering: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Subscribes. Watch queries come to every router; only the owner of the partition answers."""
        for subject, handler in (
            (subjects.acks("*", self._router), self._on_acks),
            (subjects.presence("*", "*"), self._on_presence),
            ("soma.*.watch.*", self._on_watch),
        ):
            self._subscriptions.append(await direct.subscribe(self._client, subject, handler))

    async def close(self) -> None:
        """Unsubscribes."""
        for task in self._answering:
            task.cancel()
        for subscription in self._subscriptions:
            try:
                await subscription.unsubscribe()
            except NatsError:
                log.debug("router.unsubscribe_failed", subject=subscription.subject)

    def _on_acks(self, message: Msg) -> None:
        try:
            batch = AckBatch.FromString(message.data)
        except DecodeError:
            log.warning("router.undecodable", subject=message.subject)
            return
        if spans.watched:
            spans.stage("router.acked", batch.acks, last=True)
        self._desk.on_acks(subjects.tenant_of(message.subject), batch)

    def _on_presence(self, message: Msg) -> None:
        try:
            presence = Presence.FromString(message.data)
        except DecodeError:
            log.warning("router.undecodable", subject=message.subject)
            return
        self._desk.on_presence(subjects.tenant_of(message.subject), presence)

    def _on_watch(self, message: Msg) -> None:
        try:
            query = WatchQuery.FromString(message.data)
            partition = int(message.subject.rsplit(".", 1)[1])
        except (DecodeError, ValueError):
            log.warning("router.undecodable", subject=message.subject)
            return
        if len(self._answering) >= _MAX_QUESTIONS:
            return  # the watcher asks again
        # Beside each other: an answer may wait for the store, and other watchers must not wait for that.
        task = asyncio.get_running_loop().create_task(self._answer(message, partition, query))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, message: Msg, partition: int, query: WatchQuery) -> None:
        answer = await self._query(subjects.tenant_of(message.subject), partition, query)
        if answer is None or not message.reply:
            return
        try:
            await self._client.publish(message.reply, answer.SerializeToString())
        except (NatsError, OSError) as error:
            log.debug("router.answer_lost", error=repr(error))  # the watcher asks again
