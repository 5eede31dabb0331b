"""The gather list: what comes in while the last send is in flight goes out in the next.

One producer side that never waits, one consumer that takes everything there is. It is a list and one wake-up, because
at thousands of items a second a queue object per hop costs more than the work itself. Frames, wake-ups and
transactions cost; items are nearly free.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from soma_common.wakeup import WakeUp

T = TypeVar("T")


class GatherFull(Exception):
    """The list holds as many items as it may."""


class GatherClosed(Exception):
    """The list was closed and everything in it has been taken."""


class Gather(Generic[T]):
    """A bounded list with one taker, for one event loop.

    `bound` is the most items held; `put` raises GatherFull above it and never blocks, so that a reader never waits
    for a writer.
    """

    __slots__ = ("_bound", "_closed", "_items", "_wake")

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._items: list[T] = []
        self._wake = WakeUp()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def put(self, item: T) -> None:
        """Appends an item. Raises GatherFull over the bound, GatherClosed after `close`."""
        if self._closed:
            raise GatherClosed
        if len(self._items) >= self._bound:
            raise GatherFull
        self._items.append(item)
        self._wake()

    def put_many(self, items: Iterable[T]) -> None:
        """Appends items, all or none. Raises GatherFull over the bound, GatherClosed after `close`."""
        if self._closed:
            raise GatherClosed
        new = list(items)
        if len(self._items) + len(new) > self._bound:
            raise GatherFull
        self._items.extend(new)
        self._wake()

    async def take(self, limit: int = 512) -> list[T]:
        """Waits until there is something and takes it all, at most `limit` items. Raises GatherClosed when closed and
        empty.
        """
        while not self._items:
            if self._closed:
                raise GatherClosed
            await self._wake.wait()
        return self.take_now(limit)

    def take_now(self, limit: int = 512) -> list[T]:
        """Takes what there is, at most `limit` items, perhaps nothing."""
        if len(self._items) <= limit:
            taken, self._items = self._items, []
        else:
            taken, self._items = self._items[:limit], self._items[limit:]
        return taken

    def close(self) -> None:
        """Takes no more items; the taker still gets what is there."""
        self._closed = True
        self._wake()
