"""`make bench ARGS=idle`: what a session costs in memory that had a turn and is idle since.

First as many turns as there will be sessions, all in 64 sessions: what grows then is the turns' doing (NATS remembers
ids of messages for its dedupe window and holds what is not purged, caches fill). Then a turn in each of 100 000
sessions. What a process grows by more than it did before, per session, is what idle sessions cost. A router keeps
`SOMA_MAX_IDLE_SESSIONS` of them in memory (1024), which the first sessions fill: it is told apart.

PostgreSQL's shared buffers are not in it: a cache of a fixed size.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass
from typing import Final

import uvloop

from tests.bench import flat, memory
from tests.bench import stack as stacks
from tests.bench.memory import MIB, SHARED, Samples
from tests.bench.rotation import Line, Rotation

AGENT: Final = "echo"
IN_FLIGHT: Final = 256
STREAMS: Final = 4
HOT: Final = 64
MOST_IDLE_MIB: Final = 400.0
MOST_LOADED_MIB: Final = 2048.0
MOST_BYTES: Final = 100.0
"""Per session and process: an entry of any kind costs more (a dict's slot with a key and a value is above 150)."""
PER: Final = 10_000
_LOOK_S: Final = 0.05


@dataclass(frozen=True)
class Plan:
    """How many sessions. Growth is judged from `settled` on."""

    sessions: int = 100_000

    @property
    def settled(self) -> int:
        """Sessions after which caches are full."""
        return self.sessions // 5


async def measure(plan: Plan, say: flat.Say) -> bool:
    """Both halves on one stack."""
    stack = await stacks.start()
    try:
        await stack.agent(AGENT, "echo/echo")
        await asyncio.sleep(2.0)
        start = Samples()
        start.take(stack.pids, 0)
        say(f"idle after the start: {start.total_mib:.0f} MiB")
        busy = await _turns(stack, plan, [(n % STREAMS, f"hot-{n}") for n in range(HOT)], say)
        fresh = await _turns(stack, plan, [(n % STREAMS, f"once-{n}") for n in range(plan.sessions)], say)
    finally:
        await stacks.stop(stack)
    growth = compared(busy, fresh, plan.settled)
    for name, (turns, sessions) in growth.items():
        say(f"  {name}: {turns * PER / MIB:+.2f} MiB per {PER} turns, {sessions * PER / MIB:+.2f} per {PER} sessions")
    bars = [
        flat.Bar("MiB idle after the start", start.total_mib, most=MOST_IDLE_MIB),
        flat.Bar("MiB at load, at most", max(busy.peak_mib, fresh.peak_mib), most=MOST_LOADED_MIB),
    ]
    bars += [
        flat.Bar(f"bytes per idle session, {name}", sessions - max(turns, 0.0), most=MOST_BYTES)
        for name, (turns, sessions) in growth.items()
    ]
    told = {
        "idle_mib": {name: sizes[-1][1] / MIB for name, sizes in start.taken.items()},
        "hot": busy.taken,
        "once": fresh.taken,
    }
    return flat.conclude("idle", told, bars, say)


def compared(busy: Samples, fresh: Samples, settled: float) -> dict[str, tuple[float, float]]:
    """By process: bytes per turn in few sessions, and per turn in a session of its own."""
    return {
        name: (busy.slope(name, settled), fresh.slope(name, settled))
        for name in fresh.taken
        if name not in (SHARED, "client")
    }


async def _turns(stack: stacks.Stack, plan: Plan, sessions: list[tuple[int, str]], say: flat.Say) -> Samples:
    """`plan.sessions` turns, with a look at the memory every so many."""
    samples = memory.Samples()
    again = len(sessions) < plan.sessions
    lines = [Line(stacks.TENANT, stack.token, f"idle-{number}") for number in range(STREAMS)]
    in_flight = min(IN_FLIGHT, len(sessions))
    due = 0
    async with Rotation(stack.gateway, AGENT, lines, sessions, in_flight, again=again) as load:
        while load.ended < plan.sessions:
            await asyncio.sleep(_LOOK_S)
            if load.ended >= due:
                samples.take(stack.pids, load.ended)
                due += plan.sessions // 40
        say(f"{load.ended} turns in {len(sessions)} sessions: {samples.total_mib:.0f} MiB, {load.seen.errors} errors")
    return samples


def main(arguments: list[str], say: flat.Say) -> bool:
    """Runs the benchmark with a command's arguments; returns whether the bars hold."""
    parser = argparse.ArgumentParser(prog="tests.bench idle", description=__doc__)
    parser.add_argument("--sessions", type=int, default=Plan.sessions)
    chosen = parser.parse_args(arguments)
    return uvloop.run(measure(Plan(chosen.sessions), say))
