"""The bars about peers, from what `make bench-peers` wrote: ahead of Restate, whichever of its set-ups does best."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from tests.bench.report import Spread
from tests.peers.report import measured, ratio
from tests.peers.systems import OURS, SHAPES

PEER: Final = "Restate"
ASKED: Final = ("few", "each", "slow-few")
"""Shapes in which ours has to be ahead."""


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Throughput (ours to theirs) and p99 (theirs to ours) by round, for each shape that was measured."""
    found = []
    for shape in ASKED:
        systems = measured(results, shape)
        ours = next((rows for (system, _), rows in systems.items() if system == OURS), [])
        theirs = [rows for (system, _), rows in systems.items() if system.startswith(PEER)]
        throughput = _closest(ratio(ours, rows, "turns_per_s") for rows in theirs)
        latency = _closest(_inverted(ratio(ours, rows, "p99_ms")) for rows in theirs)
        for what, seen in (("turns/s, ours to theirs", throughput), ("p99, theirs to ours", latency)):
            if seen is not None:
                found.append(
                    {
                        "name": f"ahead of {PEER}: {SHAPES[shape]}: {what}",
                        "target": "> 1",
                        "value": seen.told(2),
                        "holds": seen.median > 1,
                    }
                )
    return found


def _closest(ratios: Iterable[Spread | None]) -> Spread | None:
    """Against the set-up that comes closest."""
    return min((seen for seen in ratios if seen is not None), key=lambda seen: seen.median, default=None)


def _inverted(seen: Spread | None) -> Spread | None:
    return Spread(1 / seen.median, 1 / seen.high, 1 / seen.low) if seen else None
