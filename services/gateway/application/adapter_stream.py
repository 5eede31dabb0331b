"""One adapter stream: frames in, frames out, and what connects them.

`receive` never waits for anything: it applies a frame, and after every few items lets other streams have theirs
applied, so that a flood of large frames holds up nobody. Everything for the adapter gathers in the next frame, which
one writer takes when the frame before is gone. So neither side waits for the other, and under load frames grow instead
of queues.

    receive(frame) -> acks, credit -> messages -> cancels       next_frame() <- receipts, refusals, deliveries, live
    events

Bounds: unanswered items (number and bytes), deliveries (DeliveryWindow), live events (dropped, they hold nothing
that a delivery does not). Receipts and refusals are bounded by the unanswered items.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Final

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery, LiveEvent
from soma.gateway.v1.channel_service_pb2 import Cancel, ConnectRequest, ConnectResponse, Hello, InboundMessage

from services.gateway.application.accept_message import AcceptMessage
from services.gateway.application.return_acks import ReturnAcks
from services.gateway.domain.admission import Submission
from services.gateway.domain.delivery_window import DeliveryWindow, Offer
from services.gateway.domain.refusal import Refused, protocol_order, queue_full
from soma_common.ids import ID_BYTES
from soma_common.newest_dispatch import NewestDispatch
from soma_common.wakeup import WakeUp

FRAME_BYTES: Final = 1024 * 1024
"""About how much of deliveries, and of live events, goes in one frame."""
FULL_DELAY_MS: Final = 500
"""When the router may hand over again what the stream had no room for."""
GONE_DELAY_MS: Final = 1000
"""How long a router waits with what a vanished adapter has in hand: its instance may be back with news of it."""
UNSENT_DELAY_MS: Final = 50
LAST_FRAMES_S: Final = 1.0
"""How long the last frames of a stream that was ended may take: a peer may never have room for them."""
ANNOUNCED_S: Final = 1.0
"""How long a bus that is silent may hold up the first message for the sake of its live events."""
ITEMS_AT_ONCE: Final = 32
"""Items of a frame that are applied in one go: well below a millisecond's work."""
MAX_NACK_DELAY_MS: Final = 24 * 3600 * 1000
"""The contract's bound; frames after the first are not validated as a whole."""


@dataclass(frozen=True, slots=True)
class StreamBounds:
    """What one stream may hold, and how many there may be."""

    unanswered_items: int = 4096
    unanswered_bytes: int = 16 * 1024 * 1024
    heartbeat_s: float = 5.0
    """Either side that hears nothing for three of these takes the stream for dead."""
    retry_ms: int = 100
    tenant_streams: int = 1024
    """Most streams of one tenant at this gateway, one for each adapter instance."""


class AdapterStream:
    """The state of one stream. Not thread safe; belongs to the event loop."""

    def __init__(
        self,
        number: int,
        hello: Hello,
        *,
        accept: AcceptMessage,
        acks: ReturnAcks,
        bounds: StreamBounds,
        clock: Callable[[], float],
        changed: Callable[[AdapterStream], None],
    ) -> None:
        """`changed` is called when what the routers know of the stream's window is out of date."""
        self.number = number
        self.tenant = hello.tenant
        self.channel = hello.channel
        self.instance = hello.instance
        self.live = hello.live
        # Anything else is no delivery's id: it would only make announcements large.
        self.processed = tuple(id_ for id_ in hello.processed if len(id_) == ID_BYTES)
        self.opened_at = clock()
        self.takes_deliveries = hello.credit > 0
        """Whether it has ever granted credit; one that only sends is not announced to the routers."""
        self._window = DeliveryWindow(hello.credit, self.processed)
        self._announced_window = self._window.size
        self._told = asyncio.Event()
        self._accept = accept
        self._acks = acks
        self._bounds = bounds
        self._clock = clock
        self._changed = changed
        self._unanswered = 0
        self._unanswered_bytes = 0
        self._frame = ConnectResponse()
        self._filled = False
        self._live_bytes = 0
        self._shown = NewestDispatch()
        self._heard_at = self._sent_at = clock()
        self._wake = WakeUp()
        self._half_closed = False
        self._ended = False
        self._end: Refused | None = None
        self._written_by: float | None = None
        """By when, in the loop's time, the writer has to be done; None: there is no hurry."""
        self._limit: asyncio.Timeout | None = None
        """Sees to that while the writer is at work."""

    # What the adapter sends.

    async def until_announced(self) -> None:
        """Waits until the routers are told of the stream, if it wants live events and grants credit from the beginning:
        the events of a turn begin where its router hears who watches, and the first message must not be there before.
        """
        if self.live and self.takes_deliveries:
            with suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCED_S):
                    await self._told.wait()

    async def receive(self, frame: ConnectRequest) -> None:
        """Applies a frame. A refused item is answered in the next frame down; only a wrong order of frames ends the
        stream.

        Raises:
            Refused: PROTOCOL_ORDER.
        """
        self._heard_at = self._clock()
        if frame.HasField("hello"):
            raise protocol_order("a second hello: say hello once, in the first frame; open a new stream to change it")
        if self._ended:
            return
        await self.receive_items(frame)

    async def receive_items(self, frame: ConnectRequest) -> None:
        """Applies what a frame holds beside a hello."""
        if frame.acks or frame.nacks or frame.credit:
            self._take_acks(frame)
        items: Iterable[InboundMessage | Cancel] = chain(frame.messages, frame.cancels)
        for number, item in enumerate(items, 1):
            self._take(item)
            if number % ITEMS_AT_ONCE == 0:
                await asyncio.sleep(0)
                if self._ended:
                    return

    def half_close(self) -> None:
        """The adapter sends nothing more: it gets its receipts, then the stream ends."""
        self._half_closed = True
        self._changed(self)
        self._wake()

    # What the system tells.

    def accepted(self, ref: int, message_id: bytes, size: int) -> None:
        """Sink: the item is durable."""
        self._frame.receipts.add(ref=ref, message_id=message_id)
        self._answered(size)

    def refused(self, ref: int, error: Error, size: int) -> None:
        """Sink: the item is not stored, or nobody knows."""
        self._frame.refusals.add(ref=ref, error=error)
        self._answered(size)

    def offer(self, router: str, delivery: Delivery) -> None:
        """A router hands a delivery over: it is queued until there is credit, or goes back."""
        if self._ended or self._half_closed:
            self.give_back_unsent(router, delivery.delivery_id, "the stream is gone")
            return
        match self._window.offer(router, delivery):
            case Offer.QUEUED:
                if self._window.ready:
                    self._wake()
            case Offer.PROCESSED:
                self._acks.ack(self.tenant, router, delivery.delivery_id)
            case Offer.FULL:
                self._acks.give_back(
                    self.tenant,
                    router,
                    delivery.delivery_id,
                    delay_ms=FULL_DELAY_MS,
                    counts=False,
                    cause="the adapter grants no credit",
                )
            case Offer.HELD:
                pass

    def offer_live(self, event: LiveEvent) -> None:
        """Shows a live event if the adapter keeps up and nothing newer of its turn was shown; else it is dropped."""
        if not self.live or self._ended or self._half_closed:
            return
        if not self._shown.admits(event.turn_id, event.dispatch):
            return
        if self._live_bytes > FRAME_BYTES:
            return
        self._frame.live.append(event)
        self._live_bytes += event.ByteSize()
        self._fill()

    def drain(self, grace_ms: int) -> None:
        """Tells the adapter that the gateway goes away."""
        if not self._ended:
            self._frame.drain.grace_ms = grace_ms
            self._fill()

    def end(self, refused: Refused | None = None) -> None:
        """Ends the stream after what is gathered: with an error, or well. What has not left after LAST_FRAMES_S is not
        sent.
        """
        if not self._ended:
            self._ended = True
            self._end = refused
            self._wake()
            self._limit_writer(LAST_FRAMES_S)

    def cut(self) -> None:
        """The writer of a stream that was ended gives up at once."""
        self._limit_writer(0.0)

    def tick(self) -> None:
        """Called about once a second: finds a dead peer, sends a heartbeat when nothing else was sent."""
        if self._ended:
            return
        now, interval = self._clock(), self._bounds.heartbeat_s
        # Who has closed its side cannot say any more that it lives, but it takes what it is sent.
        alive_at = self._sent_at if self._half_closed else self._heard_at
        if now - alive_at > 3 * interval:
            self.end(_deaf_peer(3 * interval) if self._half_closed else _silent_peer(3 * interval))
        elif now - self._sent_at >= interval:
            self._frame.heartbeat = True
            self._fill()

    # What the writer takes.

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Around everything in which the writer waits for the peer. LAST_FRAMES_S after the stream was ended, or when
        it is cut, the wait is cancelled, and the stream ends as it would have after its last frames. A cancellation
        that comes from elsewhere passes through.

        Raises:
            Refused: the stream ends with this error.
        """
        limit = self._limit = asyncio.timeout_at(self._written_by)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            if self._end is not None:
                raise self._end from None
        finally:
            self._limit = None

    async def next_frame(self) -> ConnectResponse | None:
        """Waits for something to send and takes all of it, so no frame is empty. None: the stream ends well.

        Whatever else is true, what is gathered (receipts, refusals, live events, a heartbeat, the drain) leaves first,
        and deliveries with it or by themselves if they may leave. When there is neither, the first of these applies:

            ended with an error                     raises it
            ended well                              None
            half-closed, every item is answered     None
            half-closed, an item is unanswered      waits for its receipt or refusal
            open                                    waits

        Deliveries that wait in a stream that ends or is half-closed are no reason to stay: their acks could not come,
        and `leave` gives them back.

        Raises:
            Refused: the stream ends with this error.
        """
        while not (self._filled or self._delivers):
            if self._end is not None:
                raise self._end
            if self._ended or (self._half_closed and not self._unanswered):
                return None
            await self._wake.wait()
        frame, self._frame = self._frame, ConnectResponse()
        self._filled = False
        self._live_bytes = 0
        if self._delivers:
            frame.deliveries.extend(self._window.take(FRAME_BYTES))
        self._sent_at = self._clock()
        return frame

    # What the routers are told.

    @property
    def window(self) -> int:
        """Deliveries the adapter can have unacknowledged at once."""
        return 0 if self._half_closed or self._ended else self._window.size

    def announced(self) -> None:
        """The routers are being told the present window."""
        self._announced_window = self.window

    def told(self) -> None:
        """The routers have been told of the stream."""
        self._told.set()

    @property
    def busy(self) -> bool:
        """Whether an item or a delivery is under way."""
        return self._unanswered > 0 or self._window.unfinished > 0

    def leave(self) -> None:
        """The stream is gone: what the adapter has not acknowledged goes back to the routers."""
        self._ended = True
        for left in self._window.leave():
            self._acks.give_back(
                self.tenant,
                left.router,
                left.delivery_id,
                delay_ms=GONE_DELAY_MS if left.sent else UNSENT_DELAY_MS,
                counts=False,
                cause="the stream is gone",
            )

    def give_back_unsent(self, router: str, delivery_id: bytes, cause: str) -> None:
        """A delivery that this stream never queued goes back."""
        self._acks.give_back(self.tenant, router, delivery_id, delay_ms=UNSENT_DELAY_MS, counts=False, cause=cause)

    @property
    def _delivers(self) -> bool:
        """Whether deliveries may leave now: there are some, with credit for them, and the adapter can answer them."""
        return self._window.ready and not (self._ended or self._half_closed)

    def _limit_writer(self, seconds: float) -> None:
        """The writer waits for its peer no longer than so many seconds from now."""
        self._written_by = asyncio.get_running_loop().time() + seconds
        limit = self._limit
        if limit is not None and not limit.expired():
            limit.reschedule(self._written_by)

    def _take(self, item: InboundMessage | Cancel) -> None:
        """Queues one message or cancel, or refuses it."""
        bounds = self._bounds
        try:
            if self._unanswered >= bounds.unanswered_items:
                raise queue_full("stream.max_unanswered", bounds.unanswered_items, bounds.retry_ms)
            if self._unanswered_bytes >= bounds.unanswered_bytes:
                raise queue_full("stream.unanswered_bytes", bounds.unanswered_bytes, bounds.retry_ms)
            if isinstance(item, InboundMessage):
                size = self._accept.message(self._submission(item), item.message, self, item.ref)
            else:
                size = self._accept.cancel(self._cancellation(item), item.turn_id, self, item.ref)
        except Refused as refused:
            self._frame.refusals.add(ref=item.ref, error=refused.error)
            self._fill()
            return
        self._unanswered += 1
        self._unanswered_bytes += size

    def _submission(self, item: InboundMessage) -> Submission:
        return Submission(
            self.tenant,
            item.agent,
            self.channel,
            item.session,
            item.idempotency_key,
            policy=item.policy,
            traceparent=item.traceparent,
        )

    def _cancellation(self, item: Cancel) -> Submission:
        return Submission(self.tenant, item.agent, self.channel, item.session, item.idempotency_key)

    def _take_acks(self, frame: ConnectRequest) -> None:
        window, acks, tenant = self._window, self._acks, self.tenant
        for delivery_id in frame.acks:
            router = window.ack(delivery_id)
            if router is not None:
                acks.ack(tenant, router, delivery_id)
        for nack in frame.nacks:
            router = window.nack(nack.delivery_id)
            if router is not None:
                acks.give_back(
                    tenant,
                    router,
                    nack.delivery_id,
                    delay_ms=min(nack.delay_ms, MAX_NACK_DELAY_MS),
                    counts=True,
                    cause=nack.cause[:1024],
                )
        if frame.credit:
            window.grant(frame.credit)
            self.takes_deliveries = True
        if window.ready:
            self._wake()
        if self._window_moved():
            self._changed(self)

    def _window_moved(self) -> bool:
        """Whether the window is so far from what the routers know that they should hear of it before the next
        second.
        """
        old, new = self._announced_window, self._window.size
        return old != new and (old == 0 or new == 0 or new >= 2 * old or new <= old // 2)

    def _answered(self, size: int) -> None:
        self._unanswered -= 1
        self._unanswered_bytes -= size
        self._fill()

    def _fill(self) -> None:
        self._filled = True
        self._wake()


def _silent_peer(silence_s: float) -> Refused:
    """The peer sent nothing, not even a heartbeat."""
    return Refused(
        ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED,
        f"nothing heard for {silence_s:g} s: send a heartbeat when there is nothing else to send",
    )


def _deaf_peer(silence_s: float) -> Refused:
    """The peer has closed its side and does not take what it waits for."""
    return Refused(
        ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED,
        f"nothing taken for {silence_s:g} s: read the stream until its end",
    )
