"""`make bench ARGS=tenants`: what it costs that the same turns belong to many tenants.

64 turns are in flight in every case, and each goes to the next of 200 sessions:

    1 tenant, 4 streams       the usual load
    1 tenant, 200 streams     an adapter stream for each session: the streams' own price
    200 tenants, 200 streams  the same, with a tenant, an agent and a token for each: the tenants' price

A gateway has one publish in flight for each tenant and lane and a frame holds one tenant's items only, so that what
goes together for one tenant goes apart for many. No bar is set for it: the cost is reported.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import uvloop
from soma.controlplane.v1.agent_service_pb2 import AgentSpec

from somastack.auth_material import AuthMaterial
from somastack.home import Home
from somastack.provision import provision
from tests.bench import flat
from tests.bench import stack as stacks
from tests.bench.rotation import Line, Rotation

AGENT: Final = "echo"
IN_FLIGHT: Final = 64
_MAKING: Final = 8
"""Tenants that are made at once."""
_WARM_S: Final = 2.0


@dataclass(frozen=True)
class Plan:
    """How many tenants, and how long is measured."""

    tenants: int = 200
    rounds: int = 5
    seconds: float = 5.0


async def measure(plan: Plan, say: flat.Say) -> bool:
    """Makes the tenants, measures the three cases in turns."""
    stack = await stacks.start()
    try:
        say(f"making {plan.tenants} tenants ...")
        tenants = await _tenants(stack, plan.tenants)
        cases: dict[str, list[dict[str, Any]]] = {}
        for number in range(plan.rounds):
            for name, lines in _cases(tenants, number).items():
                sessions = [(each % len(lines), f"{number}-{each}") for each in range(plan.tenants)]
                async with Rotation(stack.gateway, AGENT, lines, sessions, IN_FLIGHT) as load:
                    await load.measure(_WARM_S)
                    seen = await flat.sample(stack, load, plan.seconds)
                cases.setdefault(name, []).append(seen)
                say(f"round {number + 1}: {name}: {seen['turns_per_s']:.0f}/s, p50 {seen['p50_ms']:.1f} ms")
    finally:
        await stacks.stop(stack)
    say(flat.table(f"{IN_FLIGHT} turns in flight", cases))
    for name, rounds in cases.items():
        say(f"  CPU s per 1000 turns, {name}: {_split(rounds)}")
    told = cost(cases)
    for name, value in told.items():
        say(f"  {name}: {value:.2f}")
    errors = sum(int(each["errors"]) for rounds in cases.values() for each in rounds)
    return flat.conclude("tenants", {"cases": cases, "cost": told}, [flat.Bar("errors", errors, most=0)], say)


def cost(cases: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """How many times as much, round by round."""
    usual, streams, many = cases.values()
    return {
        "turns/s, many streams by few": flat.ratio(streams, usual, "turns_per_s"),
        "turns/s, many tenants by one, same streams": flat.ratio(many, streams, "turns_per_s"),
        "CPU, many streams by few": flat.ratio(streams, usual, "cpu_s_per_1000"),
        "CPU, many tenants by one, same streams": flat.ratio(many, streams, "cpu_s_per_1000"),
    }


def _cases(tenants: Mapping[str, str], number: int) -> dict[str, list[Line]]:
    first, token = next(iter(tenants.items()))
    count = len(tenants)
    return {
        "1 tenant, 4 streams": [Line(first, token, f"few-{number}-{each}") for each in range(4)],
        f"1 tenant, {count} streams": [Line(first, token, f"many-{number}-{each}") for each in range(count)],
        f"{count} tenants, {count} streams": [Line(tenant, own, f"own-{number}") for tenant, own in tenants.items()],
    }


def _split(rounds: list[dict[str, Any]]) -> str:
    names = rounds[0]["cpu_by_process"]
    return ", ".join(f"{name} {flat.middle([r['cpu_by_process'] for r in rounds], name):.3f}" for name in names)


async def _tenants(stack: stacks.Stack, count: int) -> dict[str, str]:
    """Tenants with an agent each, and the token of their channels."""
    material = AuthMaterial(Home(stack.home))
    free = asyncio.Semaphore(_MAKING)

    async def make(name: str) -> tuple[str, str]:
        async with free:
            await provision(
                stack.controlplane, stack.token, name, AGENT, AgentSpec(model="echo/echo", context_messages=20)
            )
        return name, material.issue(name).read_text(encoding="utf-8").strip()

    return dict(await asyncio.gather(*(make(f"tenant-{number}") for number in range(count))))


def main(arguments: list[str], say: flat.Say) -> bool:
    """Runs the benchmark with a command's arguments; returns whether all turns were answered."""
    parser = argparse.ArgumentParser(prog="tests.bench tenants", description=__doc__)
    parser.add_argument("--tenants", type=int, default=Plan.tenants)
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of each sample")
    chosen = parser.parse_args(arguments)
    return uvloop.run(measure(Plan(chosen.tenants, chosen.rounds, chosen.seconds), say))
