"""Time, read in one place."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Milliseconds since the epoch, as this machine's clock has them: for people, never for decisions between
    processes.
    """
    return time.time_ns() // 1_000_000


def monotonic() -> float:
    """Seconds that only grow, for deadlines within this process."""
    return time.monotonic()
