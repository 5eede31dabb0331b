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


class _Timer:
    """One among those of its moment."""

    __slots__ = ("_moment",)

    _moment: _Moment

    def cancel(self) -> None:
        """It will not be called. After it was, this does nothing."""
        moment = self._moment
        if moment.waiting.pop(self, self) is None and not moment.waiting:
            moment.timers.let_go(moment)

    def call(self) -> None:
        """It is time."""
        raise NotImplementedError


class SharedTimer(_Timer):
    """Calls back once, unless it is cancelled before."""

    __slots__ = ("_callback",)

    def __init__(self, moment: _Moment, callback: Callable[[], object]) -> None:
        self._moment = moment
        self._callback = callback
        moment.waiting[self] = None

    def call(self) -> None:
        """It is time."""
        self._callback()


class _Moment:
    """Timers that end together, in the order they were made."""

    __slots__ = ("handle", "key", "timers", "waiting")

    def __init__(self, timers: SharedTimers, key: int) -> None:
        self.timers = timers
        self.key = key
        self.waiting: dict[_Timer, None] = {}
        self.handle: asyncio.TimerHandle


class SharedTimers:
    """Timers of one event loop, `grain_s` seconds apart: each is called at the first such moment not before its time.

    Made on the loop it is used with.
    """

    __slots__ = ("_empty", "_grain_s", "_loop", "_moments")

    def __init__(self, grain_s: float = GRAIN_S) -> None:
        self._loop = asyncio.get_running_loop()
        self._grain_s = grain_s
        self._moments: dict[int, _Moment] = {}
        self._empty: _Moment | None = None

    def call_at(self, when: float, callback: Callable[[], object]) -> SharedTimer:
        """Calls at that time of the loop's clock."""
        return SharedTimer(self.moment(when), callback)

    def moment(self, when: float) -> _Moment:
        """The one at which a timer of that time is called."""
        # What is a hair above a moment by the rounding of floating point belongs to it.
        key = ceil(when / self._grain_s - 1e-3)
        moment = self._moments.get(key)
        if moment is None:
            moment = self._moments[key] = _Moment(self, key)
            moment.handle = self._loop.call_at(key * self._grain_s, self._reached, moment)
        return moment

    async def sleep(self, delay_s: float) -> None:
        """As `asyncio.sleep`."""
        future = self._loop.create_future()
        timer = self.call_at(self._loop.time() + delay_s, partial(_wake, future))
        try:
            await future
        finally:
            timer.cancel()

    def let_go(self, moment: _Moment) -> None:
        """Nobody waits for a moment any more.

        The last such moment stays: where one deadline after another is set and taken back, they are of the same one.
        """
        empty = self._empty
        if empty is moment:
            return
        if empty is not None and not empty.waiting and self._moments.get(empty.key) is empty:
            del self._moments[empty.key]
            empty.handle.cancel()
        self._empty = moment

    def _reached(self, moment: _Moment) -> None:
        if self._empty is moment:
            self._empty = None
        if self._moments.get(moment.key) is moment:
            del self._moments[moment.key]
        waiting = moment.waiting
        while waiting:
            # One by one: what is called may cancel others of its moment.
            timer = next(iter(waiting))
            del waiting[timer]
            timer.call()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Deadline(_Timer):
    """`asyncio.timeout_at` on shared timers, for a task that runs on their loop: `with Deadline(...) as scope`.

    The task is cancelled when the time is over, which leaves the block as TimeoutError.
    """

    __slots__ = ("_cancelling", "_task", "_timers", "_when", "expired")

    def __init__(self, timers: SharedTimers, when: float, task: asyncio.Task[object]) -> None:
        self._timers = timers
        self._when = when
        self._task = task
        self._cancelling = 0
        self.expired = False
        """Whether it was this deadline that ended the block."""

    def __enter__(self) -> Deadline:
        self._cancelling = self._task.cancelling()
        self._moment = self._timers.moment(self._when)
        self._moment.waiting[self] = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.cancel()
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def call(self) -> None:
        """It is time."""
        self.expired = True
        self._task.cancel()
