"""Run the gates: static checks, the protocol's model, and the test levels, each timed, with one summary at the end.

    python -m tools.gates all               # what `make test` and CI run
    python -m tools.gates lint types        # some of them
    python -m tools.gates unit -- -k cursor # one level; what follows `--` goes to pytest

A failing gate does not hide the next one; FAIL_FAST=1 stops at the first. Failing tests are named once more at the end,
each with what it found wrong. The last line counts tests as pytest does.
In a whole run, checks that only compute run aside, beside tests that mostly wait; what measures times runs alone.
The whole run has a time limit (TEST_LIMIT_S, seconds): a stage that hangs is ended with everything it started.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / ".reports"
PYTHON = sys.executable
DEFAULT_LIMIT_S = 24 * 60
STOP_GRACE_S = 15
NO_TESTS_COLLECTED = 5  # pytest's exit code
TOLD_LINES = 40  # of each failing test, at the end

LEVELS = ("unit", "contract", "integration", "e2e", "chaos", "upgrade")
LONG_PARTS = ("toolgw", "cognition")  # wait most: beside the others both queues of stages take about the same time
TYPED = ("soma_common", "services", "somastack", "examples", "tests", "tools")


_live: set[int] = set()  # process groups that run: an interrupt ends them


class Outcome(Enum):
    """How a stage ended."""

    OK = "ok"
    FAILED = "FAILED"
    OVERRAN = "OVERRAN"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of a gate."""

    gate: str
    what: str
    command: tuple[str, ...]
    needs: Path | None = None  # skipped when this path does not exist
    level: str | None = None  # a pytest level: its report is counted, and having no tests is no failure
    environment: Mapping[str, str] = field(default_factory=dict)  # beside that of this process
    after_aside: bool = False  # waits for what runs aside: it needs the machine, or its results
    aside: Path | None = None  # runs beside the stages that follow; what it says is told when it has ended


@dataclass(frozen=True, slots=True)
class Result:
    """What one stage did and how long it took."""

    stage: Stage
    outcome: Outcome
    seconds: float
    tests: Counter[str]


def main(arguments: list[str] | None = None) -> int:
    """Run the named gates; return 0 when every one passed."""
    names = list(dict.fromkeys(stage.gate for stage in _stages(measured=False)))
    parser = argparse.ArgumentParser(prog="tools.gates", description="Run SomaStack's gates.")
    parser.add_argument("gates", nargs="+", choices=["all", *names], metavar="gate", help=", ".join(["all", *names]))
    known, rest = _split(sys.argv[1:] if arguments is None else arguments)
    chosen = set(parser.parse_args(known).gates)
    whole_run = "all" in chosen
    stages = [
        replace(stage, command=(*stage.command, *rest)) if stage.level else stage
        for stage in _stages(measured=whole_run)
        if whole_run or stage.gate in chosen
    ]
    REPORTS.mkdir(exist_ok=True)
    if whole_run:
        for stale in REPORTS.glob("coverage*"):
            stale.unlink()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Started in the background by a shell it would ignore interrupts, and so would all that tests send them to.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _run_all(stages)
    except KeyboardInterrupt:
        _say("\ninterrupted; what was running has been ended")
        return 128 + signal.SIGINT


def _stages(*, measured: bool) -> Iterator[Stage]:
    """Yield every stage in order; `measured` adds coverage to the levels that allow it, and its report."""
    proto, breaking = ROOT / "proto", (PYTHON, "-m", "tools.proto_breaking")
    yield Stage("lint", "ruff: lint", ("ruff", "check", "."))
    yield Stage("lint", "ruff: format", ("ruff", "format", "--check", "."))
    yield Stage("lint", "import contracts", ("lint-imports", "--no-logo"))
    yield Stage("lint", "buf: lint", ("buf", "lint"), needs=proto)
    yield Stage("lint", "buf: format", ("buf", "format", "--diff", "--exit-code", "proto"), needs=proto)
    yield Stage("lint", "buf: breaking changes", breaking, needs=proto)
    yield Stage("proto-check", "gen/ is what proto/ generates", (PYTHON, "-m", "tools.proto_drift"), needs=proto)
    typed = (folder for folder in TYPED if any((ROOT / folder).rglob("*.py")))
    yield Stage("types", "mypy --strict", ("mypy", *typed), aside=REPORTS / "types.log" if measured else None)
    turn_protocol = ROOT / "tests" / "model" / "turn_protocol.py"
    model = (PYTHON, "-m", "tests.model.turn_protocol", "--quick")
    aside = REPORTS / "model.log" if measured else None
    yield Stage("model", "turn protocol's model", model, needs=turn_protocol, aside=aside)
    yield from _tests(measured=measured)


def _tests(*, measured: bool) -> Iterator[Stage]:
    if not measured:
        for level in LEVELS:
            yield _level(level)
        return
    # Coverage is measured of the first three levels. The others try the running stack, often for how long something
    # takes: instrumented it would be another, slower product.
    yield _level("unit", aside=True, coverage=True)
    yield _level("contract", aside=True, coverage=True)
    others = [f"--ignore=tests/integration/{part}" for part in LONG_PARTS]
    parts = [f"tests/integration/{part}" for part in LONG_PARTS]
    yield _level("integration", "integration-long", parts, aside=True, coverage=True)
    yield _level("upgrade", aside=True)
    yield _level("integration", "integration", ["tests/integration", *others], coverage=True)
    yield _level("e2e")
    yield replace(_level("chaos"), after_aside=True)  # its faults are to be the only ones
    data = [str(_coverage(name)) for name in ("unit", "contract", "integration-long", "integration")]
    yield Stage("coverage", "coverage: all parts", ("coverage", "combine", *data), after_aside=True)
    yield Stage("coverage", "coverage so far", ("coverage", "report"), needs=REPORTS / "coverage")


def _level(
    level: str, name: str = "", paths: Sequence[str] = (), *, aside: bool = False, coverage: bool = False
) -> Stage:
    """A level of tests, or the part of it that `paths` hold, with a report of its own."""
    name = name or level
    measure = ("--cov", "--cov-report=") if coverage else ()
    command = (PYTHON, "-m", "pytest", *(paths or (f"tests/{level}",)), f"--junitxml={_report(name)}", *measure)
    return Stage(
        level,
        f"{name} tests",
        command,
        needs=ROOT / "tests" / level,
        level=name,
        aside=REPORTS / f"{name}.log" if aside else None,
        environment={"COVERAGE_FILE": str(_coverage(name))} if coverage else {},
    )


def _coverage(name: str) -> Path:
    return REPORTS / f"coverage-{name}"


def _run_all(stages: list[Stage]) -> int:
    started = time.monotonic()
    limit_s = float(os.environ.get("TEST_LIMIT_S", DEFAULT_LIMIT_S))
    results: list[Result] = []
    beside: list[Future[Result]] = []

    def remaining_s() -> float:
        return started + limit_s - time.monotonic()

    with ThreadPoolExecutor(1, "aside") as executor:
        try:
            for stage in stages:
                if stage.aside is not None:
                    beside.append(executor.submit(_run, stage, remaining_s()))
                    continue
                if stage.after_aside:
                    wait(beside)
                results.append(_run(stage, remaining_s()))
                if _bad(results[-1]) and os.environ.get("FAIL_FAST"):
                    break
        except KeyboardInterrupt:
            for pid in list(_live):
                os.killpg(pid, signal.SIGINT)
            raise
        results += [future.result() for future in beside]
    _summarize(results, time.monotonic() - started)
    return 1 if any(map(_bad, results)) else 0


def _run(stage: Stage, remaining_s: float) -> Result:
    if stage.needs is not None and not stage.needs.exists():
        _say(f"\n-- {stage.what}: skipped, {stage.needs.relative_to(ROOT)} does not exist")
        return Result(stage, Outcome.SKIPPED, 0.0, Counter())
    if remaining_s <= 0:
        _say(f"\n-- {stage.what}: not run, the time limit is used up")
        return Result(stage, Outcome.OVERRAN, 0.0, Counter())
    _say(f"\n== {stage.what}: {' '.join(_readable(stage.command))}")
    if stage.level:
        _report(stage.level).unlink(missing_ok=True)
    started = time.monotonic()
    code = _call(stage, remaining_s)
    if stage.aside is not None:
        _say(stage.aside.read_text(errors="replace"))
    seconds = time.monotonic() - started
    tests = _count(_report(stage.level)) if stage.level else Counter[str]()
    if code is None:
        outcome = Outcome.OVERRAN
    elif stage.level and code == NO_TESTS_COLLECTED:
        outcome = Outcome.SKIPPED
    else:
        outcome = Outcome.OK if code == 0 else Outcome.FAILED
    _say(f"-- {stage.what}: {outcome.value} in {seconds:.1f} s")
    return Result(stage, outcome, seconds, tests)


def _call(stage: Stage, limit_s: float) -> int | None:
    """Return the exit code of a stage's command, or None when it was ended for running too long.

    The command leads a process group of its own, so that whatever it started ends with it.
    """
    with (
        stage.aside.open("wb") if stage.aside is not None else nullcontext() as log,
        subprocess.Popen(
            stage.command, cwd=ROOT, start_new_session=True, stdout=log, stderr=log, env=os.environ | stage.environment
        ) as process,
    ):
        _live.add(process.pid)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _live.discard(process.pid)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(STOP_GRACE_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def _summarize(results: list[Result], seconds: float) -> None:
    _say("\n== summary")
    for result in results:
        again = f"   again: make {result.stage.gate}" if _bad(result) else ""
        _say(f"  {result.outcome.value:8} {result.seconds:7.1f} s  {result.stage.what}{again}")
    levels = [result.stage.level for result in results if result.stage.level]
    failures = [failure for level in levels for failure in _failures(_report(level))]
    if failures:
        _say("\n== failing tests")
    for test, told in failures:
        _say("\n".join([test, *told]))
    tests = sum((result.tests for result in results), Counter[str]())
    if levels:
        order = ("failed", "passed", "skipped", "errors")
        counts = ", ".join(f"{tests[word]} {word}" for word in order if tests[word]) or "no tests ran"
        _say(f"==================== {counts} in {seconds:.2f}s ====================")


def _count(report: Path) -> Counter[str]:
    """Read pytest's counts from its JUnit report; nothing when it wrote none."""
    if not report.exists():
        return Counter()
    suites = ET.parse(report).getroot().iter("testsuite")
    counts: Counter[str] = Counter()
    for suite in suites:
        bad = {"failed": int(suite.get("failures", 0)), "errors": int(suite.get("errors", 0))}
        skipped = int(suite.get("skipped", 0))
        counts.update(bad, skipped=skipped, passed=int(suite.get("tests", 0)) - sum(bad.values()) - skipped)
    return counts


def _failures(report: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each test that failed, by pytest's JUnit report, and what it found wrong."""
    if not report.exists():
        return
    for case in ET.parse(report).getroot().iter("testcase"):
        for problem in [*case.iterfind("failure"), *case.iterfind("error")]:
            said = (problem.text or problem.get("message") or "").splitlines()
            found = [line for line in said if line.startswith("E ")] or said
            yield f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}", _shortened(found)


def _shortened(lines: list[str]) -> list[str]:
    half = TOLD_LINES // 2
    return lines if len(lines) <= TOLD_LINES else [*lines[:half], "...", *lines[-half:]]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _bad(result: Result) -> bool:
    return result.outcome in (Outcome.FAILED, Outcome.OVERRAN)


def _report(level: str) -> Path:
    return REPORTS / f"{level}.xml"


def _readable(command: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.replace(PYTHON, "python").replace(f"{ROOT}/", "") for part in command)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
