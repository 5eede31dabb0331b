"""For how long the machine stood still: what a bound on a time has to allow for where others use the machine too.

async with Stalls() as stalls:
    began = time.monotonic()
    ...
    assert time.monotonic() - began < 1.0 + stalls.since(began)
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from soma_common.testing.eventually import eventually

LONG_S: Final = 15.0
TICK_S: Final = 0.02
LATE_S: Final = 0.005
"""A task that goes on so late is nothing unusual."""
_STAT: Final = Path("/proc/stat")
_STEAL: Final = 8
"""Field of the first line: what the host gave to others, over all processors, in ticks of its clock."""


class Stalls:
    """Sleeps for short times and notes how much later than due it woke up, and what a host took from this machine."""

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        """From when to when this process was due and did not run (monotonic)."""
        self._stolen: list[tuple[float, float]] = [(time.monotonic(), _stolen_s())]
        """What the host had taken of each processor by some moment (monotonic), in seconds."""
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._watching = asyncio.create_task(self._watch(), name="stalls")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._watching is not None
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    def since(self, moment: float, until: float | None = None) -> float:
        """Seconds from `moment` (monotonic) on, in which the machine did something else."""
        end = time.monotonic() if until is None else until
        late_s = sum(max(0.0, min(to, end) - max(at, moment)) for at, to in self._late)
        before = max((taken for at, taken in self._stolen if at <= moment), default=self._stolen[0][1])
        after = max((taken for at, taken in self._stolen if at <= end), default=before)
        return max(late_s, after - before)

    async def within(self, limit_s: float, predicate: Callable[[], Any], what: str = "") -> None:
        """Waits until the predicate is true, and asserts that it was so soon enough."""
        began = time.monotonic()
        await eventually(predicate, limit_s + LONG_S, what)
        took_s = time.monotonic() - began
        stalled_s = self.since(began)
        assert took_s < limit_s + stalled_s, f"{took_s:.2f} s, {stalled_s:.2f} s of them stalls: {what}"

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            if now - due > LATE_S:
                self._late.append((due, now))
            if now - self._stolen[-1][0] > 0.5:
                self._stolen.append((now, _stolen_s()))


def _stolen_s() -> float:
    if not _STAT.exists():
        return 0.0
    fields = _STAT.read_text().split("\n", 1)[0].split()
    return int(fields[_STEAL]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)
