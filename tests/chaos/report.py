"""Recovery times of a fault: printed, and held to their bar.

A bar holds on a machine that runs. What the machine stood still meanwhile, as the process of the load felt it, comes on
top of it and is printed.
"""

from __future__ import annotations

from typing import Final

from tests.chaos.load import Load

SHARED_MACHINE: Final = 1.5
"""Bars are for a machine of its own; a test runs beside others on two cores."""


class Recoveries:
    """The recoveries from one kind of fault; `bar_s` is what the longest may take, None: no bar is stated.

    Of each recovery two times are taken: the slowest partition's, which is what the bars are about, and the slowest
    conversation's. A turn that was in the dead part's hands must not wait for longer than the others.
    """

    def __init__(self, fault: str, bar_s: float | None = None) -> None:
        self.fault, self.bar_s = fault, bar_s
        self._of_partitions: list[float] = []
        self._of_sessions: list[float] = []
        self._stalled: list[float] = []

    def add(self, load: Load, since: float) -> None:
        """One recovery from a fault at `since` (monotonic), or from its end; `load` has gone on since."""
        self._of_partitions.append(load.silence(since))
        self._of_sessions.append(load.session_silence(since))
        self._stalled.append(load.stalls.since(since))

    async def hold(self, load: Load) -> None:
        """Assert every promise of the conversations, print the line of the report, then assert the bar."""
        counts = await load.finish()
        bar = f"< {self.bar_s:g} s" if self.bar_s is not None else "no bar"
        each = " ".join(f"{s:.2f}" for s in self._of_partitions)
        print(
            f"\nRECOVERY {self.fault}: max {max(self._of_partitions):.2f} s ({bar}; each: {each}), "
            f"slowest conversation {max(self._of_sessions):.2f} s, the last answer after {load.drain_s:.2f} s "
            f"({load.drain_stalled_s:.2f} s of them stalls); "
            f"the machine stood still for {' '.join(f'{s:.2f}' for s in self._stalled)} s; "
            + ", ".join(f"{count} {what}" for what, count in counts.items())
        )
        if self.bar_s is not None:
            limit_s = self.bar_s * SHARED_MACHINE
            told = f"the bar is {bar}, {limit_s:g} s here"
            for taken in zip(self._of_partitions, self._of_sessions, self._stalled, strict=True):
                partition_s, session_s, stalled_s = taken
                assert max(partition_s, session_s) < limit_s + stalled_s, f"{told}, and {stalled_s:.2f} s of stalls"
            assert load.drain_s < limit_s + load.drain_stalled_s, f"{told}, and {load.drain_stalled_s:.2f} s of stalls"
