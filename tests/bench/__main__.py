"""`make bench`: throughput, latency, CPU, memory and recovery of the stack, beside what the machine's parts can do.

    python -m tests.bench [--quick] [--rounds N] [--json FILE] [--also FILE ...] [--write-docs]
    python -m tests.bench report FILE [--also FILE ...] [--write-docs]      tables and pages again, without measuring
    python -m tests.bench fairness | frozen | waterfall | commit | ...     other questions; each has its own --help

The load client runs in this process, on the same cores as the stack, and its CPU is in the tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog
import uvloop
from rich.console import Console

from tests.bench import bars, docs, plots, report
from tests.bench.cases import CASES, QUICK, Plan, told
from tests.bench.measure import Measurement

NAMES: Final = {"frozen": "frozen_brain", "long": "long_run"}
"""Commands that are not called as their module."""
RESULTS: Final = Path(".reports/bench.json")

console = Console(width=None if sys.stdout.isatty() else 160)


def main(arguments: list[str]) -> int:
    """Runs what the arguments say; returns the exit code."""
    command = arguments[0] if arguments else ""
    if command == "report":
        return _report(arguments[1:])
    if (other := _other(command)) is not None:
        return 0 if other(arguments[1:], console.print) else 1
    return _measure(arguments)


def _other(command: str) -> Callable[[list[str], Callable[[str], None]], bool] | None:
    """The measurement of that name: a module of tests/bench whose `main(arguments, say)` says whether all holds."""
    name = f"tests.bench.{NAMES.get(command, command)}"
    if not command.isidentifier() or importlib.util.find_spec(name) is None:
        return None
    return getattr(importlib.import_module(name), "main", None)


def _measure(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything once, in about two minutes")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (5, with --quick 1)")
    parser.add_argument("--seconds", type=float, help="measured time of each case (6, with --quick 2.5)")
    parser.add_argument("--kills", type=int, help="kills of each part for the recovery times (3, with --quick 1)")
    parser.add_argument("--only", nargs="*", default=[], metavar="CASE", choices=[case.name for case in CASES],
                        help='only these cases, as "echo 64/4"; no kills')  # fmt: skip
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"where the results go ({RESULTS})")
    _add_reading(parser)
    chosen = parser.parse_args(arguments)
    others = bars.read_others(chosen.also)
    plan = QUICK if chosen.quick else Plan()
    given = {name: getattr(chosen, name) for name in ("rounds", "seconds", "kills")}
    plan = replace(plan, only=tuple(chosen.only), **{name: value for name, value in given.items() if value is not None})
    # A client that reconnects says so; here it is what is measured.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    _say(f"this takes about {told(plan.total_s)}; what else runs on this machine is measured too")

    def keep(results: dict[str, Any]) -> None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({**results, "others": others}, indent=1) + "\n", encoding="utf-8")

    results = uvloop.run(Measurement(plan, _say, keep).take())
    _show({**results, "others": others}, write_docs=chosen.write_docs)
    _say(f"all rounds are in {chosen.json}")
    return 0


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.bench report", description="Tables and pages again, from a file.")
    parser.add_argument("file", type=Path, help="what a run wrote with --json")
    _add_reading(parser)
    chosen = parser.parse_args(arguments)
    results = json.loads(chosen.file.read_text(encoding="utf-8"))
    others = {**results.get("others", {}), **bars.read_others(chosen.also)}
    _show({**results, "others": others}, write_docs=chosen.write_docs)
    return 0


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="FILE",
                        help="results of another measurement, for the table of bars; may be given again")  # fmt: skip
    parser.add_argument("--write-docs", action="store_true", help="write the plots and the page's generated part")


def _show(results: dict[str, Any], *, write_docs: bool) -> None:
    for table in [*report.tables(results), bars.table(bars.judged(results))]:
        console.print(table.rich())
    if write_docs:
        drawn = plots.draw(results, docs.PAGE.parent / "img")
        pictures = {str(path.relative_to(docs.PAGE.parent)): text for path, text in drawn.items()}
        page = docs.PAGE.read_text(encoding="utf-8")
        docs.PAGE.write_text(docs.rewritten(page, docs.generated(results, pictures)), encoding="utf-8")
        _say(f"written: {docs.PAGE} and {len(pictures)} pictures")


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
