"""From the results of a run to the tables that people read: pure, nothing is measured or written here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from rich.table import Table as RichTable

from tests.bench.cases import CASES, PARTS
from tests.bench.measure import warnings

LIMITS: Final = {
    "publish": "synced JetStream publish, 300 bytes",
    "grpc": "unary gRPC call, inside one process",
    "commit": "PostgreSQL commit of one row",
    "fdatasync": "fdatasync of 4 KiB",
}
PROCESSES: Final = (
    "client", "gateway-0", "router-0", "cognition-0", "toolgw-0", "controlplane-0", "nats", "postgres", "supervisor",
)  # fmt: skip
"""In the order of tables and plots."""

HOP_IS_RARE_BELOW: Final = 0.05
"""Hops that a smaller part of the turns has are left out: another order of things, or a second dispatch."""

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Of the rounds' values; None of none."""
        taken = list(values)
        return cls(median(taken), min(taken), max(taken)) if taken else None

    def told(self, digits: int = 1) -> str:
        """For example `4.9 (4.5-5.2)`; of one round only `4.9`."""
        middle, low, high = (f"{value:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{middle} ({low}-{high})" if low != high else middle


@dataclass(frozen=True, slots=True)
class Table:
    """A table, for a terminal or a page."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page; the title is up to the page."""
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def by_case(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The rows of each case that was taken, by its name, in the order of a round."""
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in CASES}
    for row in results["cases"]:
        found.setdefault(row["case"], []).append(row)
    return {name: rows for name, rows in found.items() if rows}


def spread(rows: Iterable[dict[str, Any]], figure: str) -> Spread | None:
    """A figure over the rows that have it."""
    return Spread.of(row[figure] for row in rows if row.get(figure) is not None)


def tables(results: Results) -> list[Table]:
    """Every table of the report for which there are figures."""
    made = [turns(results), tokens(results), cpu(results), *waterfalls(results)]
    made += [memory(results), recovery(results), limits(results)]
    return [table for table in made if table.rows]


def turns(results: Results) -> Table:
    """Throughput, latency and CPU of each shape."""
    columns = (
        "brain sessions/streams", "turns/s", "p50 ms", "p99 ms", "accept p50 ms", "accept p99 ms", "CPU s/1000", "note",
    )  # fmt: skip
    figures = {"turns_per_s": 0, "p50_ms": 1, "p99_ms": 1, "accept_p50_ms": 1, "accept_p99_ms": 1, "cpu_s_per_1000": 2}
    rows = [
        (name, *(_told(taken, figure, digits) for figure, digits in figures.items()), note(taken))
        for name, taken in by_case(results).items()
        if not taken[0]["live"]
    ]
    return Table("Turns: median of the rounds (lowest-highest)", columns, rows)


def tokens(results: Results) -> Table:
    """What the way of a streamed word adds."""
    rows = [
        (
            taken[0]["case"].removeprefix("tokens "),
            _told(taken, "tokens_per_s", 0),
            _told(taken, "token_p50_ms", 2),
            _told(taken, "token_p99_ms", 2),
            _told(taken, "cpu_s_per_1000", 2),
            note(taken),
        )
        for taken in by_case(results).values()
        if taken[0]["live"]
    ]
    columns = ("streaming turns", "tokens/s", "added p50 ms", "added p99 ms", "CPU s/1000 turns of 40 tokens", "note")
    return Table("Live tokens: what the stack adds to each", columns, rows)


def cpu(results: Results) -> Table:
    """CPU seconds per 1000 turns by process, medians."""
    cases = by_case(results)
    rows = [
        (name, *(f"{value:.3f}" for value in cpu_by_process(taken).values()), _told(taken, "cpu_s_per_1000", 2))
        for name, taken in cases.items()
    ]
    return Table("CPU seconds per 1000 turns by process, medians", ("case", *PROCESSES, "all"), rows)


def cpu_by_process(taken: list[dict[str, Any]]) -> dict[str, float]:
    """CPU seconds per 1000 turns of a case, the median of each process."""
    return {name: median(row["cpu_by_process"].get(name, 0.0) for row in taken) for name in PROCESSES}


def memory(results: Results) -> Table:
    """Proportional set sizes."""
    rows = [
        (f"{when}", *(f"{sizes.get(name, 0.0):.0f}" for name in PROCESSES[1:]), f"{sum(sizes.values()):.0f}")
        for when, sizes in results["memory"].items()
    ]
    return Table("Memory in MB (PSS): idle after the start, and after the load", ("", *PROCESSES[1:], "all"), rows)


def recovery(results: Results) -> Table:
    """How long conversations wait after a kill."""
    by_part: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in results["recovery"]:
        by_part[row["part"]].append(row)
    rows = [
        (f"kill -9 {part}", str(len(by_part[part])), *(_told(by_part[part], f, 2) for f in ("next_answer_s", "all_s")))
        for part in PARTS
        if by_part[part]
    ]
    columns = ("fault", "times", "next answer after s", "every session answered again after s")
    return Table("Recovery under a light load", columns, rows)


def limits(results: Results) -> Table:
    """What the machine's parts do by themselves."""
    taken = results["limits"]
    rows = [
        (what, _told(taken, f"{name}_p50_ms", 2), _told(taken, f"{name}_p99_ms", 2)) for name, what in LIMITS.items()
    ]
    return Table("The machine in the same run, one after the other", ("", "p50 ms", "p99 ms"), rows if taken else [])


def hops(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """The hops of a turn that are not rare, with `of_turn_us`: what each adds to the mean turn. In order."""
    rows = shape["hops"]
    most = max((row["turns"] for row in rows), default=1)
    return [
        {**row, "of_turn_us": row["mean_us"] * row["turns"] / most}
        for row in rows
        if row["turns"] >= most * HOP_IS_RARE_BELOW
    ]


def waterfalls(results: Results) -> list[Table]:
    """Where the time of a turn goes, a table for each shape that was looked at."""
    columns = ("hop", "mean us of a turn", "p50 us", "p99 us")
    return [
        Table(
            f"Hops of a turn, {shape['sessions']}/{shape['streams']} (sessions/streams)",
            columns,
            [(row["name"], *(f"{row[f]:.0f}" for f in ("of_turn_us", "p50_us", "p99_us"))) for row in hops(shape)],
        )
        for shape in results.get("waterfall", [])
    ]


def note(taken: list[dict[str, Any]]) -> str:
    """What speaks against some of the rounds of a case."""
    said = [f"round {row['round']}: {text}" for row in taken for text in warnings(row)]
    return "; ".join(said)


def _told(taken: list[dict[str, Any]], figure: str, digits: int) -> str:
    seen = spread(taken, figure)
    return seen.told(digits) if seen else ""
