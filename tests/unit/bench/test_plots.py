"""Plots are the same bytes for the same run, and are drawn for what was measured only."""

import xml.etree.ElementTree as ET
from pathlib import Path

from tests.bench import plots
from tests.unit.bench.results import results, row, whole


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (plots.draw(whole(), tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == [f"bench-{name}.svg" for name in plots.PLOTS]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        ET.parse(one)


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    assert plots.draw(results(), tmp_path) == {}
    drawn = plots.draw(results(row("echo 64/4", 1)), tmp_path)
    assert [path.name for path in drawn] == ["bench-sessions.svg", "bench-cpu.svg", "bench-distributions.svg"]


def test_other_figures_give_another_plot(tmp_path: Path) -> None:
    [path, *_] = plots.draw(results(row("echo 64/4", 1)), tmp_path)
    before = path.read_bytes()
    plots.draw(results(row("echo 64/4", 1, turns_per_s=2000.0)), tmp_path)
    assert path.read_bytes() != before
