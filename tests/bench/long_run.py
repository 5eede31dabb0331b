"""`make bench ARGS="long --minutes 30"`: whether a stack is the same after half an hour of load.

64 sessions at a time over 4 streams, as fast as they are answered or at `--rate` turns per second; one that has had
200 turns (`--life`) makes room for a new one, as conversations do. Afterwards a young stack is started beside the old
one, and both are loaded in turns: what the machine does in a minute meets both, and half an hour later it is another
machine. The rates of the first and the last minutes are told as well, and not judged.

The memory of every process is looked at each 5 seconds. Its growth is that of what it allocated itself (what it maps
from files counts in parts, and falls and rises as others map them): the slope of a line through what was seen after the
first part (12 minutes of 30), as a part of what it was then. PostgreSQL's shared buffers are shown and not judged: a
cache of a fixed size. NATS keeps ids of messages for its dedupe window (2
minutes) and an index of what is not purged (10 minutes of the lanes): only in a run of 30 minutes are its windows full
before the line begins.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import mean
from time import monotonic
from typing import Any, Final

import uvloop

from tests.bench import flat, processes
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
"""The part of the run at its beginning and at its end whose rates are told: 5 minutes of 30."""
ROUNDS: Final = 20
"""Of the old and the young stack."""
YOUTH_S: Final = 60.0
"""How long the young stack is loaded before it is compared: plans are made, caches are warm."""
SETTLED: Final = 0.4
"""The part of the run after which growth is judged: 12 minutes of 30, when the longest window, 10 minutes, is full."""
_LOOK_S: Final = 5.0
_WARM_S: Final = 5.0


@dataclass(frozen=True)
class Plan:
    """How long, how fast (0: as fast as it goes), and of what sessions."""

    minutes: float = 30.0
    rate: float = 0.0
    life: int = 200
    """Turns of a session; 0: no end."""


async def measure(plan: Plan, say: flat.Say) -> bool:
    """One load without a break, looked at every few seconds."""
    samples, stretches = Samples(), []
    allocated = Samples(processes.anonymous)
    async with _running() as stack:
        async with _load(stack, plan) as load:
            await load.measure(_WARM_S)
            began = monotonic()
            while (at := monotonic() - began) < plan.minutes * 60:
                stretches.append({"at_s": at, **await flat.sample(stack, load, _LOOK_S)})
                samples.take(stack.pids, monotonic() - began)
                allocated.take(stack.pids, monotonic() - began)
                if len(stretches) % 12 == 0:
                    say(f"{at / 60:.0f} min: {stretches[-1]['turns_per_s']:.0f}/s, {samples.total_mib:.0f} MiB")
        pairs = await _beside_a_young_one(stack, plan, say)
    say(flat.table(f"after {plan.minutes:.0f} minutes, and new", pairs))
    first, last = edges(stretches)
    say(f"  turns/s in the first part of the run {first:.0f}, in the last {last:.0f}")
    settled = plan.minutes * 60 * SETTLED
    for name, sizes in allocated.taken.items():
        growth = allocated.slope(name, settled) * TEN_MINUTES_S / MIB
        say(f"  {name}: {sizes[0][1] / MIB:.1f} -> {sizes[-1][1] / MIB:.1f} MiB, {growth:+.2f} per 10 minutes")
    told = {
        "minutes": plan.minutes,
        "rate": plan.rate,
        "life": plan.life,
        "stretches": stretches,
        "memory": samples.taken,
        "allocated": allocated.taken,
        "pairs": pairs,
    }
    return flat.conclude("long", told, bars(stretches, pairs, allocated, settled), say)


@asynccontextmanager
async def _running() -> AsyncIterator[stacks.Stack]:
    stack = await stacks.start()
    try:
        await stack.agent(AGENT, "echo/echo")
        yield stack
    finally:
        await stacks.stop(stack)


def _load(stack: stacks.Stack, plan: Plan) -> Rotation:
    lines = [Line(stacks.TENANT, stack.token, f"long-{number}") for number in range(STREAMS)]
    sessions = [(each % STREAMS, f"long-{each}") for each in range(SESSIONS)]
    return Rotation(stack.gateway, AGENT, lines, sessions, SESSIONS, life=plan.life, rate=plan.rate)


async def _beside_a_young_one(old: stacks.Stack, plan: Plan, say: flat.Say) -> dict[str, list[dict[str, Any]]]:
    """Rounds of the old and of a young stack in turns, each in front in every second round."""
    pairs: dict[str, list[dict[str, Any]]] = {"old": [], "young": []}
    async with _running() as young:
        say("a young stack beside the old one ...")
        async with _load(young, plan) as load:
            await load.measure(YOUTH_S)
        sides = [("old", old), ("young", young)]
        for number in range(ROUNDS):
            for name, stack in sides if number % 2 else sides[::-1]:
                async with _load(stack, plan) as load:
                    await load.measure(1.0)
                    pairs[name].append(await flat.sample(stack, load, _LOOK_S))
    return pairs


def edges(stretches: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Turns per second in the first and in the last part of the run."""
    edge = max(1, round(len(stretches) * EDGE))
    first, last = (mean(float(each["turns_per_s"]) for each in part) for part in (stretches[:edge], stretches[-edge:]))
    return first, last


def bars(
    stretches: Sequence[dict[str, Any]],
    pairs: Mapping[str, Sequence[dict[str, Any]]],
    samples: Samples,
    settled: float,
) -> list[flat.Bar]:
    """The old stack is as fast as a young one, and nobody has grown."""
    told = [
        flat.Bar("errors", sum(int(each["errors"]) for each in (*stretches, *pairs["old"])), most=0),
        flat.Bar("turns/s by a young stack's", flat.ratio(pairs["old"], pairs["young"], "turns_per_s"), 1 - WITHIN),
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
    parser.add_argument("--life", type=int, default=Plan.life, help="turns of a session; 0: no end")
    chosen = parser.parse_args(arguments)
    return uvloop.run(measure(Plan(chosen.minutes, chosen.rate, chosen.life), say))
