"""Bars are judged by the median, and one that was not measured does not hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import bars
from tests.peers.systems import OURS
from tests.unit.bench.results import results, row


def bar(run: dict[str, Any], what: str) -> bars.Bar:
    [found] = [each for each in bars.judged(run) if each.what == what]
    return found


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [((4000.0, 4500.0, 6000.0), "HOLDS"), ((4000.0, 4499.0, 6000.0), "MISSED"), ((), "not measured")],
)
def test_a_least_figure(rates: tuple[float, ...], verdict: str) -> None:
    run = results(*(row("echo 64/4", n, turns_per_s=rate) for n, rate in enumerate(rates, 1)))
    assert bar(run, "64 sessions over 4 streams").verdict == verdict


@pytest.mark.parametrize(("p50_ms", "verdict"), [(4.49, "HOLDS"), (4.5, "MISSED")])
def test_a_bound_is_not_to_be_reached(p50_ms: float, verdict: str) -> None:
    assert bar(results(row("echo 1/1", 1, p50_ms=p50_ms)), "one session: turn p50").verdict == verdict


def test_accepting_is_compared_with_the_machine_in_the_same_round() -> None:
    run = results(
        row("echo 1/1", 1, accept_p50_ms=1.0),
        row("echo 1/1", 2, accept_p50_ms=3.0),
        limits=[{"round": 1, "publish_p50_ms": 0.4}, {"round": 2, "publish_p50_ms": 2.5}],
    )
    judged = bar(run, "one session: accept p50 above the raw synced publish")
    assert (judged.measured, judged.verdict) == ("0.55 (0.50-0.60) ms", "HOLDS")


def test_a_recovery_is_judged_by_the_slowest() -> None:
    run = results(recovery=[{"part": "nats", "all_s": 1.0}, {"part": "router-0", "all_s": 6.0}])
    assert bar(run, "slowest recovery: every session answered again").verdict == "MISSED"


def test_bars_of_other_measurements_are_taken_over(tmp_path: Path) -> None:
    file = tmp_path / "bench-history.json"
    file.write_text(json.dumps({"bars": [{"name": "1 M messages", "value": 0.871, "holds": False}]}))
    run = results(others=bars.read_others([file]))
    assert bar(run, "1 M messages") == bars.Bar("1 M messages", "", "0.87", False)


def peer_row(system: str, rate: float, p99_ms: float) -> dict[str, Any]:
    return {"system": system, "case": "", "shapes": ["few"], "round": 1, "turns_per_s": rate, "p99_ms": p99_ms}


@pytest.mark.parametrize(("p99_ms", "holds"), [(19.0, True), (21.0, False)])
def test_ours_has_to_be_ahead_of_the_best_set_up_of_a_peer(tmp_path: Path, p99_ms: float, holds: bool) -> None:
    file = tmp_path / "bench-peers.json"
    rows = [
        peer_row(OURS, 3000.0, p99_ms),
        peer_row("Restate, 1 partition", 2000.0, 20.0),
        peer_row("Restate, default partitions", 1000.0, 40.0),
    ]
    file.write_text(json.dumps({"rows": rows}))
    throughput, latency = bars.read_others([file])["bench-peers"]
    assert (throughput["value"], throughput["holds"]) == ("1.50", True)
    assert latency["holds"] is holds


@pytest.mark.parametrize("content", ["[]", "{}"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "flat.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="neither bars nor"):
        bars.read_others([file])
