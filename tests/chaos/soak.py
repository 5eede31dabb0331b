"""Random faults from a seed under a mixed load, for as long as wanted; every promise is checked after each round.

    python -m tests.chaos.soak --minutes 60             # make soak ARGS="--minutes 60"
    python -m tests.chaos.soak --minutes 60 --replay 7  # the faults of seed 7 again, at the same times
    python -m tests.chaos.soak --minutes 3 --replay 7 --plan    # only say what they are

Two of each of gateway, router and brain; one of the rest; six tenants. A round takes about a minute: faults strike
while conversations go on (processes are killed, frozen, die at failpoints; links between any two of them are cut,
delayed, blackholed; adapters and watchers come and go), then all of it heals, what is open gets its answer, and the
checker says what was broken, if anything: the exit code is then 1, and the logs are kept in `.reports/soak-<seed>`. The
same seed and minutes plan the same faults; what the load and the machine do meanwhile is never the same.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import structlog
from soma.common.v1.turn_pb2 import ArrivalPolicy as Policy

from somastack.layout import SERVERS, Layout
from tests.chaos.load import Load
from tests.chaos.soak_plan import Round, plan_round
from tests.chaos.soak_storm import Storm
from tests.chaos.stack import FaultyStack, faulty_stack, link_names

REPORTS: Final = Path(__file__).parents[2] / ".reports"
ROUND_S: Final = 45.0
"""Of faults; with the drain and the check a round takes about a minute."""
REPLICAS: Final = {"gateway": 2, "router": 2, "cognition": 2}
TENANTS: Final = ("demo", "acme", "north", "south", "east", "west")
DRAINS_WITHIN_S: Final = 60.0
DEFAULT_MINUTES: Final = 10
POLICIES: Final = {
    "enqueue": Policy.ARRIVAL_POLICY_ENQUEUE,
    "accumulate": Policy.ARRIVAL_POLICY_ACCUMULATE,
    "steer": Policy.ARRIVAL_POLICY_STEER,
    "interrupt": Policy.ARRIVAL_POLICY_INTERRUPT,
    "rollback": Policy.ARRIVAL_POLICY_ROLLBACK,
    "reject": Policy.ARRIVAL_POLICY_REJECT,
}
DEFAULT_POLICIES: Final = tuple(POLICIES)
_SHOWN: Final = 20


@dataclass
class Tally:
    """What came of a soak, over all its rounds."""

    seed: int
    rounds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    longest: dict[str, float] = field(default_factory=dict)
    """The longest outages in seconds, by what was out."""
    violations: list[str] = field(default_factory=list)

    def add(self, load: Load, storm: Storm, problems: list[str], since: float) -> None:
        """One round has ended, whose load began at `since` (monotonic)."""
        self.rounds += 1
        self.counts.update(load.story.counts())
        self.counts.update(
            turns=sum(load.story.outcomes().values()),
            resent=load.resent,
            interrupts_and_pauses_by_hand=load.controls.done,
            watchers=len(load.watchers.watched),
            watch_streams_lost=load.watchers.came_back,
            live_events=sum(watched.events for watched in load.watchers.watched),
            live_gaps=sum(watched.gaps for watched in load.watchers.watched),
            delivered_to_another_adapter_again=load.repeated,
        )
        self.outcomes.update(load.story.outcomes())
        self.faults.update(storm.struck)
        for what, seconds in (
            ("answers of one partition", load.silence(since)),
            ("receipts of everybody", _longest_gap(since, load.receipts)),
            ("the last answer, after the storm", load.drain_s),
        ):
            self.longest[what] = max(seconds, self.longest.get(what, 0.0))
        self.violations += problems

    def table(self) -> str:
        """For people."""
        rows = [f"{'messages and turns':44} {'':>8}"]
        rows += [f"  {name.replace('_', ' '):42} {count:8}" for name, count in self.counts.items()]
        rows += ["outcomes of turns", *(f"  {name:42} {count:8}" for name, count in sorted(self.outcomes.items()))]
        rows += [f"{'faults':44} {sum(self.faults.values()):8}"]
        by_kind: Counter[str] = Counter()
        for (kind, _), count in self.faults.items():
            by_kind[kind] += count
        for kind, count in sorted(by_kind.items()):
            where = ", ".join(f"{w} {n}" for (k, w), n in sorted(self.faults.items()) if k == kind)
            rows.append(f"  {kind:42} {count:8}  {where}")
        rows += ["longest outage", *(f"  {what:42} {seconds:6.1f} s" for what, seconds in self.longest.items())]
        rows.append(f"{'violations':44} {len(self.violations):8}")
        return "\n".join(rows)


def rounds_of(seed: int, count: int, seconds: float, policies: Sequence[str]) -> list[Round]:
    """The plan of a soak."""
    layout = Layout(replicas=REPLICAS)
    parts = [*SERVERS, *(instance.name for instance in layout.instances())]
    wanted = [POLICIES[name] for name in policies]
    return [
        plan_round(
            seed, number, seconds, parts=parts, links=link_names(layout), tenants=TENANTS, policies=wanted
        )
        for number in range(count)
    ]  # fmt: skip


async def soak(rounds: Sequence[Round], seed: int) -> Tally:
    """Run the plan, to its end or to the first round in which a promise was broken."""
    tally = Tally(seed)
    async with faulty_stack(REPLICAS, tenants=TENANTS, links=True) as stack:
        for planned in rounds:
            print(f"\nround {planned.number + 1} of {len(rounds)}, seed {seed}, {time.strftime('%H:%M:%S')}")
            for fault in planned.faults:
                print(f"  {fault}")
            sys.stdout.flush()
            tally.violations += await _round(stack, planned, tally)
            if tally.violations:
                break
        tally.violations += (f"nobody hurt it, and yet: {death}" for death in stack.deaths)
        if tally.violations:
            logs = REPORTS / f"soak-{seed}"
            shutil.rmtree(logs, ignore_errors=True)
            shutil.copytree(stack.home.logs, logs)
            (logs / "violations.txt").write_text("\n".join(tally.violations) + "\n")
            print(f"logs: {logs}")
    return tally


async def _round(stack: FaultyStack, planned: Round, tally: Tally) -> list[str]:
    """One round; returns what keeps it from counting, which is a violation too."""
    async with Load(stack, planned.mix, seed=planned.load_seed, tenants=TENANTS) as load:
        storm = Storm(stack, load)
        began = time.monotonic()
        try:
            await load.flows(each=1, timeout_s=DRAINS_WITHIN_S)
            await storm.rage(planned)
            await load.flows(each=1, timeout_s=DRAINS_WITHIN_S)
        except (AssertionError, TimeoutError) as stuck:
            return [f"round {planned.number + 1}: {stuck!r}", *load.story.violations()[:_SHOWN]]
        problems = await load.settle(DRAINS_WITHIN_S)
        tally.add(load, storm, problems, began)
    counts = load.story.counts()
    print(f"  {counts['accepted']} accepted, {counts['answered']} turns, {len(problems)} violations", flush=True)
    # Nothing of this round runs any more: what its witnesses saw is checked, and need not be kept for hours.
    stack.model.calls.clear()
    stack.tools.calls.clear()
    stack.tools.effects.clear()
    return []


def say(tally: Tally) -> None:
    """Print what came of a soak."""
    print(f"\nsoak of {tally.rounds} rounds, seed {tally.seed}\n{tally.table()}")
    for violation in tally.violations[:_SHOWN]:
        print(f"VIOLATION {violation}")
    if len(tally.violations) > _SHOWN:
        print(f"... and {len(tally.violations) - _SHOWN} more")
    print("every promise was kept" if not tally.violations else f"PROMISES WERE BROKEN: --replay {tally.seed}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=int, default=DEFAULT_MINUTES, help="about; a round takes one")
    parser.add_argument("--seed", "--replay", type=int, default=None, help="default: a new one, which is printed")
    parser.add_argument("--policies", default=",".join(DEFAULT_POLICIES), help="arrival policies in use")
    parser.add_argument("--seconds", type=float, default=ROUND_S, help="of faults, in each round")
    parser.add_argument("--round", type=int, default=0, help="only this one of them, from 1")
    parser.add_argument("--plan", action="store_true", help="only print the faults and their times")
    given = parser.parse_args()
    seed = random.randrange(10**6) if given.seed is None else given.seed
    rounds = rounds_of(seed, max(1, given.minutes), given.seconds, given.policies.split(","))
    if given.round:
        rounds = rounds[given.round - 1 : given.round]
    if given.plan:
        for planned in rounds:
            print(f"round {planned.number + 1}: {planned.mix}", *planned.faults, sep="\n  ")
        return 0
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    print(f"seed {seed}", flush=True)
    tally = asyncio.run(soak(rounds, seed))
    say(tally)
    return 1 if tally.violations else 0


def _longest_gap(since: float, moments: list[float]) -> float:
    points = [since, *(at for at in moments if at > since)]
    return max((b - a for a, b in pairwise(points)), default=0.0)


if __name__ == "__main__":
    sys.exit(main())
