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
from matplotlib.ticker import FuncFormatter, NullLocator

from tests.bench import report
from tests.bench.cases import PARTS, STREAMS
from tests.bench.load import QUANTILES
from tests.bench.report import PROCESSES, Results, by_case, cpu_by_process, spread

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
MANY: Final = 16
"""Sessions from which on turns share frames and commits."""
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
    for name, marker, colour, label in (
        ("echo 64/64", "D", ORANGE, "64 sessions over 64 streams"),
        ("slow 64/4", "s", GREEN, "brain takes 0-20 ms"),
    ):
        if name in by_case(results):
            _line(left, [by_case(results)[name]], "turns_per_s", colour, label, marker=marker)
    left.set(title="turns per second", xlabel="sessions (turns in flight)", ylim=(0, None))
    left.legend(loc="upper left", fontsize=8)
    for number, (figure_name, colour, label) in enumerate(
        (("p50_ms", BLUE, "turn p50"), ("p99_ms", ORANGE, "turn p99"), ("accept_p50_ms", GREEN, "accept p50"),
         ("accept_p99_ms", GREY, "accept p99"))
    ):  # fmt: skip
        _line(right, sweep, figure_name, colour, label, line="--" if number >= 2 else "-")
    right.set(title="latency in ms", xlabel="sessions (turns in flight)", yscale="log")
    _plain(right.yaxis)
    right.legend(loc="upper left", fontsize=8)
    for axes in (left, right):
        counts = [rows[0]["sessions"] for rows in sweep]
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
    return figure


def _of_sweep(row: dict[str, Any]) -> bool:
    return bool(row["agent"] == "echo" and row["streams"] == min(STREAMS, row["sessions"]))


def _cpu(results: Results) -> Figure | None:
    """CPU per turn by process, stacked; on a scale of their own what few sessions cost."""
    cases = {name: cpu_by_process(rows) for name, rows in by_case(results).items() if not rows[0]["live"]}
    few = {name: used for name, used in cases.items() if by_case(results)[name][0]["sessions"] < MANY}
    groups = [group for group in (few, {n: used for n, used in cases.items() if n not in few}) if group]
    if not groups:
        return None
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(cases)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(group) for group in groups])
    for axes, group in zip(panels[:, 0], groups, strict=True):
        _stacked(axes, group, PROCESSES, 2)
    panels[0, 0].set_title("CPU milliseconds per turn by process (brain sessions/streams)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
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
        if axes.lines:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8)
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
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)
    return figure


def _memory(results: Results) -> Figure | None:
    """Memory by process, idle and loaded."""
    sizes = results["memory"]
    if not sizes:
        return None
    figure = Figure(figsize=(9, 1.9), layout="constrained")
    axes = figure.subplots()
    _stacked(axes, sizes, PROCESSES[1:], 0)
    axes.set_title("memory in MB (PSS) by process")
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def _waterfall(results: Results) -> Figure | None:
    """Where the time of a turn goes, hop by hop, for each shape that was looked at."""
    shapes = [(shape, report.hops(shape)) for shape in results.get("waterfall", [])]
    if not shapes:
        return None
    figure = Figure(figsize=(9, 0.8 + 0.27 * sum(len(rows) + 2 for _, rows in shapes)), layout="constrained")
    panels = figure.subplots(len(shapes), 1, squeeze=False, height_ratios=[len(rows) + 1 for _, rows in shapes])
    for axes, (shape, rows) in zip(panels[:, 0], shapes, strict=True):
        begun = 0.0
        for number, row in enumerate(rows):
            axes.barh(number, row["of_turn_us"], left=begun, color=GREY if " -> " in row["name"] else BLUE, height=0.7)
            begun += row["of_turn_us"]
            axes.text(begun, number, f" {row['p50_us']:.0f} / {row['p99_us']:.0f}", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(y=0.02)
        of = f"sessions/streams {shape['sessions']}/{shape['streams']}"
        axes.set(title=f"{of}: microseconds of the mean turn; p50 / p99 of each hop", xlim=(0, begun * 1.12))
    return figure


PLOTS: Final[dict[str, tuple[str, Callable[[Results], Figure | None]]]] = {
    "sessions": ("Turns per second and latency against the number of sessions", _sessions),
    "cpu": ("CPU per turn by process, for each shape", _cpu),
    "waterfall": ("Where the time of a turn goes, hop by hop", _waterfall),
    "distributions": ("Distributions of accept latency and of what is added to a live token", _distributions),
    "recovery": ("Recovery times after kill -9 of each part", _recovery),
    "memory": ("Memory by process, idle and after the load", _memory),
}


def _stacked(axes: Axes, bars: dict[str, dict[str, float]], parts: Iterable[str], digits: int) -> None:
    """Horizontal bars made of their processes' shares, with the sum at the end."""
    begun = [0.0] * len(bars)
    for part in parts:
        sizes = [of.get(part, 0.0) for of in bars.values()]
        axes.barh(list(bars), sizes, left=begun, color=COLOURS[part], label=part, height=0.7)
        begun = [before + size for before, size in zip(begun, sizes, strict=True)]
    for number, total in enumerate(begun):
        axes.text(total, number, f" {total:.{digits}f}", va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, max(begun) * 1.12))


def _two_panels() -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    return figure, (left, right)


def _line(
    axes: Axes,
    cases: Iterable[list[dict[str, Any]]],
    figure: str,
    colour: str,
    label: str,
    *,
    line: str = "-",
    marker: str = "o",
) -> None:
    """Medians against the number of sessions, with the range of the rounds."""
    seen = {rows[0]["sessions"]: found for rows in cases if (found := spread(rows, figure)) is not None}
    ranges = [
        [found.median - found.low for found in seen.values()],
        [found.high - found.median for found in seen.values()],
    ]
    axes.errorbar(
        list(seen), [found.median for found in seen.values()], yerr=ranges,
        color=colour, label=label, marker=marker, markersize=4, capsize=3, linestyle=line,
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
