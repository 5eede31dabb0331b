"""Timers that end at about the same time share one of the event loop's.

A timer of the loop costs several microseconds to make and to take back. Where hundreds of turns wait for much the same
moment, or each holds a deadline that is hardly ever reached, that is more than the rest of the waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from math import ceil
from types import TracebackType
from typing import Final

GRAIN_S: Final = 0.001
"""The loop's own: it counts in milliseconds."""


class SharedTimer:
    """One timer among those of its moment."""

    __slots__ = ("_callback", "_key", "_moment", "_timers")

    def __init__(self, timers: SharedTimers, key: int, moment: _Moment, callback: Callable[[], object]) -> None:
        self._timers = timers
        self._key = key
        self._moment = moment
        self._callback = callback

    def cancel(self) -> None:
        """It will not be called. After it was, this does nothing."""
        moment = self._moment
        if moment.waiting.pop(self, self) is None and not moment.waiting:
            self._timers.let_go(self._key, moment)

    def call(self) -> None:
        """It is time."""
        self._callback()


class _Moment:
    """Timers that end together, in the order they were made."""

    __slots__ = ("handle", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[SharedTimer, None] = {}
        self.handle: asyncio.TimerHandle


class SharedTimers:
    """Timers of one event loop, `grain_s` seconds apart: each is called at the first such moment not before its time.

    Made on the loop it is used with.
    """

    __slots__ = ("_grain_s", "_loop", "_moments")

    def __init__(self, grain_s: float = GRAIN_S) -> None:
        self._loop = asyncio.get_running_loop()
        self._grain_s = grain_s
        self._moments: dict[int, _Moment] = {}

    def call_at(self, when: float, callback: Callable[[], object]) -> SharedTimer:
        """Calls at that time of the loop's clock."""
        # What is a hair above a moment by the rounding of floating point belongs to it.
        key = ceil(when / self._grain_s - 1e-3)
        moment = self._moments.get(key)
        if moment is None:
            moment = self._moments[key] = _Moment()
            moment.handle = self._loop.call_at(key * self._grain_s, self._reached, key, moment)
        timer = SharedTimer(self, key, moment, callback)
        moment.waiting[timer] = None
        return timer

    async def sleep(self, delay_s: float) -> None:
        """As `asyncio.sleep`."""
        future = self._loop.create_future()
        timer = self.call_at(self._loop.time() + delay_s, partial(_wake, future))
        try:
            await future
        finally:
            timer.cancel()

    def let_go(self, key: int, moment: _Moment) -> None:
        """Nobody waits for a moment any more."""
        if self._moments.get(key) is moment:
            del self._moments[key]
            moment.handle.cancel()

    def _reached(self, key: int, moment: _Moment) -> None:
        if self._moments.get(key) is moment:
            del self._moments[key]
        waiting = moment.waiting
        while waiting:
            # One by one: what is called may cancel others of its moment.
            timer = next(iter(waiting))
            del waiting[timer]
            timer.call()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Deadline:
    """`asyncio.timeout_at` on shared timers, for a task that runs on their loop: `with Deadline(...) as scope`.

    The task is cancelled when the time is over, which leaves the block as TimeoutError.
    """

    __slots__ = ("_cancelling", "_task", "_timer", "_timers", "_when", "expired")

    def __init__(self, timers: SharedTimers, when: float, task: asyncio.Task[object]) -> None:
        self._timers = timers
        self._when = when
        self._task = task
        self._cancelling = 0
        self.expired = False
        """Whether it was this deadline that ended the block."""

    def __enter__(self) -> Deadline:
        self._cancelling = self._task.cancelling()
        self._timer = self._timers.call_at(self._when, self._expire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _expire(self) -> None:
        self.expired = True
        self._task.cancel()
