"""What has to hold, and whether it does in a run's results. A bar is judged by the median of the rounds.

Other measurements (`make bench ARGS=history` and the like) judge their own: their JSON files have at their top
`"bars": [{"name": what, "value": what was measured, "target": text (may be missing), "holds": true or false}]`. What
`make bench-peers` wrote is judged by `peer_bars`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.bench import peer_bars
from tests.bench.report import Results, Spread, Table, by_case, spread

ACCEPT_ABOVE_MS: Final = 0.7


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar as judged; `holds` is None for one that was not measured."""

    what: str
    target: str
    measured: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """For the table."""
        return {True: "HOLDS", False: "MISSED", None: "not measured"}[self.holds]


@dataclass(frozen=True, slots=True)
class Rule:
    """A bar before it is judged. `at_least`: the figure must not be below `bound`; else it must be below it."""

    what: str
    bound: float
    unit: str
    digits: int
    seen: Callable[[Results], Spread | None]
    at_least: bool = False

    def judged(self, results: Results) -> Bar:
        """Look at the results."""
        seen = self.seen(results)
        target = f"{'>=' if self.at_least else '<'} {self.bound:g} {self.unit}"
        if seen is None:
            return Bar(self.what, target, "", None)
        holds = seen.median >= self.bound if self.at_least else seen.median < self.bound
        return Bar(self.what, target, f"{seen.told(self.digits)} {self.unit}", holds)


def _of(case: str, figure: str) -> Callable[[Results], Spread | None]:
    return lambda results: spread(by_case(results).get(case, []), figure)


def above_publish(case: str) -> Callable[[Results], Spread | None]:
    """The median receipt of a case, less the median raw synced publish of the same round."""

    def seen(results: Results) -> Spread | None:
        raw = {row["round"]: row["publish_p50_ms"] for row in results["limits"]}
        taken = by_case(results).get(case, [])
        return Spread.of(row["accept_p50_ms"] - raw[row["round"]] for row in taken if row["round"] in raw)

    return seen


def _all_memory(when: str) -> Callable[[Results], Spread | None]:
    def seen(results: Results) -> Spread | None:
        sizes = results["memory"].get(when)
        return Spread.of([sum(sizes.values())]) if sizes else None

    return seen


def _slowest_recovery(results: Results) -> Spread | None:
    waits = [row["all_s"] for row in results["recovery"]]
    return Spread.of([max(waits)]) if waits else None


RULES: Final = (
    Rule("64 sessions over 4 streams", 4500, "turns/s", 0, _of("echo 64/4", "turns_per_s"), at_least=True),
    Rule("64 sessions over 64 streams", 2600, "turns/s", 0, _of("echo 64/64", "turns_per_s"), at_least=True),
    Rule("64/4, brain takes 0-20 ms", 2300, "turns/s", 0, _of("slow 64/4", "turns_per_s"), at_least=True),
    Rule("256 sessions over 4 streams", 10000, "turns/s", 0, _of("echo 256/4", "turns_per_s"), at_least=True),
    Rule("one session: turn p50", 4.5, "ms", 2, _of("echo 1/1", "p50_ms")),
    Rule("one session: accept p50 above the raw synced publish", 0.7, "ms", 2, above_publish("echo 1/1")),
    Rule("64/4: accept p50 above the raw synced publish", 0.7, "ms", 2, above_publish("echo 64/4")),
    Rule("64/4: accept p99", 10, "ms", 1, _of("echo 64/4", "accept_p99_ms")),
    Rule("live token, 500 streaming turns: added p50", 3, "ms", 2, _of("tokens 500", "token_p50_ms")),
    Rule("live token, 500 streaming turns: added p99", 10, "ms", 2, _of("tokens 500", "token_p99_ms")),
    Rule("64/4: CPU per 1000 turns, client included", 0.35, "CPU s", 3, _of("echo 64/4", "cpu_s_per_1000")),
    Rule("memory of everything after the load", 2000, "MB", 0, _all_memory("loaded")),
    Rule("memory of everything, idle", 400, "MB", 0, _all_memory("idle")),
    Rule("slowest recovery: every session answered again", 5, "s", 2, _slowest_recovery),
)


def judged(results: Results) -> list[Bar]:
    """Every bar: of this run, then of the other measurements that were given to it."""
    of_others = [_of_other(bar) for bars in results.get("others", {}).values() for bar in bars]
    return [rule.judged(results) for rule in RULES] + of_others


def read_others(paths: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """The bars of other measurements' files, by the file's name without its ending.

    Raises ValueError for a file that says nothing about bars.
    """
    return {path.stem: _bars_of(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths}


def _bars_of(path: Path, content: Any) -> list[dict[str, Any]]:
    if isinstance(content, dict) and "bars" in content:
        return [dict(bar) for bar in content["bars"]]
    if isinstance(content, dict) and "rows" in content:
        return peer_bars.bars(content)
    raise ValueError(f"{path} holds neither bars nor what peers did")


def table(bars: list[Bar]) -> Table:
    """For people."""
    rows = [(bar.what, bar.target, bar.measured, bar.verdict) for bar in bars]
    return Table("Bars: judged by the median", ("bar", "target", "measured", "verdict"), rows)


def _of_other(bar: dict[str, Any]) -> Bar:
    value = bar["value"]
    measured = f"{value:.2f}" if isinstance(value, float) else str(value)
    return Bar(bar["name"], bar.get("target", ""), measured, bool(bar["holds"]))
