"""`make bench ARGS=routers`: what a second router costs on a machine that has no cores for it.

Two stacks run side by side, the one with one router and the other with two; rounds of 64 sessions over 4 streams take
turns between them. A second router is for availability and for more cores: here it may cost at most a quarter.
"""

from __future__ import annotations

import argparse
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import uvloop

from tests.bench import flat
from tests.bench import stack as stacks
from tests.bench.rotation import Line, Rotation

AGENT: Final = "echo"
LEAST: Final = 0.75
SESSIONS: Final = 64
STREAMS: Final = 4
_WARM_S: Final = 1.0
_SPREAD_S: Final = 8.0
"""A router that joins gets its share of the partitions slowly."""


@dataclass(frozen=True)
class Plan:
    """How long is measured."""

    rounds: int = 5
    seconds: float = 5.0


async def measure(plan: Plan, say: flat.Say) -> bool:
    """Measures both in turns."""
    cases: dict[str, list[dict[str, Any]]] = {}
    async with AsyncExitStack() as running:
        sides = {}
        for count in (1, 2):
            stack = await stacks.start({"router": count})
            running.push_async_callback(stacks.stop, stack)
            await stack.agent(AGENT, "echo/echo")
            lines = [Line(stacks.TENANT, stack.token, f"routers-{number}") for number in range(STREAMS)]
            sides[f"{count} router{'s' * (count > 1)}"] = stack, lines
            async with _load(stack, lines, "warm") as load:
                await load.measure(_SPREAD_S)
        for number in range(plan.rounds):
            for name in sorted(sides, reverse=number % 2 == 1):
                stack, lines = sides[name]
                async with _load(stack, lines, str(number)) as load:
                    await load.measure(_WARM_S)
                    seen = await flat.sample(stack, load, plan.seconds)
                cases.setdefault(name, []).append(seen)
                say(f"round {number + 1}: {name}: {seen['turns_per_s']:.0f}/s, p50 {seen['p50_ms']:.1f} ms")
    say(flat.table(f"{SESSIONS} sessions over {STREAMS} streams", cases))
    one, two = cases["1 router"], cases["2 routers"]
    bars = [flat.Bar("turns/s of two routers by one", flat.ratio(two, one, "turns_per_s"), LEAST)]
    return flat.conclude("routers", {"cases": cases}, bars, say)


def _load(stack: stacks.Stack, lines: list[Line], label: str) -> Rotation:
    sessions = [(each % STREAMS, f"{label}-{each}") for each in range(SESSIONS)]
    return Rotation(stack.gateway, AGENT, lines, sessions, SESSIONS)


def main(arguments: list[str], say: flat.Say) -> bool:
    """Runs the benchmark with a command's arguments; returns whether the bar holds."""
    parser = argparse.ArgumentParser(prog="tests.bench routers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of each sample")
    chosen = parser.parse_args(arguments)
    return uvloop.run(measure(Plan(chosen.rounds, chosen.seconds), say))
