"""Memory of a stack's processes over time or over sessions, and its slope."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import linear_regression
from typing import Final

from tests.bench import processes

MIB: Final = 1024 * 1024
SHARED: Final = "postgres, shared"
"""PostgreSQL's buffers: a cache of a fixed size (`shared_buffers`), which any load fills until it is full."""


class Samples:
    """Sizes by process, in bytes, against some progress (seconds, sessions)."""

    def __init__(self, look: Callable[[int], tuple[int, int]] = processes.memory) -> None:
        """`look` tells the size of a process tree, and of its shared memory."""
        self._look = look
        self.taken: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def take(self, pids: Mapping[str, int], progress: float) -> None:
        """Looks at all processes now."""
        for name, pid in pids.items():
            own, shared = self._look(pid)
            self.add(name, progress, own)
            if name == "postgres":
                self.add(SHARED, progress, shared)

    def add(self, name: str, progress: float, size: int) -> None:
        """Notes one size."""
        self.taken[name].append((progress, size))

    @property
    def total_mib(self) -> float:
        """Everything at the last look, shared memory included."""
        return sum(sizes[-1][1] for sizes in self.taken.values()) / MIB

    @property
    def peak_mib(self) -> float:
        """The most that everything was at one look."""
        sums: list[float] = [sum(size for _, size in look) for look in zip(*self.taken.values(), strict=True)]
        return max(sums) / MIB

    def slope(self, name: str, settled: float) -> float:
        """Growth of a process in bytes per unit of progress, from `settled` on; 0 of less than three looks."""
        after = [(progress, size) for progress, size in self.taken[name] if progress >= settled]
        if len(after) < 3:
            return 0.0
        return float(linear_regression([progress for progress, _ in after], [size for _, size in after]).slope)

    def share(self, name: str, settled: float, per: float) -> float:
        """Growth per `per` units of progress as a part of what the process has at the first look after `settled`."""
        first = next((size for progress, size in self.taken[name] if progress >= settled), 0)
        return self.slope(name, settled) * per / first if first else 0.0
