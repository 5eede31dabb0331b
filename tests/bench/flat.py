"""What the benchmarks of flatness share: interleaved cases, CPU beside the load, verdicts, tables and JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.table import Table

from tests.bench import processes
from tests.bench.rotation import Rotation
from tests.bench.stack import Stack

REPORTS: Final = Path(".reports")
COLUMNS: Final = ("turns_per_s", "p50_ms", "p99_ms", "accept_p50_ms", "accept_p99_ms", "cpu_s_per_1000")
Say = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Bar:
    """A promise and what came of it: `value` must be at least `least` and at most `most`."""

    name: str
    value: float
    least: float = float("-inf")
    most: float = float("inf")

    @property
    def holds(self) -> bool:
        """Whether it is kept."""
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        bounds = [f"at least {self.least:.2f}"] if self.least != float("-inf") else []
        bounds += [f"at most {self.most:.2f}"] if self.most != float("inf") else []
        return f"{'HOLDS ' if self.holds else 'MISSED'} {self.name}: {self.value:.2f} ({', '.join(bounds)})"


async def sample(stack: Stack, load: Rotation, seconds: float) -> dict[str, Any]:
    """A stretch of a running load, with the CPU seconds per 1000 turns of every process and of the client."""
    everybody = {**stack.pids, "client": os.getpid()}
    before = {name: processes.cpu_s(pid) for name, pid in everybody.items()}
    seen = await load.measure(seconds)
    thousands = max(seen.turns, 1) / 1000
    used = {name: (processes.cpu_s(pid) - before[name]) / thousands for name, pid in everybody.items()}
    return {**seen.row(), "cpu_s_per_1000": sum(used.values()), "cpu_by_process": used}


def middle(rounds: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median of a figure over rounds."""
    return median(float(each[key]) for each in rounds)


def ratio(rounds: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median over rounds of a figure by that of the base in the same round: what the machine does to both cancels
    out.
    """
    return median(float(each[key]) / float(other[key]) for each, other in zip(rounds, base, strict=True))


def table(title: str, cases: Mapping[str, Sequence[Mapping[str, Any]]], columns: Sequence[str] = COLUMNS) -> Table:
    """A row per case: medians, with the range of the first column."""
    shown = Table("case", *(column.replace("_", " ") for column in columns), "errors", title=title)
    for name, rounds in cases.items():
        cells = []
        for column in columns:
            values = [float(each[column]) for each in rounds]
            digits = 0 if column == "turns_per_s" else 2
            spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if column == columns[0] else ""
            cells.append(f"{median(values):.{digits}f}{spread}")
        shown.add_row(name, *cells, str(sum(int(each.get("errors", 0)) for each in rounds)))
    return shown


def conclude(name: str, result: Mapping[str, Any], bars: Sequence[Bar], say: Say) -> bool:
    """Says which bars hold, writes everything to `.reports/bench-NAME.json`; returns whether all hold."""
    for bar in bars:
        say(str(bar))
    REPORTS.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    told = [{"name": bar.name, "value": bar.value, "holds": bar.holds} for bar in bars]
    file = REPORTS / f"bench-{name}.json"
    file.write_text(json.dumps({"machine": machine, "bars": told, **result}, indent=2) + "\n", encoding="utf-8")
    say(f"written to {file}")
    return all(bar.holds for bar in bars)
