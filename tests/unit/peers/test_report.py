"""The comparison with peers: ratios, and that every system is explained."""

from pathlib import Path
from typing import Any

from tests.bench.report import Spread
from tests.peers import report, systems
from tests.peers.facts import FACTS


def test_every_system_is_explained() -> None:
    named = {systems.OURS, *(peer.name for peer in systems.peers(Path("restate-server")))}
    assert set(FACTS) == named


def test_without_a_server_restate_is_left_out() -> None:
    left = {peer.name for peer in systems.peers(None)}
    assert left == {name for name in FACTS if name != systems.OURS and not name.startswith("Restate")}


def test_every_shape_has_ours_and_a_peer() -> None:
    for shape in systems.SHAPES:
        assert [case for case in systems.OUR_CASES if shape in case.shapes]
        assert any(shape in case.shapes for peer in systems.peers(Path("x")) for case in peer.cases)


def test_ratios_are_taken_within_a_round() -> None:
    ours = [_row(0, 1000.0), _row(1, 300.0), _row(2, 100.0)]
    theirs = [_row(0, 500.0), _row(1, 100.0)]
    # 2.0 and 3.0; that of the medians would be 1.0. The round that one of them misses does not count.
    assert report.ratio(ours, theirs, "turns_per_s") == Spread(2.5, 2.0, 3.0)


def test_what_went_wrong_is_noted() -> None:
    row = {**_row(0, 10.0), "errors": 3, "foreign_cores": 0.5}
    assert report.note([row, _row(1, 10.0)]) == "3 errors; others used more than 0.1 of a core in 1 of 2"


def _row(number: int, rate: float) -> dict[str, Any]:
    return {"round": number, "turns_per_s": rate, "errors": 0, "foreign_cores": 0.0}
