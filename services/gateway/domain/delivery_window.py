"""What one adapter stream has been given and may still be given.

    offered -> queued -> (credit) -> in hand -> acknowledged

The router never has more deliveries with a stream than its announced window, but several routers may each come
close to it and news of a smaller window takes time; what is over the bound goes back, it is never kept. So a slow
adapter costs bounded memory.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from soma.common.v1.turn_pb2 import Delivery

MAX_WINDOW: Final = 1024
"""Most deliveries a stream may have unacknowledged, whatever credit it grants."""
MAX_CREDIT: Final = 65536
SLACK: Final = 64
"""Deliveries kept above the window, for those on their way while it shrinks."""
MAX_QUEUED_BYTES: Final = 8 * 1024 * 1024
REMEMBERED_ACKS: Final = 8192
"""Acknowledged deliveries still known, so that one sent again because its ack was lost is answered and not shown
again.
"""


class Offer(Enum):
    """What became of a delivery that a router handed over."""

    QUEUED = auto()
    HELD = auto()
    """The adapter has it, or it waits for credit: nothing to do."""
    PROCESSED = auto()
    """The adapter has acknowledged it before: acknowledge it again."""
    FULL = auto()


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A delivery that is not acknowledged when its stream ends."""

    delivery_id: bytes
    router: str
    sent: bool
    """Whether the adapter has got it, so that it may still turn out to be processed."""


class DeliveryWindow:
    """The deliveries of one stream. No I/O; `take` gives what may be sent now."""

    __slots__ = ("_acked", "_credit", "_in_hand", "_queue", "_queued", "_queued_bytes")

    def __init__(self, credit: int, processed: Iterable[bytes] = ()) -> None:
        self._credit = min(credit, MAX_CREDIT)
        self._queue: deque[tuple[Delivery, int]] = deque()
        self._queued: dict[bytes, str] = {}
        self._queued_bytes = 0
        self._in_hand: dict[bytes, str] = {}
        self._acked: dict[bytes, None] = {}
        for delivery_id in processed:
            self._remember(delivery_id)

    @property
    def size(self) -> int:
        """Deliveries the adapter can have unacknowledged at once: what it has and what it may still get."""
        return min(self._credit + len(self._in_hand), MAX_WINDOW)

    @property
    def ready(self) -> bool:
        """Whether something may be sent now."""
        return self._credit > 0 and bool(self._queue)

    @property
    def unfinished(self) -> int:
        """Deliveries queued or in the adapter's hand."""
        return len(self._queued) + len(self._in_hand)

    def grant(self, credit: int) -> None:
        """The adapter can take so many more."""
        self._credit = min(self._credit + credit, MAX_CREDIT)

    def offer(self, router: str, delivery: Delivery) -> Offer:
        """A router hands a delivery over, perhaps again, perhaps another router than before: its ack goes to the
        latest.
        """
        delivery_id = delivery.delivery_id
        if delivery_id in self._in_hand:
            self._in_hand[delivery_id] = router
            return Offer.HELD
        if delivery_id in self._queued:
            self._queued[delivery_id] = router
            return Offer.HELD
        if delivery_id in self._acked:
            return Offer.PROCESSED
        size = delivery.ByteSize()
        if len(self._queue) >= self.size + SLACK or (self._queue and self._queued_bytes + size > MAX_QUEUED_BYTES):
            return Offer.FULL
        self._queue.append((delivery, size))
        self._queued[delivery_id] = router
        self._queued_bytes += size
        return Offer.QUEUED

    def take(self, max_bytes: int) -> list[Delivery]:
        """What goes out now: as much as the credit allows and about `max_bytes`, at least one if any may go."""
        taken: list[Delivery] = []
        room = max_bytes
        while self._queue and self._credit > 0 and (room > 0 or not taken):
            delivery, size = self._queue.popleft()
            room -= size
            self._queued_bytes -= size
            self._credit -= 1
            self._in_hand[delivery.delivery_id] = self._queued.pop(delivery.delivery_id)
            taken.append(delivery)
        return taken

    def ack(self, delivery_id: bytes) -> str | None:
        """The adapter has processed it. Returns the router that waits for the ack; None: nobody does."""
        router = self._in_hand.pop(delivery_id, None)
        if router is not None:
            self._remember(delivery_id)
        return router

    def nack(self, delivery_id: bytes) -> str | None:
        """The adapter could not process it. Returns the router to give it back to; None: it is not in hand."""
        return self._in_hand.pop(delivery_id, None)

    def leave(self) -> list[Unfinished]:
        """The stream ends: everything not acknowledged, and nothing is held any more."""
        left = [Unfinished(delivery_id, router, sent=True) for delivery_id, router in self._in_hand.items()]
        left += [Unfinished(delivery_id, router, sent=False) for delivery_id, router in self._queued.items()]
        self._queue.clear()
        self._queued.clear()
        self._in_hand.clear()
        self._queued_bytes = 0
        self._credit = 0
        return left

    def _remember(self, delivery_id: bytes) -> None:
        self._acked[delivery_id] = None
        if len(self._acked) > REMEMBERED_ACKS:
            del self._acked[next(iter(self._acked))]
