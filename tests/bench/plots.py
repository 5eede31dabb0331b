"""Plots of a run's results as SVG files. The same results give the same bytes; white ground, so that they can be read
on pages of any colour.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tests.bench.cases import PARTS, STREAMS
from tests.bench.load import QUANTILES
from tests.bench.report import PROCESSES, Results, Spread, by_case, cpu_by_process, spread

STYLE: Final = {
    "svg.hashsalt": "somastack",  # ids in the file are made from it, not by chance
    "svg.fonttype": "none",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9730d", "#2b8a5b", "#8a8a8a"
COLOURS: Final = dict(
    zip(
        PROCESSES,
        ("#8a8a8a", "#1f5fa8", "#d9730d", "#2b8a5b", "#b0559c", "#c9a227", "#4bb3c4", "#7a4b2a", "#d0d0d0"),
        strict=True,
    )
)


def draw(results: Results, folder: Path) -> dict[Path, str]:
    """Draws every plot for which there are figures into a folder; returns each one's alternative text by its path."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, (text, plot) in PLOTS.items():
        with matplotlib.rc_context(STYLE):
            figure = plot(results)
            if figure is None:
                continue
            path = folder / f"bench-{name}.svg"
            figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        _without_trailing_blanks(path)
        drawn[path] = text
    return drawn


def _sessions(results: Results) -> Figure | None:
    """Throughput and latency against the number of sessions."""
    cases = by_case(results).values()
    sweep = [
        rows for rows in cases if rows[0]["agent"] == "echo" and rows[0]["streams"] == min(STREAMS, rows[0]["sessions"])
    ]
    if not sweep:
        return None
    figure, (left, right) = _two_panels()
    _line(left, sweep, "turns_per_s", BLUE, "over 4 streams")
    left.set(title="turns per second", xlabel="sessions (turns in flight)", ylim=(0, None))
    for number, (figure_name, colour, label) in enumerate(
        (("p50_ms", BLUE, "turn p50"), ("p99_ms", ORANGE, "turn p99"), ("accept_p50_ms", GREEN, "accept p50"),
         ("accept_p99_ms", GREY, "accept p99"))
    ):  # fmt: skip
        _line(right, sweep, figure_name, colour, label, dashed=number >= 2)
    right.set(title="latency in ms", xlabel="sessions (turns in flight)", yscale="log")
    _plain(right.yaxis)
    right.legend(loc="upper left")
    for axes in (left, right):
        counts = [rows[0]["sessions"] for rows in sweep]
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    return figure


def _cpu(results: Results) -> Figure | None:
    """CPU per turn by process, stacked."""
    cases = {name: rows for name, rows in by_case(results).items() if not rows[0]["live"]}
    if not cases:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.38 * len(cases)), layout="constrained")
    axes = figure.subplots()
    names = list(cases)
    by_name = {name: cpu_by_process(rows) for name, rows in cases.items()}
    begun = [0.0] * len(names)
    for process in PROCESSES:
        sizes = [by_name[name][process] for name in names]
        axes.barh(names, sizes, left=begun, color=COLOURS[process], label=process, height=0.7)
        begun = [before + size for before, size in zip(begun, sizes, strict=True)]
    for number, total in enumerate(begun):
        axes.text(total, number, f" {total:.2f}", va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="CPU milliseconds per turn by process (brain sessions/streams)", xlim=(0, max(begun) * 1.1))
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _distributions(results: Results) -> Figure | None:
    """Accept latency and what is added to live tokens, as distributions."""
    figure, (left, right) = _two_panels()
    cases = by_case(results)
    shown = [("echo 1/1", BLUE), ("echo 64/4", ORANGE), ("echo 64/64", GREEN), ("slow 64/4", GREY)]
    any_drawn = [_distribution(left, cases, name, "accept_quantiles_ms", colour) for name, colour in shown]
    raw = spread(results["limits"], "publish_p50_ms")
    if raw is not None:
        left.axvline(raw.median, color="black", linewidth=1, linestyle=":", label="raw synced publish p50")
    left.set(title="accept: message to receipt, ms", ylabel="percent of messages")
    tokens = [("tokens 20", BLUE), ("tokens 500", ORANGE)]
    any_drawn += [_distribution(right, cases, name, "token_quantiles_ms", colour) for name, colour in tokens]
    right.set(title="live token: added by the stack, ms", ylabel="percent of tokens")
    for axes in (left, right):
        axes.set(xscale="log", ylim=(0, 100))
        _plain(axes.xaxis)
        axes.legend(loc="lower right", fontsize=8)
    return figure if any(any_drawn) else None


def _recovery(results: Results) -> Figure | None:
    """Recovery times, every one of them."""
    by_part: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in results["recovery"]:
        by_part[row["part"]].append(row)
    parts = [part for part in PARTS if by_part[part]]
    if not parts:
        return None
    figure = Figure(figsize=(9, 1.0 + 0.45 * len(parts)), layout="constrained")
    axes = figure.subplots()
    axes.barh(parts, [median(row["all_s"] for row in by_part[part]) for part in parts], color="#c5d6ea", height=0.6)
    for name, colour, label in (
        ("next_answer_s", BLUE, "next answer"),
        ("all_s", ORANGE, "every session answered again (bar: median)"),
    ):
        taken = [(row[name], number) for number, part in enumerate(parts) for row in by_part[part]]
        axes.scatter(
            [at for at, _ in taken], [number for _, number in taken], color=colour, s=22, label=label, zorder=3
        )
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="seconds after kill -9", xlim=(0, None))
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _memory(results: Results) -> Figure | None:
    """Memory by process, idle and loaded."""
    sizes = results["memory"]
    if not sizes:
        return None
    figure = Figure(figsize=(9, 1.9), layout="constrained")
    axes = figure.subplots()
    begun = [0.0] * len(sizes)
    for process in PROCESSES[1:]:
        parts = [of.get(process, 0.0) for of in sizes.values()]
        axes.barh(list(sizes), parts, left=begun, color=COLOURS[process], label=process, height=0.6)
        begun = [before + part for before, part in zip(begun, parts, strict=True)]
    for number, total in enumerate(begun):
        axes.text(total, number, f" {total:.0f}", va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="memory in MB (PSS) by process", xlim=(0, max(begun) * 1.1))
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def _waterfall(results: Results) -> Figure | None:
    """Where the time of one turn goes, hop by hop."""
    rows = results.get("waterfall", [])
    if not rows:
        return None
    figure = Figure(figsize=(9, 1.0 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    begun = 0.0
    for number, row in enumerate(rows):
        axes.barh(number, row["p50_us"], left=begun, color=BLUE, height=0.6)
        axes.barh(
            number, max(row["p99_us"] - row["p50_us"], 0), left=begun + row["p50_us"], color="#c5d6ea", height=0.3
        )
        axes.text(begun + row["p50_us"], number - 0.32, f" {row['p50_us']:.0f} / {row['p99_us']:.0f}", fontsize=8)
        begun += row["p50_us"]
    axes.set_yticks(range(len(rows)), [row["hop"] for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="microseconds of a turn by hop: p50 (dark) / p99 (light), each after the one before", xlim=(0, None))
    return figure


PLOTS: Final[dict[str, tuple[str, Callable[[Results], Figure | None]]]] = {
    "sessions": ("Turns per second and latency against the number of sessions", _sessions),
    "cpu": ("CPU per turn by process, for each shape", _cpu),
    "waterfall": ("Where the time of a turn goes, hop by hop", _waterfall),
    "distributions": ("Distributions of accept latency and of what is added to a live token", _distributions),
    "recovery": ("Recovery times after kill -9 of each part", _recovery),
    "memory": ("Memory by process, idle and after the load", _memory),
}


def _two_panels() -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    return figure, (left, right)


def _line(
    axes: Axes, cases: Iterable[list[dict[str, Any]]], figure: str, colour: str, label: str, *, dashed: bool = False
) -> None:
    points: list[tuple[int, Spread]] = []
    for rows in cases:
        seen = spread(rows, figure)
        if seen is not None:
            points.append((rows[0]["sessions"], seen))
    counts, middles = [count for count, _ in points], [seen.median for _, seen in points]
    ranges = [[seen.median - seen.low for _, seen in points], [seen.high - seen.median for _, seen in points]]
    axes.errorbar(
        counts, middles, yerr=ranges, color=colour, label=label, marker="o", markersize=4, capsize=3,
        linestyle="--" if dashed else "-",
    )  # fmt: skip


def _distribution(axes: Axes, cases: dict[str, list[dict[str, Any]]], name: str, figure: str, colour: str) -> bool:
    """Draws the medians of a case's percentiles; returns whether there are any."""
    taken = [row[figure] for row in cases.get(name, []) if row.get(figure)]
    if not taken:
        return False
    axes.plot([median(values) for values in zip(*taken, strict=True)], QUANTILES, color=colour, label=name, marker=".")
    return True


def _plain(axis: Any) -> None:
    """Ticks as `0.5` and `20`, not as powers."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}".lstrip("0.")[0] in "25" else "")
    )


def _without_trailing_blanks(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
