"""When a part that died is started again: almost at once the first time, ever slower while it keeps dying."""

from dataclasses import dataclass

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 5.0
STABLE_AFTER_S = 30.0
"""A part that was ready for so long starts again with a clean record."""


@dataclass
class RestartPolicy:
    """The delays of one part."""

    failures: int = 0
    """In a row, none of them after a stable time."""

    def delay_after(self, ready_for_s: float) -> float:
        """Seconds to wait before the next start of a part that was ready for `ready_for_s` (0: never) and ended."""
        if ready_for_s >= STABLE_AFTER_S:
            self.failures = 0
        delay = min(FIRST_DELAY_S * 2.0**self.failures, MAX_DELAY_S)
        self.failures += 1
        return delay
