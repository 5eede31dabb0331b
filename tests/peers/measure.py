"""The rounds: each system in turn is started with no data, loaded in all its shapes, looked at, and stopped.

Only one system runs at a time, so that the others, idle, take nothing from it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, Final

from tests.bench import load as our_load
from tests.bench import machine, processes, stack
from tests.peers import load, systems
from tests.peers.systems import OURS, Case, Peer

Say = Callable[[str], None]
FOREIGN_CORES: Final = 0.1
"""CPU of processes that are neither system nor client, in cores, above which a row is noted as disturbed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. Times in seconds."""

    rounds: int = 5
    seconds: float = 5.0
    warm_s: float = 1.5
    settle_s: float = 3.0
    """Of load on a system that has just started, before the first measured one."""

    def total_s(self, peers: list[Peer]) -> float:
        """About how long it takes."""
        cases = len(systems.OUR_CASES) + sum(len(peer.cases) for peer in peers)
        return self.rounds * (
            cases * (self.seconds + self.warm_s + 0.7) + 12 + 5 * len(peers) + (1 + len(peers)) * self.settle_s
        )


async def take(plan: Plan, peers: list[Peer], versions: dict[str, str], say: Say, keep: Callable[..., None]) -> Any:
    """All rounds; `keep` gets what there is after each system."""
    results: dict[str, Any] = {
        "machine": {**machine.described(), **versions},
        "plan": asdict(plan),
        "rows": [],
        "complete": False,
    }
    began = monotonic()
    for number in range(plan.rounds):
        rounds = _Round(plan, number, results, say)
        say(f"round {number + 1}/{plan.rounds}, {monotonic() - began:.0f} of about {plan.total_s(peers):.0f} s")
        await rounds.ours()
        keep(results)
        for peer in peers:
            await rounds.peer(peer)
            keep(results)
    results["complete"] = True
    keep(results)
    return results


class _Round:
    """One round."""

    def __init__(self, plan: Plan, number: int, results: dict[str, Any], say: Say) -> None:
        self._plan, self._number, self._results, self._say = plan, number, results, say

    async def ours(self) -> None:
        """SomaStack, loaded through its client kit as `make bench` does."""
        async with _stack() as running:
            for name, model in systems.BRAINS.items():
                await running.agent(name, model)
            idle = _memory(running.everything)
            await our_load.turns(running, "echo", 64, 4, self._plan.settle_s, warm_s=0)
            for case in systems.OUR_CASES:
                usage = _usage(running.everything)
                seen = await our_load.turns(
                    running, case.brain, case.sessions, case.connections, self._plan.seconds,
                    warm_s=self._plan.warm_s, window=usage,
                )  # fmt: skip
                self._add(OURS, case, seen, [], usage, running.everything, idle)

    async def peer(self, peer: Peer) -> None:
        """A system that speaks HTTP."""
        async with peer.start() as server:
            idle = _memory(server.pids)
            routes = load.Routes(server.ports, peer.turn.replace("{brain}", "echo"), peer.state)
            await load.turns(routes, 64, 64, self._plan.settle_s, http2=False, warm_s=0, window=nullcontext())
            for case in peer.cases:
                usage = _usage(server.pids)
                routes = load.Routes(server.ports, peer.turn.replace("{brain}", case.brain), peer.state)
                seen, wrong = await load.turns(
                    routes, case.sessions, case.connections, self._plan.seconds,
                    http2=case.http2, warm_s=self._plan.warm_s, window=usage,
                )  # fmt: skip
                self._add(peer.name, case, seen, wrong, usage, server.pids, idle)

    def _add(
        self,
        system: str,
        case: Case,
        seen: our_load.Result,
        wrong: list[str],
        usage: processes.Usage,
        pids: dict[str, int],
        idle_mb: float,
    ) -> None:
        thousands = max(seen.turns, 1) / 1000
        row: dict[str, Any] = {
            "round": self._number,
            "system": system,
            "case": case.name,
            "shapes": case.shapes,
            "sessions": case.sessions,
            "connections": case.connections,
            "brain": case.brain,
            "turns": seen.turns,
            "turns_per_s": seen.rate,
            "p50_ms": our_load.percentile(seen.latencies, 50),
            "p99_ms": our_load.percentile(seen.latencies, 99),
            "cpu_s_per_1000": sum(usage.by_process.values()) / thousands,
            "cpu_by_process": {name: used / thousands for name, used in usage.by_process.items()},
            "pss_mb": _memory(pids),
            "idle_pss_mb": idle_mb,
            "errors": seen.errors,
            "wrong": wrong[:5],
            "foreign_cores": usage.foreign_s / usage.seconds,
            "steal_cores": usage.steal_s / usage.seconds,
        }
        self._results["rows"].append(row)
        noted = [f"{seen.errors} ERRORS {wrong[:1]}"] if seen.errors else []
        if row["foreign_cores"] > FOREIGN_CORES:
            noted.append(f"others used {row['foreign_cores']:.2f} of a core")
        self._say(
            f"  {system}: {systems.SHAPES[case.shapes[0]]}, {case.name}: {seen.rate:.0f} turns/s,"
            f" p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms, {row['cpu_s_per_1000']:.2f} CPU s/1000"
            + "".join(f"; {note}" for note in noted)
        )


@asynccontextmanager
async def _stack() -> AsyncIterator[stack.Stack]:
    running = await stack.start()
    try:
        yield running
    finally:
        await stack.stop(running)


def _usage(pids: dict[str, int]) -> processes.Usage:
    return processes.Usage({**pids, "client": os.getpid()})


def _memory(pids: dict[str, int]) -> float:
    """Proportional set size of all processes of a system together, in MB; the client is not in it."""
    return sum(processes.pss_mb(pid, set(pids.values())) for pid in pids.values())
