"""Runs a service whose wall clock jumps: `python -m tests.chaos.jumping_clock`, with SOMA_SERVICE_INSTANCE as usual.

SIGUSR1 sets its clock an hour ahead, SIGUSR2 an hour back; again, an hour more. What Python code of the process reads
as the time of day goes along; the monotonic clock does not, as on a machine whose clock is set.
"""

import datetime as real_datetime
import os
import runpy
import signal
import time
from types import FrameType
from typing import Self

JUMP_S = 3600
_time, _time_ns = time.time, time.time_ns
_ahead_s = 0


class JumpingDatetime(real_datetime.datetime):
    """A datetime whose present goes along."""

    @classmethod
    def now(cls, tz: real_datetime.tzinfo | None = None) -> Self:
        """The time of day as the process has it."""
        return cls.fromtimestamp(time.time(), tz)


def _jump(number: int, _: FrameType | None) -> None:
    global _ahead_s
    _ahead_s += JUMP_S if number == signal.SIGUSR1 else -JUMP_S


def main() -> None:
    """Become the service."""
    signal.signal(signal.SIGUSR1, _jump)
    signal.signal(signal.SIGUSR2, _jump)
    time.time = lambda: _time() + _ahead_s
    time.time_ns = lambda: _time_ns() + _ahead_s * 10**9
    real_datetime.datetime = JumpingDatetime  # type: ignore[misc]
    service = os.environ["SOMA_SERVICE_INSTANCE"].rpartition("-")[0]
    runpy.run_module(f"services.{service}.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
