"""Which deliveries an adapter has, and which it has processed, so that the application sees each one once.

A delivery may come again: after a new stream, or because its ack was lost. Deliveries of a session come one at a
time with dense positions, so a position at or below the last processed one is a repetition and is acknowledged
without being shown.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from enum import Enum, auto
from typing import Final

from soma.common.v1.turn_pb2 import Delivery

REMEMBERED_SESSIONS: Final = 100_000
"""Sessions whose last processed position is known. One that is forgotten may show a delivery again whose ack was
lost.
"""
REMEMBERED_ACKS: Final = 4096
"""Acknowledged deliveries named at the next hello, since nobody says whether an ack has arrived."""


class Arrival(Enum):
    """What a delivery that came is."""

    NEW = auto()
    IN_HAND = auto()
    """The application has it and has not answered yet."""
    PROCESSED = auto()


class Inbox:
    """No I/O. `stream` numbers tell on which stream a delivery came, since only that one took credit for it."""

    def __init__(self) -> None:
        self._in_hand: dict[bytes, int] = {}
        self._processed: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._acked: deque[bytes] = deque(maxlen=REMEMBERED_ACKS)

    def __len__(self) -> int:
        return len(self._in_hand)

    def arrive(self, delivery: Delivery, stream: int) -> Arrival:
        """A delivery came on a stream."""
        delivery_id = delivery.delivery_id
        if delivery_id in self._in_hand:
            self._in_hand[delivery_id] = stream
            return Arrival.IN_HAND
        if delivery.position <= self._processed.get((delivery.agent, delivery.session), 0):
            return Arrival.PROCESSED
        self._in_hand[delivery_id] = stream
        return Arrival.NEW

    def ack(self, delivery: Delivery, stream: int) -> bool:
        """The application has processed it. Returns whether the present stream gave credit for it, to be renewed."""
        session = (delivery.agent, delivery.session)
        processed = self._processed
        processed[session] = max(delivery.position, processed.get(session, 0))
        processed.move_to_end(session)
        if len(processed) > REMEMBERED_SESSIONS:
            processed.popitem(last=False)
        self._acked.append(delivery.delivery_id)
        return self._in_hand.pop(delivery.delivery_id, None) == stream

    def nack(self, delivery: Delivery, stream: int) -> bool:
        """The application could not process it; it comes again as new. Returns whether the present stream gave
        credit.
        """
        return self._in_hand.pop(delivery.delivery_id, None) == stream

    def processed(self) -> list[bytes]:
        """What to name in hello: the last acknowledged deliveries."""
        return list(self._acked)
