"""Which adapter stream gets a session's deliveries: rendezvous hashing over the streams that serve the channel.

Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates" (1998): every router picks the same stream
without talking to the others, and a stream that comes or goes moves only the sessions it gets or had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b


@dataclass(slots=True)
class AdapterStream:
    """A connected adapter, as its gateway announces it."""

    gateway: str
    stream: int
    tenant: str
    channel: str
    instance: str
    window: int
    live: bool
    in_hand: dict[bytes, None] = field(default_factory=dict)
    """Sessions of this router whose first delivery it has in hand, in the order in which they were handed over."""
    waiting: deque[bytes] = field(default_factory=deque)
    """Sessions that wait for room in the window. One that has gone meanwhile may still be named."""

    @property
    def has_room(self) -> bool:
        """Whether it can take one more delivery."""
        return len(self.in_hand) < self.window


def choose(session_id: bytes, streams: Iterable[AdapterStream]) -> AdapterStream | None:
    """The stream with the highest score for the session; None if there is none that takes deliveries."""
    return max((s for s in streams if s.window > 0), key=lambda s: _score(session_id, s.instance), default=None)


def _score(session_id: bytes, instance: str) -> bytes:
    return blake2b(instance.encode(), key=session_id, digest_size=8).digest()
