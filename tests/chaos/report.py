"""Recovery times of a fault: printed, and held to their bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SHARED_MACHINE: Final = 1.5
"""Bars are for a machine of its own; a test runs beside others on two cores."""


class Recoveries:
    """The recoveries of one kind of fault; `bar_s` is what they may take at most, None: no bar is stated."""

    def __init__(self, fault: str, bar_s: float | None = None) -> None:
        self.fault, self.bar_s = fault, bar_s
        self.seconds: list[float] = []

    def add(self, seconds: float) -> None:
        """One recovery: from the fault to the first new outcome on the slowest partition, in seconds."""
        self.seconds.append(seconds)

    def hold(self, counts: Mapping[str, int]) -> None:
        """Print the line of the report, then assert the bar."""
        bar = f"< {self.bar_s:g} s" if self.bar_s is not None else "no bar"
        each = " ".join(f"{s:.2f}" for s in self.seconds)
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        print(f"\nRECOVERY {self.fault}: max {max(self.seconds):.2f} s ({bar}; each: {each}); {told}")
        if self.bar_s is not None:
            assert max(self.seconds) < self.bar_s * SHARED_MACHINE, f"{self.fault}: {each} s, the bar is {bar}"
