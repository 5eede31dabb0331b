"""From the results of a run to tables and the generated part of the page. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tests.bench.report import Spread, Table, spread
from tests.peers.facts import FACTS, Facts
from tests.peers.measure import FOREIGN_CORES
from tests.peers.systems import OURS, SHAPES

Results = dict[str, Any]
Row = dict[str, Any]
COLUMNS: Final = (
    "system", "turns/s", "p50 ms", "p99 ms", "CPU s/1000", "memory MB", "turns/s, ours to theirs",
    "p99, theirs to ours", "note",
)  # fmt: skip


def tables(results: Results) -> list[Table]:
    """One per shape, then CPU by process."""
    made = [_shape(results, shape) for shape in SHAPES]
    return [table for table in [*made, _cpu(results)] if table.rows]


def measured(results: Results, shape: str) -> dict[tuple[str, str], list[Row]]:
    """The rounds' rows of each system and way of connecting in a shape, in the order of a round."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in results["rows"]:
        if shape in row["shapes"]:
            found.setdefault((row["system"], row["case"]), []).append(row)
    return found


def ratio(ours: list[Row], theirs: list[Row], figure: str) -> Spread | None:
    """Ours to theirs, round by round."""
    by_round = {row["round"]: row for row in ours}
    return Spread.of(
        by_round[row["round"]][figure] / row[figure] for row in theirs if row["round"] in by_round and row[figure]
    )


def markdown(results: Results, pictures: dict[str, str]) -> str:
    """The generated part of the page; `pictures` are alternative texts by path."""
    plan = results["plan"]
    rounds = "one round" if plan["rounds"] == 1 else f"{plan['rounds']} rounds"
    blocks = [
        "\n".join(f"- {name}: {value}" for name, value in results["machine"].items()),
        f"Medians of {rounds} (lowest and highest in brackets), each load {plan['seconds']:g} s after"
        f" {plan['warm_s']:g} s to warm up. Ratios are taken within each round: above 1, ours is ahead.",
    ]
    if not results["complete"]:
        blocks.append("**This run was cut off: what follows is what it had measured until then.**")
    blocks += ["### What is compared", _facts(results).markdown().replace("---:", "---")]
    for table in tables(results):
        blocks += [f"### {table.title}", table.markdown()]
    blocks += [f"![{text}]({path})" for path, text in pictures.items()]
    return "\n\n".join(blocks)


def told(results: Results) -> Iterator[str]:
    """What each system that was measured had on disk before its answer, and what differs, in lines for a terminal."""
    for name, each in _measured_facts(results).items():
        yield f"{name}: on disk before the answer: {each.on_disk}."
        yield f"  What differs: {each.differs}."


def _facts(results: Results) -> Table:
    rows = [(name, each.set_up, each.on_disk, each.differs) for name, each in _measured_facts(results).items()]
    return Table("What is compared", ("system", "set-up", "on disk before the answer", "what differs"), rows)


def _measured_facts(results: Results) -> dict[str, Facts]:
    names = {row["system"] for row in results["rows"]}
    return {name: each for name, each in FACTS.items() if name in names}


def _shape(results: Results, shape: str) -> Table:
    found = measured(results, shape)
    ours = next((rows for (system, _), rows in found.items() if system == OURS), [])
    rows = []
    for (system, case), taken in found.items():
        theirs = system != OURS
        p99 = ratio(taken, ours, "p99_ms") if theirs else None
        rows.append(
            (
                f"{system} ({case})",
                *(_told(spread(taken, figure), digits) for figure, digits in (("turns_per_s", 0), ("p50_ms", 1))),
                *(_told(spread(taken, figure), digits) for figure, digits in (("p99_ms", 1), ("cpu_s_per_1000", 2))),
                _told(spread(taken, "pss_mb"), 0),
                _told(ratio(ours, taken, "turns_per_s") if theirs else None, 2),
                _told(p99, 2),
                note(taken),
            )
        )
    return Table(SHAPES[shape], COLUMNS, rows)


def _cpu(results: Results) -> Table:
    rows = []
    for shape in ("few", "each"):
        for (system, case), taken in measured(results, shape).items():
            # What HTTP/1.1 peers did is shown in both shapes; here once.
            if taken[0]["shapes"][0] == shape:
                rows.append((f"{system} ({case})", ", ".join(_split(taken))))
    return Table("CPU seconds per 1000 turns by process, 64 sessions, echo brain", ("system", "processes"), rows)


def _split(taken: list[Row]) -> Iterator[str]:
    for name in taken[0]["cpu_by_process"]:
        used = Spread.of(row["cpu_by_process"].get(name, 0.0) for row in taken)
        if used is not None and used.median >= 0.001:
            yield f"{name} {used.median:.3f}"


def _told(value: Spread | None, digits: int) -> str:
    return value.told(digits) if value else ""


def note(taken: list[Row]) -> str:
    """What speaks against a figure; empty when nothing does."""
    errors = sum(row["errors"] for row in taken)
    disturbed = sum(row["foreign_cores"] > FOREIGN_CORES for row in taken)
    notes = [f"{errors} errors"] if errors else []
    notes += [f"others used more than {FOREIGN_CORES} of a core in {disturbed} of {len(taken)}"] if disturbed else []
    return "; ".join(notes)
