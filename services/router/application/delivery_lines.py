"""Deliveries in memory, in line by session, and what of a channel is only in the table."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from soma.common.v1.turn_pb2 import Delivery

    from services.router.domain.adapters import AdapterStream
    from services.router.domain.delivery_room import ChannelShare
    from services.router.domain.partition import Partition

UNKNOWN_BYTES: Final = 256 * 1024
"""What a delivery is taken to have as long as nothing of its backlog was seen."""

ChannelKey = tuple[str, str]
"""Tenant and channel."""


@dataclass(slots=True, eq=False)
class Pending:
    """A delivery that is not acknowledged."""

    partition: Partition
    position: int
    delivery: Delivery
    size: int
    """Its bytes, serialized."""
    channel: Channel
    session_id: bytes
    stream: AdapterStream | None = None
    """Who has it in hand."""
    sent_at: float = 0.0
    not_before: float = 0.0
    awaits: str = ""
    """The instance that had it when its stream went away: it may have processed it, so until `not_before` only it is
    given it again."""
    tries: int = 0

    @property
    def key(self) -> ChannelKey:
        """Its tenant and channel."""
        return self.channel.key


@dataclass(slots=True, eq=False)
class Line:
    """The deliveries of one session, the first of which may be in hand."""

    items: deque[Pending] = field(default_factory=deque)
    queued_at: AdapterStream | None = None


@dataclass(slots=True, eq=False)
class Backlog:
    """A channel of a partition whose newest deliveries are only in the table."""

    after: int
    """Position up to which memory has them."""
    expected: int = UNKNOWN_BYTES
    """Bytes that one of those in the table is taken to have."""
    largest: int = 0
    """Bytes of the largest that went to the table only while this router looked."""
    grown: int = 1
    """Counts deliveries that went to the table only, to see whether a page was the last."""
    loading: bool = False

    def grow(self, size: int) -> None:
        """One more is in the table only, of so many bytes."""
        self.grown += 1
        self.largest = max(self.largest, size)
        self.expected = max(self.expected, size)

    def seen(self, sizes: list[int]) -> None:
        """A page had deliveries of so many bytes: the next ones are taken to be like them."""
        self.expected = max(sizes, default=0) or self.expected
        self.expected = max(self.expected, self.largest)


@dataclass(slots=True, eq=False)
class Channel:
    """Of one tenant's channel: the lines of its sessions in memory, and its backlogs."""

    key: ChannelKey
    share: ChannelShare
    lines: dict[bytes, Line] = field(default_factory=dict)
    backlogs: dict[int, Backlog] = field(default_factory=dict)
    """By partition, the one whose turn it is to be read first."""
    paged: dict[int, int] = field(default_factory=dict)
    """Partition -> position up to which it was read from the table."""
    left_at: float = 0.0
    """Monotonic time at which nobody was found to take what is in memory, in seconds; 0: somebody is there."""

    def hand_back(self, pending: Pending) -> None:
        """A delivery in memory is to be in the table only, and all behind it in its partition."""
        number, after = pending.partition.id, pending.position - 1
        backlog = self.backlogs.get(number)
        if backlog is None:
            backlog = self.backlogs[number] = Backlog(after, 0)
        elif backlog.loading:
            # Another one, so that the page is not taken: it brings what comes after this one.
            backlog = self.backlogs[number] = Backlog(backlog.after, backlog.expected)
        backlog.after = min(backlog.after, after)
        backlog.grow(pending.size)
