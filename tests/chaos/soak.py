"""Random faults from a seed under a mixed load, for as long as wanted; every promise is checked after each round.

    python -m tests.chaos.soak --minutes 60 --seed 7

Two of each of gateway, router and brain; one of the rest. A round is a minute of faults: kills, freezes, deaths at
failpoints, adapters that go away; some begin while another one is not yet overcome. Then the storm ends, what is open
gets its answer, and the checker says what was broken, if anything: the exit code is then 1, and the logs are kept in
`.reports/soak-<seed>`. The same seed plans the same faults; what the load and the machine do meanwhile is never the
same.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from tests.chaos.load import Load, Mix
from tests.chaos.stack import TENANTS, FaultyStack, faulty_stack

REPORTS: Final = Path(__file__).parents[2] / ".reports"
ROUND_S: Final = 60.0
REPLICAS: Final = {"gateway": 2, "router": 2, "cognition": 2}
MIXES: Final = (
    Mix(echo=8, slow=4, clerk=4, cancel=0.1),
    Mix(echo=8, slow=2, clerk=2, pause_s=0.3, ahead=50, cancel=0.02),
    Mix(echo=16, slow=0, clerk=0, pause_s=0.2, ahead=4),
)
RECOVERS_WITHIN_S: Final = 60.0
DOUBLE_FAULT: Final = 0.3
"""Probability that the next fault does not wait for the recovery from this one."""
POINTS: Final = {
    "gateway": ("gateway.after_publish_before_ack", "gateway.after_delivery_before_ack"),
    "router": (
        "router.after_ingest_before_dispatch",
        "router.after_step_before_confirm",
        "router.after_commit_before_delivery",
    ),
    "cognition": (
        "cognition.after_confirm_before_tool",
        "cognition.after_tool_before_result",
        "cognition.before_proposal",
        "cognition.mid_tokens",
    ),
    "toolgw": ("toolgw.before_run", "toolgw.after_run_before_store", "toolgw.after_store_before_answer"),
}


@dataclass
class Storm:
    """The faults of a run and how long the recovery from each kind took."""

    stack: FaultyStack
    random: random.Random
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    async def rage(self, load: Load, seconds: float) -> None:
        """One fault after the other for so long; at the end everything is up, awake and connected."""
        end = time.monotonic() + seconds
        open_faults: list[asyncio.Task[None]] = []
        while time.monotonic() < end:
            name, fault = self._next(load)
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            task = asyncio.create_task(self._strike(load, name, fault))
            if self.random.random() < DOUBLE_FAULT:
                open_faults.append(task)
            else:
                await task
            await asyncio.sleep(self.random.uniform(0.2, 2.0))
        await asyncio.gather(*open_faults)
        for part in self.stack.parts:
            await self.stack.is_up(part)

    async def _strike(self, load: Load, name: str, fault: Callable[[], Awaitable[None]]) -> None:
        began = time.monotonic()
        await fault()
        await load.flows(each=1, timeout_s=RECOVERS_WITHIN_S)
        self.recoveries[name].append(load.silence(began))

    def _next(self, load: Load) -> tuple[str, Callable[[], Awaitable[None]]]:
        """The next fault, its name and what does it. Everything random is drawn here, so that a seed is a plan."""
        part = self.random.choice(list(self.stack.parts))
        service = part.rpartition("-")[0] or part
        kind = self.random.choice(["kill", "kill", "freeze", "failpoint", "deaf"])
        away_s = self.random.uniform(0.3, 6.0)
        point, at = self.random.choice(POINTS.get(service, ("",))), self.random.randint(1, 30)
        tenant = self.random.choice(TENANTS)
        if kind == "failpoint" and point:
            return f"kill at {point}", lambda: self._failpoint(part, point, at)
        if kind == "freeze":
            return f"freeze {service}", lambda: self._freeze(part, away_s)
        if kind == "deaf":
            return "no adapter", lambda: self._deaf(load, tenant, away_s)
        return f"kill -9 {service}", lambda: self._kill(part)

    async def _kill(self, part: str) -> None:
        await self.stack.is_up(part)
        await self.stack.kill9(part)

    async def _freeze(self, part: str, seconds: float) -> None:
        await self.stack.is_up(part)
        self.stack.freeze(part)
        await asyncio.sleep(seconds)
        self.stack.thaw(part)

    async def _failpoint(self, part: str, point: str, at: int) -> None:
        await self.stack.is_up(part)
        await self.stack.arm(part, f"{point}=kill@{at}")
        self.stack.expect_death(part)
        with suppress(TimeoutError):  # Not every point is reached in every load.
            async with asyncio.timeout(5):
                await self.stack.process(part).ended()

    async def _deaf(self, load: Load, tenant: str, seconds: float) -> None:
        await load.disconnect(tenant)
        await asyncio.sleep(seconds)
        await load.connect(tenant)

    def report(self) -> str:
        """A table of the faults."""
        lines = [f"{'fault':42} {'times':>5} {'median s':>9} {'max s':>7}"]
        for name, seconds in sorted(self.recoveries.items()):
            lines.append(f"{name:42} {len(seconds):5} {statistics.median(seconds):9.2f} {max(seconds):7.2f}")
        return "\n".join(lines)


async def soak(minutes: float, seed: int) -> bool:
    """Run; tells whether every promise was kept."""
    plan = random.Random(seed)
    totals: dict[str, int] = defaultdict(int)
    end = time.monotonic() + minutes * 60
    async with faulty_stack(REPLICAS) as stack:
        storm = Storm(stack, plan)
        kept = True
        try:
            while kept and (left_s := end - time.monotonic()) > 0:
                async with Load(stack, plan.choice(MIXES), seed=plan.randrange(2**32)) as load:
                    await load.flows()
                    await storm.rage(load, min(left_s, ROUND_S))
                    await load.flows(timeout_s=RECOVERS_WITHIN_S)
                    for what, count in (await load.finish()).items():
                        totals[what] += count
        except AssertionError as broken:
            kept = False
            print(f"\nBROKEN (seed {seed}): {broken}")
        print(f"\n{storm.report()}\n\nseed {seed}: " + ", ".join(f"{count} {what}" for what, count in totals.items()))
        for death in stack.deaths:
            print(f"nobody hurt it, and yet: {death}")
        if stack.failed_starts:
            print(f"starts that failed for want of something: {len(stack.failed_starts)}")
        kept = kept and not stack.deaths
        if not kept:
            logs = REPORTS / f"soak-{seed}"
            shutil.rmtree(logs, ignore_errors=True)
            shutil.copytree(stack.home.logs, logs)
            print(f"logs: {logs}")
    print("every promise was kept" if kept else "PROMISES WERE BROKEN")
    return kept


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    given = parser.parse_args()
    seed = random.randrange(10**6) if given.seed is None else given.seed
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    print(f"seed {seed}", flush=True)
    return 0 if asyncio.run(soak(given.minutes, seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
