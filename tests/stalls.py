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
LOOK_S: Final = 0.5
LATE_S: Final = 0.005
"""A task that goes on so late is nothing unusual."""
_PROC: Final = Path("/proc")
_IDLE: Final = (3, 4)
"""Of the times in the first line of `stat`: idle, and idle while something waits for a disk."""
_TIMES: Final = 8
"""How many there are before those of guests, which are counted twice. The last is what the host gave to others."""


class Stalls:
    """Sleeps for short times and notes how much later than due it woke up; and what of the processors others had: the
    host, and all that is no child of this process.
    """

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        """From when to when this process was due and did not run (monotonic)."""
        self._others: list[tuple[float, float]] = [(time.monotonic(), _others_s())]
        """What others had used of each processor by some moment (monotonic), in seconds."""
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
        before = next((used for at, used in reversed(self._others) if at <= moment), self._others[0][1])
        after = next((used for at, used in reversed(self._others) if at <= end), before)
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
            if now - self._others[-1][0] > LOOK_S:
                self._others.append((now, _others_s()))


def _others_s() -> float:
    if not (_PROC / "stat").exists():
        return 0.0
    times = [int(field) for field in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1 : 1 + _TIMES]]
    used = sum(times) - sum(times[number] for number in _IDLE)
    parents: dict[int, int] = {}
    own: dict[int, int] = {}
    for process in _PROC.glob("[0-9]*/stat"):
        try:
            fields = process.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(process.parent.name)
        parents[pid] = int(fields[1])
        own[pid] = sum(map(int, fields[11:15]))  # its own time and that of its children that have ended
    ours = sum(ticks for pid, ticks in own.items() if _is_ours(pid, parents))
    return (used - ours) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)


def _is_ours(pid: int, parents: dict[int, int]) -> bool:
    while pid not in (0, os.getpid()):
        pid = parents.get(pid, 0)
    return pid != 0
