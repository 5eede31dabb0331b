"""The soak is itself tested: without a guard of the turn protocol it must find what breaks.

    python -m tests.chaos.soak_guards                   # make soak-guards: every guard, one after the other; long
    python -m tests.chaos.soak_guards --only tombstone  # one of them
    python -m tests.chaos.soak_guards --control         # the same faults with every guard in place: nothing breaks

Each guard is taken away as `unguarded.py` says, under the fault that it is there for, again and again until the checker
reports a violation or the time is over. The checker knows nothing of guards: it sees what clients and witnesses see.
What the model says is redundant beside another guard is taken away together with that one. The table at the end says
which fault found which guard, and after how long.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import structlog

from soma_common.client.channel_client import ChannelClient
from soma_common.client.inbox import Inbox
from tests.chaos.guard_faults import EXPERIMENTS, Experiment
from tests.chaos.stack import MODULE, faulty_stack
from tests.chaos.unguarded import (
    IN_CLIENTS,
    VARIABLE,
    make_commits_slow,
    unguard_database,
)
from tests.chaos.unguarded import MODULE as UNGUARDED_MODULE

REDUNDANT: Final = {
    "cursor_cas": "redundant beside a locked fence; taken away together with the fence",
    "step_cas": "redundant beside dispatch_id; taken away together with it",
    "dispatch_id": "redundant beside step_cas; taken away together with it",
    "unique_term": "redundant beside term_ends",
    "resume": "saves redeliveries, and is not needed for the promises",
}
"""Guards whose removal alone breaks nothing, as the model finds too."""
NOT_TRIED: Final = {
    "held": "tests/unit/router/test_start_ahead_none.py: what was said of a turn that never started is dropped",
    "whole": "tests/integration/router/test_commit_group_whole.py: a group with an end and no start is not written",
    "start_journaled": "a turn's start is a row of its message's transaction: there is no code without it",
    "suspects_alone": "tests/unit/router/test_run_turns.py: a poison turn and its neighbours",
}


@dataclass(frozen=True)
class Found:
    """What came of taking a guard away."""

    guards: str
    fault: str
    after_s: float
    tries: int
    violation: str
    """Empty: none was found in the time."""

    def row(self) -> str:
        """A line of the table."""
        said = f"{self.after_s:6.1f} s, try {self.tries}" if self.violation else f"NOT within {self.after_s:.0f} s"
        return f"{self.guards:22} {self.fault:58} {said:20} {self.violation[:110]}"


async def try_out(experiment: Experiment, seed: int = 1, *, control: bool = False, within_s: float = 0.0) -> Found:
    """Take the experiment's guards away (with `control`: none) and strike until something breaks. The time begins when
    the stack is up.
    """
    names = [] if control else experiment.guards.split()
    environment = {service: dict(variables) for service, variables in experiment.environment.items()}
    for service in ("router", "cognition", "toolgw", "gateway", "controlplane"):
        environment.setdefault(service, {})[VARIABLE] = ",".join(names)
    limit_s = within_s or experiment.within_s
    async with faulty_stack(
        experiment.replicas,
        environment,
        rule=experiment.rule,
        tool_rule=experiment.tool_rule,
        module=UNGUARDED_MODULE if names else MODULE,
        links=True,
        step_timeout_ms=experiment.step_timeout_ms,
    ) as stack:
        database = await stack.database()
        try:
            await unguard_database(names, database)
            if experiment.slow_commits:
                await make_commits_slow(database)
        finally:
            await database.close()
        began = time.monotonic()
        tries = 0
        problems: list[str] = []
        with _clients_without(names):
            while not problems and time.monotonic() - began < limit_s:
                tries += 1
                problems = await experiment.strike(stack, seed * 1000 + tries)
        first = problems[0].replace("\n", " ") if problems else ""
        return Found(experiment.guards, experiment.fault, time.monotonic() - began, tries, first)


@contextmanager
def _clients_without(names: Sequence[str]) -> Iterator[None]:
    """Takes guards away from the clients of this process, for a while."""
    places = [(Inbox, "arrive"), (Inbox, "processed"), (ChannelClient, "_show")]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    for name in names:
        if name in IN_CLIENTS:
            IN_CLIENTS[name]()
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak_guards", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="guards, separated by commas; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--within", type=float, default=0.0, help="seconds for each; default: its own")
    parser.add_argument("--control", action="store_true", help="take nothing away: nothing may break")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    wanted = [e for e in EXPERIMENTS if not given.only or set(e.guards.split()) & set(given.only.split(","))]
    rows = []
    for experiment in wanted:
        rows.append(asyncio.run(try_out(experiment, given.seed, control=given.control, within_s=given.within)))
        print(rows[-1].row(), flush=True)
    print(f"\n{'without':22} {'fault':58} {'found after':20} what the checker said")
    print(*(found.row() for found in rows), sep="\n")
    if not given.only:
        for name, why in {**REDUNDANT, **NOT_TRIED}.items():
            print(f"{name:22} {why}")
    wrong = [found for found in rows if bool(found.violation) == given.control]
    if wrong:
        print(f"{'BROKEN' if given.control else 'NOT FOUND'}: {', '.join(found.guards for found in wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
