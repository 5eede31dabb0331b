"""Check the turn protocol over all interleavings within small bounds.

    python -m tests.model.turn_protocol --quick     what `make test` runs, less than a minute
    python -m tests.model.turn_protocol             larger bounds, a quarter of an hour; for a change of the protocol
    python -m tests.model.turn_protocol --trace     print the steps that break a promise when a guard is missing

Every scenario must hold with all guards, in every state that can be reached; every guard that is needed must be found
to be, by taking it away. The exit code is 1 when either is not so.

Limits: the bounds are small; "none found, stopped" is not a proof. Time is modelled only where messages gather, and
progress not in the scenarios about turns, relay, failover, steer and cancel. The tool gateway is atomic but in the
scenarios about tool calls, which are about its own crash window. Where messages gather and where turns are stopped an
owner that was replaced commits nothing: that this is so is what the scenarios about turns are about.
"""

import argparse
import sys

from tests.model.scenarios import Removal, scenarios
from tests.model.search import Finding, search
from tests.model.turn_promises import ONE_WRITER

MOST_STATES = 2_000_000
# Where a search without some guards stops: when something must be found broken, and when nothing is known to break.
MOST_STATES_QUICK = (30_000, 10_000)
MOST_STATES_FULL = (150_000, 150_000)


def main(arguments: list[str] | None = None) -> int:
    """Run the scenarios and print a line for each; return 1 when one has not ended as it must."""
    options = _options(arguments)
    full = not options.quick
    bounds = (
        (options.removal_states,) * 2 if options.removal_states else MOST_STATES_FULL if full else MOST_STATES_QUICK
    )
    states, surprises = 0, []
    for scenario in scenarios(full=full):
        if options.scenario not in scenario.name:
            continue
        print(f"\n## {scenario.name}")
        for removal in (None, *scenario.removals):
            for skipped in ("\0", ONE_WRITER):
                further = skipped == ONE_WRITER
                expected = _expected(removal, further=further, full=full)
                bound = bounds[0 if expected else 1] if removal else MOST_STATES
                model = scenario.model_without(removal)
                finding = search(model, most_states=bound, ignoring=skipped, progress=scenario.progress)
                states += finding.states
                _print(removal, finding, further=further, trace=options.trace)
                if surprise := _surprise(finding, expected, exhaustive=removal is None):
                    surprises.append(f"{scenario.name}, {_name(removal)}: {surprise}")
                if not finding.violation.startswith(ONE_WRITER):
                    break  # what follows from a second writer is looked at in a second search
    print(f"\n{states} states in all")
    for surprise in surprises:
        print(f"NOT AS IT MUST BE: {surprise}")
    return 1 if surprises else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.model.turn_protocol", description="Check the turn protocol.")
    parser.add_argument("--quick", action="store_true", help="small bounds, less than a minute")
    parser.add_argument("--trace", action="store_true", help="print the steps to each broken promise")
    parser.add_argument("--scenario", default="", help="only scenarios whose name contains this")
    parser.add_argument("--removal-states", type=int, help="stop a search without some guards after so many states")
    return parser.parse_args(arguments)


def _expected(removal: Removal | None, *, further: bool, full: bool) -> str:
    """Return the promise that must be found broken, empty when none must."""
    if removal is None:
        return ""
    if further:
        return removal.then
    return removal.breaks if ("full" if full else "quick") in removal.found_in else ""


def _surprise(finding: Finding, expected: str, *, exhaustive: bool) -> str:
    """Return what is not as it must be, empty when all is well."""
    if exhaustive:
        return "" if finding.exhausted and not finding.violation else f"must hold, but: {finding}"
    if not finding.violation.startswith(expected):
        return f"must break: {expected!r}, but: {finding}"
    if finding.violation and not expected:
        return f"is not known to break anything, but: {finding}"
    return ""


def _print(removal: Removal | None, finding: Finding, *, further: bool, trace: bool) -> None:
    name = _name(removal) + ("  then:" if further else "")
    print(f"{name:42s}{finding!s:58s}{finding.states:8d} states {finding.seconds:6.1f} s", flush=True)
    if trace and finding.trace:
        print("        " + "\n        ".join(finding.trace))


def _name(removal: Removal | None) -> str:
    return f"without {removal.guards}" if removal else "all guards"


if __name__ == "__main__":
    sys.exit(main())
