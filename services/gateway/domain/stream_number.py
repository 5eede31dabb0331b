"""Numbers of adapter streams: unique over all gateways and their restarts, and growing with time.

Of two streams of one adapter instance the one with the higher number is the newer, whichever gateways they are at.
"""

from collections.abc import Callable
from typing import Final

RANDOM_BITS: Final = 12


class StreamNumbers:
    """Makes numbers: microseconds since the epoch, then random bits; always above the one made before."""

    def __init__(self, now_us: Callable[[], int], random_bits: Callable[[int], int]) -> None:
        self._now_us = now_us
        self._random_bits = random_bits
        self._last = 0

    def next(self) -> int:
        """A new number; fits 64 bits until the year 2112."""
        number = (self._now_us() << RANDOM_BITS) | self._random_bits(RANDOM_BITS)
        self._last = max(number, self._last + 1)
        return self._last
