"""What of a lane may be purged: what every partition has committed, and has had long enough.

A database that is restored, or fails over to a standby, stands where it stood some time ago, and asks the lanes for
everything since. So a message is not purged as soon as it is in the mailbox, but when the cursor behind it was
committed for `lag_s`, and when every connected standby has that commit on its disk.

What is kept only for this is bounded: never more than `max_messages` and, as far as the lane's average tells,
`max_bytes`. A standby that lags is not overtaken for it: a lane that fills up refuses, and refusing loses nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_SAMPLES_PER_LAG = 64
_MAX_SAMPLES = 4 * _SAMPLES_PER_LAG


@dataclass(frozen=True, slots=True)
class CommittedPlace:
    """How far the database is: in its write-ahead log, and as far as every connected standby has it on disk."""

    written: int
    flushed: int | None
    """None: no standby is connected. 0: there is one, and how far it is may not be seen."""


@dataclass(frozen=True, slots=True)
class LaneExtent:
    """What the lane's stream holds."""

    first: int
    last: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    seq: int
    written: int


class LaneWindow:
    """The window of one lane. Remembers which cursor was committed when; a router that has just started waits."""

    def __init__(self, lag_s: float, max_messages: int, max_bytes: int) -> None:
        self._lag_s = lag_s
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._stream = ""
        self._samples: deque[_Sample] = deque(maxlen=_MAX_SAMPLES)

    def purge_below(self, now: float, stream: str, floor: int, place: CommittedPlace, extent: LaneExtent) -> int:
        """The sequence below which the lane may be purged; 0 for nothing. `floor` is the lowest cursor of the lane's
        partitions, read before `place`; `now` is monotonic.
        """
        self._remember(now, stream, floor, place.written)
        aged = max((s.seq for s in self._samples if now - s.at >= self._lag_s), default=0)
        below = max(aged, floor - self._room(extent))
        if place.flushed is not None:
            below = min(below, max((s.seq for s in self._samples if s.written <= place.flushed), default=0))
        below = max(0, min(below, floor))
        while len(self._samples) > 1 and self._samples[1].seq <= below:
            self._samples.popleft()
        return below

    def reaches_back_s(self, now: float, extent: LaneExtent) -> float:
        """How old a copy of the database may be, as far as this router has seen, for the lane to hold all since."""
        return now - min((s.at for s in self._samples if s.seq >= extent.first), default=now)

    def _remember(self, now: float, stream: str, floor: int, written: int) -> None:
        if stream != self._stream or (self._samples and floor < self._samples[-1].seq):
            # Another stream, or a database that went back: what was committed when says nothing any more.
            self._stream = stream
            self._samples.clear()
        newest = self._samples[-1] if self._samples else None
        if newest is None or (floor > newest.seq and now - newest.at >= self._lag_s / _SAMPLES_PER_LAG):
            self._samples.append(_Sample(now, floor, written))

    def _room(self, extent: LaneExtent) -> int:
        messages = extent.last - extent.first + 1
        if extent.bytes <= 0 or messages <= 0:
            return self._max_messages
        return min(self._max_messages, self._max_bytes * messages // extent.bytes)
