"""Trying again what may pass: errors that say so, with growing waits, inside the time that is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from soma_common.errors import ResourceExhausted, SomaError, Unavailable

T = TypeVar("T")

PASSING: Final[tuple[type[SomaError], ...]] = (Unavailable, ResourceExhausted)
"""Errors that may pass with a retry."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between tries: `first_s`, doubled each time up to `most_s`, never shorter than the other side asked for."""

    first_s: float = 0.1
    most_s: float = 2.0

    def wait_s(self, attempt: int, error: SomaError) -> float:
        """The wait after try number `attempt` (from 1) failed, spread by a quarter so that many callers do not meet."""
        grown = min(self.most_s, self.first_s * 2.0 ** min(attempt - 1, 16))
        return max(grown * random.uniform(0.75, 1.25), error.retry_delay_s or 0.0)


async def retrying(
    attempt: Callable[[int], Awaitable[T]],
    *,
    backoff: Backoff,
    deadline: float,
    attempts: int | None = None,
    may_retry: Callable[[], bool] = lambda: True,
    passing: tuple[type[SomaError], ...] = PASSING,
) -> T:
    """Calls `attempt` with 1, 2, ... until one succeeds.

    Gives up with the last error when it is not of a kind that may pass (`passing`), after `attempts` tries, when
    `may_retry` says no, or when the next wait would reach `deadline` (the loop's clock). It does not cut an attempt
    short: the caller owns the timeout.
    """
    number = 1
    while True:
        try:
            return await attempt(number)
        except passing as error:
            wait_s = backoff.wait_s(number, error)
            over = asyncio.get_running_loop().time() + wait_s >= deadline
            if over or number == attempts or not may_retry():
                raise
        await asyncio.sleep(wait_s)
        number += 1
