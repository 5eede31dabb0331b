"""The comparison as SVG: throughput and latency of every system in every shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tests.bench.plots import BLUE, GREY, STYLE
from tests.bench.report import Spread, spread
from tests.peers.report import measured
from tests.peers.systems import OURS, SHAPES

FIGURES: Final = (
    ("throughput", "turns_per_s", "turns per second", "{:.0f}"),
    ("p99", "p99_ms", "turn p99 in ms", "{:.1f}"),
)


def draw(results: dict[str, Any], folder: Path) -> dict[Path, str]:
    """Draws both plots into a folder; returns each one's alternative text by its path."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, figure, title, form in FIGURES:
        path = folder / f"peers-{name}.svg"
        with matplotlib.rc_context(STYLE):
            made = _bars(results, figure, title, form)
            made.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()), encoding="utf-8")
        drawn[path] = f"{title.capitalize()} of each system in each shape, medians with the range of the rounds"
    return drawn


def _bars(results: dict[str, Any], figure: str, title: str, form: str) -> Figure:
    shapes = [shape for shape in SHAPES if measured(results, shape)]
    heights = [len(measured(results, shape)) for shape in shapes]
    made = Figure(figsize=(10, 0.36 * sum(heights) + 0.75 * len(shapes)), layout="constrained")
    made.suptitle(title.capitalize(), x=0.01, ha="left")
    grid = made.subplots(len(shapes), 1, squeeze=False, height_ratios=heights)
    for axes, shape in zip(grid[:, 0], shapes, strict=True):
        _panel(axes, results, shape, figure, form)
        axes.set_title(SHAPES[shape])
    return made


def _panel(axes: Axes, results: dict[str, Any], shape: str, figure: str, form: str) -> None:
    found = {name: spread(rows, figure) for name, rows in measured(results, shape).items()}
    known: dict[tuple[str, str], Spread] = {name: value for name, value in found.items() if value}
    places = range(len(known))
    values = list(known.values())
    middles = [value.median for value in values]
    ranges = [[value.median - value.low for value in values], [value.high - value.median for value in values]]
    colours = [BLUE if system == OURS else GREY for system, _ in known]
    if figure == "p99_ms":
        # Latencies differ by a factor of a thousand; a bar has no length on a logarithmic axis, a point has a place.
        axes.errorbar(middles, places, xerr=ranges, fmt="none", elinewidth=1, ecolor="#333333")
        axes.scatter(middles, places, c=colours, s=40, zorder=3)
        axes.set(xscale="log", xlim=(0.5, 10_000))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.barh(places, middles, xerr=ranges, color=colours, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        axes.margins(x=0.12)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            form.format(value.median), (value.high, place), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=9,
        )  # fmt: skip
    axes.set_yticks(places, [f"{system} ({case})" for system, case in known])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
