"""CPU seconds and memory of processes and their children, from /proc."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Self

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree(pid: int, without: Collection[int] = ()) -> list[int]:
    """The process and everything below it: PostgreSQL and launchers work in children.

    Processes below it that are in `without` are left out, with all that is below them.
    """
    found, todo = [], [pid]
    while todo:
        current = todo.pop()
        found.append(current)
        for task in Path(f"/proc/{current}/task").glob("*"):
            try:
                children = [int(child) for child in (task / "children").read_text().split()]
            except OSError:
                continue
            todo += [child for child in children if child not in without]
    return found


def cpu_s(pid: int, without: Collection[int] = ()) -> float:
    """CPU seconds, user and system, of the process tree so far, with children that were reaped."""
    total = 0.0
    for member in tree(pid, without):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ended = (int(fields[13]) + int(fields[14])) if member == pid else 0
        total += (int(fields[11]) + int(fields[12]) + ended) * _TICK_S
    return total


@dataclass(frozen=True, slots=True)
class Machine:
    """CPU seconds of all cores so far."""

    busy_s: float
    """Of processes, in user and system mode. Interrupts are not in it: nobody's processes are charged for them."""
    steal_s: float
    """In which the hypervisor ran others."""

    @classmethod
    def now(cls) -> Machine:
        """Read the counters."""
        fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]]
        user, nice, system, steal = fields[0], fields[1], fields[2], fields[7]
        return cls((user + nice + system) * _TICK_S, steal * _TICK_S)


class Usage:
    """CPU of processes between the begin and the end of the block, and of everybody else.

    `pids` are ours, by name; one that is below another is not counted twice. After the block: `by_process`,
    `foreign_s` and `steal_s`, in CPU seconds, and `seconds`.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self.by_process: dict[str, float] = {}
        self.seconds = self.foreign_s = self.steal_s = 0.0

    def __enter__(self) -> Self:
        self._machine, self._began = Machine.now(), monotonic()
        self._before = self._cpu()
        return self

    def __exit__(self, *_: object) -> None:
        self.by_process = {name: max(used - self._before[name], 0.0) for name, used in self._cpu().items()}
        machine = Machine.now()
        self.seconds = monotonic() - self._began
        busy = machine.busy_s - self._machine.busy_s
        self.foreign_s = max(busy - sum(self.by_process.values()), 0.0)
        self.steal_s = machine.steal_s - self._machine.steal_s

    def _cpu(self) -> dict[str, float]:
        return {name: cpu_s(pid, set(self._pids.values())) for name, pid in self._pids.items()}


def memory(pid: int) -> tuple[int, int]:
    """Proportional set size of the process tree in bytes: (without shared memory, the shared memory)."""
    sizes = _sizes(pid)
    return sizes["Pss"] - sizes["Pss_Shmem"], sizes["Pss_Shmem"]


def anonymous(pid: int) -> tuple[int, int]:
    """What the process tree allocated itself, in bytes, and the shared memory. What it maps from files is left out:
    its part of them falls and rises as other programs that use them come and go.
    """
    sizes = _sizes(pid)
    return sizes["Pss_Anon"], sizes["Pss_Shmem"]


def _sizes(pid: int) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for member in tree(pid):
        try:
            rows = [line.split() for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()]
        except OSError:
            continue
        for row in rows:
            if row[0].startswith("Pss"):
                sizes[row[0].rstrip(":")] += int(row[1]) * 1024
    return sizes


def pss_mb(pid: int, without: Collection[int] = ()) -> float:
    """Proportional set size of the process tree in MB: shared pages are counted once over all who share them."""
    total = 0
    for member in tree(pid, without):
        try:
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024
