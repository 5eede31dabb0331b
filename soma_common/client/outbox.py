"""What an adapter has sent and has no answer for, in order.

    added -> sent -> answered          a lost stream rewinds: everything unanswered is sent again, in the order it
    was added

The idempotency key stays with its item, so what was stored before the stream was lost is not stored twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from soma.common.v1.message_pb2 import Error
from soma.gateway.v1.channel_service_pb2 import Cancel, InboundMessage

Answer = Callable[[bytes, Error | None], None]
"""Told once: the message id (16 bytes) if the item is stored, else the error. What it raises is logged and goes no
further: others wait for their answers too.
"""

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Sent:
    """One item on its way."""

    item: InboundMessage | Cancel
    size: int
    """Bytes, serialized."""
    answer: Answer

    def tell(self, message_id: bytes, error: Error | None) -> None:
        """Calls `answer`. Raises nothing."""
        try:
            self.answer(message_id, error)
        # A CancelledError is the application's too, that of a future it looked at: no task is cancelled within a plain
        # call.
        except (Exception, asyncio.CancelledError):  # noqa: BLE001 - boundary: the application's own code
            _log.exception("channel_client.answer_failed", ref=self.item.ref)


class Outbox:
    """Bounded; refs are given here and grow."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._next_ref = 1
        self._open: dict[int, Sent] = {}
        self._unsent: deque[Sent] = deque()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def full(self) -> bool:
        """Whether `add` would be refused."""
        return len(self._open) >= self._bound

    @property
    def in_flight(self) -> int:
        """Items sent on the present stream and not answered."""
        return len(self._open) - len(self._unsent)

    @property
    def unsent(self) -> int:
        """Items that wait for their turn."""
        return len(self._unsent)

    def add(self, item: InboundMessage | Cancel, size: int, answer: Answer) -> int:
        """Queues an item of `size` bytes and numbers it. The caller has looked at `full`."""
        ref = item.ref = self._next_ref
        self._next_ref += 1
        sent = Sent(item, size, answer)
        self._open[ref] = sent
        self._unsent.append(sent)
        return ref

    def take(self, max_in_flight: int, max_items: int, max_bytes: int) -> list[InboundMessage | Cancel]:
        """The next items for one frame, at least one if any may go.

        A frame's cancels come after its messages, so a message behind a cancel waits for the next frame.
        """
        unsent = self._unsent
        room = min(max_items, max_in_flight - self.in_flight)
        taken: list[InboundMessage | Cancel] = []
        bytes_left = max_bytes
        after_cancel = False
        while unsent and len(taken) < room:
            sent = unsent[0]
            is_cancel = isinstance(sent.item, Cancel)
            if taken and (sent.size > bytes_left or (after_cancel and not is_cancel)):
                break
            unsent.popleft()
            bytes_left -= sent.size
            after_cancel = is_cancel
            taken.append(sent.item)
        return taken

    def answer(self, ref: int, message_id: bytes, error: Error | None) -> None:
        """An answer came; one for an item that is not open (answered before) is ignored."""
        sent = self._open.pop(ref, None)
        if sent is not None:
            sent.tell(message_id, error)

    def rewind(self) -> None:
        """The stream is lost: everything unanswered is to be sent again."""
        self._unsent = deque(self._open.values())

    def fail(self, error: Error) -> None:
        """There will be no stream any more: everything unanswered gets this error."""
        opened, self._open = self._open, {}
        self._unsent.clear()
        for sent in opened.values():
            sent.tell(b"", error)
