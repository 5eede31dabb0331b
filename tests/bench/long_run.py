"""`make bench ARGS="long --minutes 30"`: whether a stack is the same after half an hour of load.

64 sessions over 4 streams, as fast as they are answered or at `--rate` turns per second. The memory of every process is
its proportional set size without shared memory, each 5 seconds; its growth is the slope of a line through what was seen
after the first part (12 minutes of 30), as a part of what it was then. PostgreSQL's shared buffers are shown and not
judged: a cache of a fixed size. NATS keeps ids of messages for its dedupe window (2 minutes) and an index of what is
not purged (10 minutes of the lanes): only in a run of 30 minutes are its windows full before the line begins.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from time import monotonic
from typing import Any, Final

import uvloop

from tests.bench import flat
from tests.bench import stack as stacks
from tests.bench.memory import MIB, SHARED, Samples
from tests.bench.rotation import Line, Rotation

AGENT: Final = "echo"
SESSIONS: Final = 64
STREAMS: Final = 4
WITHIN: Final = 0.10
MOST_GROWTH: Final = 0.01
"""Of a process in ten minutes."""
TEN_MINUTES_S: Final = 600.0
EDGE: Final = 1 / 6
"""The part of the run at its beginning and at its end that are compared: 5 minutes of 30."""
SETTLED: Final = 0.4
"""The part of the run after which growth is judged: 12 minutes of 30, when the longest window, 10 minutes, is full."""
_LOOK_S: Final = 5.0
_WARM_S: Final = 5.0


@dataclass(frozen=True)
class Plan:
    """How long, and how fast (0: as fast as it goes)."""

    minutes: float = 30.0
    rate: float = 0.0


async def measure(plan: Plan, say: flat.Say) -> bool:
    """One load without a break, looked at every few seconds."""
    stack = await stacks.start()
    samples, stretches = Samples(), []
    try:
        await stack.agent(AGENT, "echo/echo")
        lines = [Line(stacks.TENANT, stack.token, f"long-{number}") for number in range(STREAMS)]
        sessions = [(each % STREAMS, f"long-{each}") for each in range(SESSIONS)]
        async with Rotation(stack.gateway, AGENT, lines, sessions, SESSIONS, rate=plan.rate) as load:
            await load.measure(_WARM_S)
            began = monotonic()
            while (at := monotonic() - began) < plan.minutes * 60:
                stretches.append({"at_s": at, **await flat.sample(stack, load, _LOOK_S)})
                samples.take(stack.pids, monotonic() - began)
                if len(stretches) % 12 == 0:
                    say(f"{at / 60:.0f} min: {stretches[-1]['turns_per_s']:.0f}/s, {samples.total_mib:.0f} MiB")
    finally:
        await stacks.stop(stack)
    settled = plan.minutes * 60 * SETTLED
    for name, sizes in samples.taken.items():
        growth = samples.slope(name, settled) * TEN_MINUTES_S / MIB
        say(f"  {name}: {sizes[0][1] / MIB:.1f} -> {sizes[-1][1] / MIB:.1f} MiB, {growth:+.2f} per 10 minutes")
    told = {"minutes": plan.minutes, "rate": plan.rate, "stretches": stretches, "memory": samples.taken}
    return flat.conclude("long", told, bars(stretches, samples, settled), say)


def bars(stretches: Sequence[dict[str, Any]], samples: Samples, settled: float) -> list[flat.Bar]:
    """The same rate at the end as at the beginning, and nobody grows."""
    edge = max(1, round(len(stretches) * EDGE))
    first, last = (mean(float(each["turns_per_s"]) for each in part) for part in (stretches[:edge], stretches[-edge:]))
    told = [
        flat.Bar("errors", sum(int(each["errors"]) for each in stretches), most=0),
        flat.Bar("turns/s at the end by the beginning", last / first, 1 - WITHIN),
    ]
    told += [
        flat.Bar(f"growth in 10 minutes, {name}", samples.share(name, settled, TEN_MINUTES_S), most=MOST_GROWTH)
        for name in samples.taken
        if name != SHARED
    ]
    return told


def main(arguments: list[str], say: flat.Say) -> bool:
    """Runs the benchmark with a command's arguments; returns whether the bars hold."""
    parser = argparse.ArgumentParser(prog="tests.bench long", description=__doc__)
    parser.add_argument("--minutes", type=float, default=Plan.minutes)
    parser.add_argument("--rate", type=float, default=Plan.rate, help="turns per second; 0: as fast as it goes")
    chosen = parser.parse_args(arguments)
    return uvloop.run(measure(Plan(chosen.minutes, chosen.rate), say))
