"""One task that waits for what others of its event loop may do at any time.

Whoever waits looks first whether there is something, then waits for a wake-up and looks again. So a wake-up says only
that a look may be worth it, one that comes while nobody waits is not kept, and there is nothing to reset: an
`asyncio.Event` in this place has a list of waiters, and a state to be cleared at the right moment.
"""

from __future__ import annotations

import asyncio


class WakeUp:
    """For one waiter at a time."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def __call__(self) -> bool:
        """Has the waiter look again. False: nobody waits, or it was woken already."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return False
        waiter.set_result(None)
        return True

    async def wait(self) -> None:
        """Returns with the next wake-up."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
