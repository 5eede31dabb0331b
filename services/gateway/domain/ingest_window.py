"""How far the routers have taken the lanes into the mailbox, and how much of a tenant's may lie ahead of that.

A lane is read in order, so what one tenant has stored and nobody has taken in yet delays everybody's messages behind
it. Each (tenant, lane) of a gateway therefore has a window: with so many items stored and not taken in, its next batch
waits. It waits in its own tenant's queue, whose bound refuses the rest of a flood.

The window protects latency, never the data: while no router speaks of a lane (PostgreSQL is away, a router has died)
there is none, and the lane's own bound holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

SILENT_S: Final = 1.0
"""A router of which nothing was heard for so long does not count; it speaks four times a second."""


class LaneProgress:
    """By lane: the place up to which every router that speaks has taken everything in."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lanes: dict[int, dict[str, tuple[int, float]]] = {}

    def heard(self, lane: int, router: str, seq: int) -> None:
        """A router speaks."""
        now = self._clock()
        routers = self._lanes.setdefault(lane, {})
        routers[router] = (seq, now)
        for name in [name for name, (_, heard_at) in routers.items() if now - heard_at > SILENT_S]:
            del routers[name]

    def floor(self, lane: int) -> int | None:
        """None: nobody speaks."""
        now = self._clock()
        return min(
            (seq for seq, heard_at in self._lanes.get(lane, {}).values() if now - heard_at <= SILENT_S), default=None
        )


class IngestWindow:
    """What one (tenant, lane) has stored and the routers have not taken in."""

    __slots__ = ("_ahead", "_items")

    def __init__(self) -> None:
        self._items: deque[tuple[int, int]] = deque()
        """(place in the lane, items)."""
        self._ahead = 0

    def stored(self, seq: int, items: int) -> None:
        """A batch is in the lane."""
        if self._items and seq <= self._items[-1][0]:
            self._clear()  # the lane was made anew and counts from its beginning
        self._items.append((seq, items))
        self._ahead += items

    def ahead(self, floor: int | None) -> int:
        """Items that are ahead of a floor."""
        if floor is None:
            self._clear()
            return 0
        while self._items and self._items[0][0] <= floor:
            self._ahead -= self._items.popleft()[1]
        return self._ahead

    def _clear(self) -> None:
        self._items.clear()
        self._ahead = 0
