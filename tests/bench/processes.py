"""CPU seconds and memory of processes and their children, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """The process and everything below it: PostgreSQL and launchers work in children."""
    found, todo = [], [pid]
    while todo:
        current = todo.pop()
        found.append(current)
        for task in Path(f"/proc/{current}/task").glob("*"):
            try:
                todo += [int(child) for child in (task / "children").read_text().split()]
            except OSError:
                continue
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, of the process tree so far, with children that were reaped."""
    total = 0.0
    for member in tree(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ended = (int(fields[13]) + int(fields[14])) if member == pid else 0
        total += (int(fields[11]) + int(fields[12]) + ended) * _TICK_S
    return total


def memory(pid: int) -> tuple[int, int]:
    """Proportional set size of the process tree in bytes: (without shared memory, the shared memory)."""
    own = shared = 0
    for member in tree(pid):
        try:
            rows = [line.split() for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()]
        except OSError:
            continue
        sizes = {row[0]: int(row[1]) * 1024 for row in rows if row[0].startswith("Pss")}
        shared += sizes["Pss_Shmem:"]
        own += sizes["Pss:"] - sizes["Pss_Shmem:"]
    return own, shared


def pss_mb(pid: int) -> float:
    """Proportional set size of the process tree in MB: shared pages are counted once over all who share them."""
    total = 0
    for member in tree(pid):
        try:
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024
