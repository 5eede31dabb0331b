"""`make bench-peers`: the same turn on SomaStack and on what people would pick instead, in the same run.

    python -m tests.peers [--quick] [--rounds 5] [--seconds 5] [--only NAME ...] [--json FILE] [--write-docs]
    python -m tests.peers report FILE [--write-docs]

The peers live in an environment of their own, .peers, made on the first run. The load client runs in this process, on
the same cores as the systems, and its CPU is in the tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final

import structlog
import uvloop
from rich.console import Console

from tests.bench import docs
from tests.peers import install, measure, plots, report, systems
from tests.peers.measure import Plan

RESULTS: Final = Path(".reports/peers.json")
PAGE: Final = Path("docs/benchmarks-peers.md")
QUICK: Final = Plan(rounds=1, seconds=2.0, warm_s=0.8, settle_s=1.0)
VERSIONS: Final = ("restate-sdk", "dbos", "fastapi", "uvicorn", "httptools", "sqlalchemy", "psycopg")

console = Console(width=None if sys.stdout.isatty() else 200)


def main(arguments: list[str]) -> int:
    """Runs what the arguments say; returns the exit code."""
    if arguments[:1] == ["report"]:
        parser = argparse.ArgumentParser(prog="tests.peers report")
        parser.add_argument("file", type=Path, help="what a run wrote with --json")
        parser.add_argument("--write-docs", action="store_true", help="write the plots and the page's generated part")
        chosen = parser.parse_args(arguments[1:])
        return _show(json.loads(chosen.file.read_text(encoding="utf-8")), write_docs=chosen.write_docs)
    return _measure(arguments)


def _measure(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, help="rounds (5, with --quick 1)")
    parser.add_argument("--seconds", type=float, help="measured time of each load (5, with --quick 2)")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME", help='only these peers, as "Restate" or "DBOS"'
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"where the results go ({RESULTS})")
    parser.add_argument("--write-docs", action="store_true", help="write the plots and the page's generated part")
    chosen = parser.parse_args(arguments)
    given = {name: getattr(chosen, name) for name in ("rounds", "seconds")}
    plan = replace(QUICK if chosen.quick else Plan(), **{name: value for name, value in given.items() if value})
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        install.python_packages(_say)
    except install.NotInstalled as error:
        _say(f"the peers' packages: {error}")
        return 1
    server, versions = _restate(chosen.only)
    peers = [peer for peer in systems.peers(server) if not chosen.only or _named(peer.name, chosen.only)]
    _say(f"this takes about {plan.total_s(peers) / 60:.0f} minutes; what else runs on this machine is measured too")

    def keep(results: dict[str, Any]) -> None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    results = uvloop.run(measure.take(plan, peers, {**_versions(), **versions}, _say, keep))
    # As read from the file: what a later report sees is what this one shows.
    return _show(json.loads(json.dumps(results)), write_docs=chosen.write_docs)


def _restate(only: list[str]) -> tuple[Path | None, dict[str, str]]:
    """Restate's server and its version; it is left out, and that is said, where it cannot be installed."""
    if only and not _named("Restate", only) and not any("restate" in name.lower() for name in only):
        return None, {}
    try:
        server = install.restate_server(_say)
    except install.NotInstalled as error:
        _say(f"Restate is left out: {error}")
        return None, {"Restate": "left out of this run: its server could not be installed"}
    lock = json.loads(install.NODE_FILES[1].read_text(encoding="utf-8"))
    return server, {"restate-server": lock["packages"]["node_modules/@restatedev/restate-server"]["version"]}


def _versions() -> dict[str, str]:
    """Of the peers' packages."""
    found = {each.metadata["Name"].lower(): each.version for each in distributions(path=[str(_site_packages())])}
    return {name: found[name] for name in VERSIONS if name in found}


def _site_packages() -> Path:
    return next((install.HOME / "lib").glob("python*/site-packages"))


def _named(name: str, only: list[str]) -> bool:
    return any(wanted.lower() in name.lower() for wanted in only)


def _show(results: dict[str, Any], *, write_docs: bool) -> int:
    for table in report.tables(results):
        console.print(table.rich())
    for line in report.told(results):
        _say(line)
    if write_docs:
        drawn = plots.draw(results, PAGE.parent / "img")
        pictures = {str(path.relative_to(PAGE.parent)): text for path, text in drawn.items()}
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(docs.rewritten(page, report.markdown(results, pictures)), encoding="utf-8")
        _say(f"written: {PAGE} and {len(pictures)} pictures")
    errors = sum(row["errors"] for row in results["rows"])
    if errors:
        _say(f"{errors} answers were missing or wrong: these figures are worth nothing")
    return 1 if errors else 0


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
