"""`make bench ARGS=fairness`: what a tenant that floods costs its neighbour, and whether weights hold.

Two tenants of one weight; the brains take so many turns at once and each lasts a while, so that the capacity is known
and the share of each is half of it. The victim talks within its share (closed loops, each message after the answer to
the one before). The flood sends ten times its own share, whatever becomes of it, from a process of its own. Quiet and
noisy samples take turns. The flood's own CPU is in the result: what it takes, the stack does not have.

Verdict: the victim's p99 under the flood is at most max(1.5 x quiet, quiet + 25 ms); of two tenants of weights 300 and
100 that both have more to do than fits, the first gets three turns to the other's one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from statistics import median
from time import monotonic, process_time
from typing import Any, Final

import uvloop
from google.protobuf.field_mask_pb2 import FieldMask
from soma.common.v1.message_pb2 import Error, Message, Part, Role
from soma.common.v1.turn_pb2 import ArrivalPolicy, Delivery, Outcome
from soma.controlplane.v1.agent_service_pb2 import AgentSpec
from soma.controlplane.v1.tenant_service_pb2 import Tenant, UpdateTenantRequest
from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceStub
from soma.gateway.v1.channel_service_pb2 import InboundMessage

from soma_common.client.channel_client import ChannelClient
from soma_common.grpc.channel import open_channel
from somastack.provision import provision
from tests.bench import processes
from tests.bench.load import percentile
from tests.chaos.stack import FaultyStack, faulty_stack

VICTIM: Final = "demo"
FLOOD: Final = "acme"
TICK_S: Final = 0.01
TIMES_ITS_SHARE: Final = 10
MOST_UNANSWERED: Final = 2000


@dataclass(frozen=True)
class Scene:
    """The stack and the load."""

    model: str = "echo/delay-20-60"
    brain_turns: int = 32
    """Turns the brain takes at once."""
    victim_sessions: int = 4
    victim_turns: int = 2000
    """Turns in a sample, at least."""
    rounds: int = 3
    flood_streams: int = 4
    flood_sessions: int = 1000
    backlog: int = 5000
    """Messages of a tenant that may wait: how long the stack needs to be quiet again."""


def environment(scene: Scene) -> dict[str, dict[str, str]]:
    """Settings of the stack's services."""
    bound = {"SOMA_MAX_QUEUED_PER_TENANT": str(scene.backlog)}
    return {"cognition": {"SOMA_MAX_TURNS": str(scene.brain_turns)}, "router": bound, "gateway": bound}


async def measure(scene: Scene, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs everything on a stack of its own."""
    async with faulty_stack(environment=environment(scene)) as stack:
        spec = AgentSpec(model=scene.model, context_messages=4, arrival_policy=ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE)
        for tenant in (VICTIM, FLOOD):
            await provision(stack.layout.targets("controlplane"), stack.admin_token, tenant, "talk", spec)
        say("capacity ...")
        capacity = await _capacity(stack, scene)
        share = capacity / 2
        say(f"capacity {capacity:.0f} turns/s, a share is {share:.0f}, the flood is {TIMES_ITS_SHARE * share:.0f}/s")
        rounds = []
        for number in range(scene.rounds):
            quiet = await _sample(stack, scene, 0.0)
            noisy = await _sample(stack, scene, TIMES_ITS_SHARE * share)
            rounds.append({"quiet": quiet, "noisy": noisy})
            say(f"round {number + 1}: quiet {_told(quiet)}")
            say(f"         noisy {_told(noisy)}")
            say(
                f"         flood: {noisy['flood']['offered_per_s']:.0f}/s offered,"
                f" {noisy['flood']['accepted_per_s']:.0f} accepted, {noisy['flood']['answered_per_s']:.0f} answered,"
                f" CPU {noisy['flood']['cpu']:.2f} of a core"
            )
            await _until_quiet(stack)
        weights = await _weights(stack, scene, say)
        assert not stack.deaths, stack.deaths
    quiet_p99 = median(entry["quiet"]["p99_ms"] for entry in rounds)
    noisy_p99 = median(entry["noisy"]["p99_ms"] for entry in rounds)
    allowed = max(1.5 * quiet_p99, quiet_p99 + 25)
    return {
        "capacity_per_s": capacity,
        "rounds": rounds,
        "quiet_p99_ms": quiet_p99,
        "noisy_p99_ms": noisy_p99,
        "allowed_ms": allowed,
        "neighbour_holds": noisy_p99 <= allowed,
        "weights": weights,
        "weights_hold": 2.5 <= weights["ratio"] <= 3.5,
    }


def _told(sample: dict[str, Any]) -> str:
    return (
        f"p50 {sample['p50_ms']:.1f} p99 {sample['p99_ms']:.1f} ms of {sample['turns']} turns,"
        f" accept p50 {sample['accept_p50_ms']:.1f} p99 {sample['accept_p99_ms']:.1f} ms,"
        f" {sample['groups_per_s']:.0f} groups/s of {sample['group_items']:.1f} items in {sample['group_ms']:.1f} ms"
    )


class _Loops:
    """Closed loops of one tenant: each session sends when it is answered."""

    def __init__(self, stack: FaultyStack, tenant: str, sessions: int) -> None:
        self.client = ChannelClient(
            stack.gateways,
            token=stack.token(tenant),
            tenant=tenant,
            channel=f"loops-{uuid.uuid4().hex[:6]}",
            instance="loops",
            credit=1024,
            on_delivery=self._delivered,
        )
        self.label = uuid.uuid4().hex[:6]
        self.sessions = sessions
        self.sent_at: dict[str, float] = {}
        self.latencies: list[float] = []
        self.accepts: list[float] = []
        self.errors = 0
        self.stopping = False

    async def __aenter__(self) -> _Loops:
        await self.client.__aenter__()
        for number in range(self.sessions):
            self._send(f"{self.label}-{number}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping = True
        until = monotonic() + 20
        while self.sent_at and monotonic() < until:
            await asyncio.sleep(0.02)
        await self.client.close()

    def _send(self, session: str) -> None:
        self.sent_at[session] = monotonic()
        self.client.post(_message(session), lambda _, error: self._answered(session, error))

    def _answered(self, session: str, error: Error | None) -> None:
        if error is None:
            self.accepts.append(monotonic() - self.sent_at.get(session, monotonic()))
        else:
            self.errors += 1
            if not self.stopping:
                asyncio.get_running_loop().call_later(0.2, self._send, session)

    def _delivered(self, delivery: Delivery) -> None:
        sent_at = self.sent_at.pop(delivery.session, None)
        if sent_at is not None:
            self.latencies.append(monotonic() - sent_at)
        self.errors += delivery.outcome != Outcome.OUTCOME_FINAL
        if not self.stopping:
            self._send(delivery.session)


def _message(session: str) -> InboundMessage:
    return InboundMessage(
        agent="talk",
        session=session,
        idempotency_key=uuid.uuid4().hex,
        message=Message(role=Role.ROLE_USER, parts=[Part(text="x" * 128)]),
    )


async def _capacity(stack: FaultyStack, scene: Scene) -> float:
    async with _Loops(stack, FLOOD, 4 * scene.brain_turns) as loops:
        await asyncio.sleep(2)
        before, began = len(loops.latencies), monotonic()
        await asyncio.sleep(4)
        return (len(loops.latencies) - before) / (monotonic() - began)


async def _sample(stack: FaultyStack, scene: Scene, flood_per_s: float) -> dict[str, Any]:
    """The victim's latencies, alone or beside the flood."""
    flood = await _start_flood(stack, scene, flood_per_s) if flood_per_s else None
    await asyncio.sleep(3.0 if flood else 1.0)
    pids = {name: stack.process(name).pid for name in stack.parts}
    try:
        async with _Loops(stack, VICTIM, scene.victim_sessions) as loops:
            await asyncio.sleep(1.0)
            loops.latencies.clear()
            loops.accepts.clear()
            groups = await _groups(stack)
            before = {name: processes.cpu_s(pid) for name, pid in pids.items()}
            own, began = process_time(), monotonic()
            while len(loops.latencies) < scene.victim_turns and monotonic() < began + 120:
                await asyncio.sleep(0.05)
            seconds = monotonic() - began
            taken, accepts = list(loops.latencies), list(loops.accepts)
            written = {name: count - groups[name] for name, count in (await _groups(stack)).items()}
            cpu = {name: (processes.cpu_s(pid) - before[name]) / seconds for name, pid in pids.items()}
            cpu["victim's client"] = (process_time() - own) / seconds
    finally:
        flooded = await _stop_flood(flood) if flood else None
    return {
        "turns": len(taken),
        "turns_per_s": len(taken) / seconds,
        "p50_ms": percentile(taken, 50),
        "p99_ms": percentile(taken, 99),
        "accept_p50_ms": percentile(accepts, 50),
        "accept_p99_ms": percentile(accepts, 99),
        "groups_per_s": written["count"] / seconds,
        "group_ms": written["seconds"] / max(written["count"], 1) * 1000,
        "group_items": written["items"] / max(written["count"], 1),
        "errors": loops.errors,
        "cpu": cpu,
        "flood": flooded,
    }


async def _groups(stack: FaultyStack) -> dict[str, float]:
    """The router's group commits so far."""
    metrics = await stack.metrics("router-0")
    return {
        "count": metrics["soma_router_group_seconds_count"],
        "seconds": metrics["soma_router_group_seconds_sum"],
        "items": metrics["soma_router_group_items_sum"],
    }


async def _until_quiet(stack: FaultyStack) -> None:
    """What the flood has left behind is answered."""
    until = monotonic() + 120
    while monotonic() < until:
        metrics = await stack.metrics("router-0")
        if not metrics["soma_router_messages_waiting"] and not metrics["soma_router_turns_running"]:
            return
        await asyncio.sleep(0.2)
    raise TimeoutError("the flood's backlog is not worked off")


async def _weights(stack: FaultyStack, scene: Scene, say: Callable[[str], None]) -> dict[str, Any]:
    say("weights 300 and 100, both with more to do than fits ...")
    await _weigh(stack, VICTIM, 300)
    await _weigh(stack, FLOOD, 100)
    many = 4 * scene.brain_turns
    async with _Loops(stack, VICTIM, many) as heavy, _Loops(stack, FLOOD, many) as light:
        await asyncio.sleep(2)
        before = len(heavy.latencies), len(light.latencies)
        await asyncio.sleep(8)
        turns = len(heavy.latencies) - before[0], len(light.latencies) - before[1]
    return {"turns_300": turns[0], "turns_100": turns[1], "ratio": turns[0] / max(turns[1], 1)}


async def _weigh(stack: FaultyStack, tenant: str, weight: int) -> None:
    channel = open_channel(
        stack.layout.targets("controlplane"), token=lambda: stack.admin_token, service="controlplane"
    )
    try:
        await TenantServiceStub(channel).UpdateTenant(
            UpdateTenantRequest(
                tenant=Tenant(name=f"tenants/{tenant}", weight=weight), update_mask=FieldMask(paths=["weight"])
            )
        )
    finally:
        await channel.close()


# ---- the flood, in a process of its own


async def _start_flood(stack: FaultyStack, scene: Scene, per_s: float) -> asyncio.subprocess.Process:
    order = {
        "target": stack.gateways,
        "token": stack.token(FLOOD),
        "per_s": per_s,
        "streams": scene.flood_streams,
        "sessions": scene.flood_sessions,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.fairness", "--flood", json.dumps(order),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    await process.stdout.readline()  # it says that it has begun
    return process


async def _stop_flood(process: asyncio.subprocess.Process) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    told = json.loads(await process.stdout.readline())
    await process.wait()
    return {str(name): float(value) for name, value in told.items()}


async def _flood(order: dict[str, Any]) -> None:
    """Sends at a rate until the standard input ends, and says what became of it."""
    counts = {"offered": 0, "accepted": 0, "refused": 0, "answered": 0, "held_back": 0}

    def answered(_: bytes, error: Error | None) -> None:
        counts["accepted" if error is None else "refused"] += 1

    def delivered(_: Delivery) -> None:
        counts["answered"] += 1

    loop = asyncio.get_running_loop()
    over = loop.run_in_executor(None, sys.stdin.read)
    label = uuid.uuid4().hex[:6]
    async with AsyncExitStack() as open_clients:
        clients = [
            await open_clients.enter_async_context(
                ChannelClient(
                    order["target"], token=order["token"], tenant=FLOOD, channel=f"flood-{number}",
                    instance=f"flood-{number}", credit=512, on_delivery=delivered,
                )
            )
            for number in range(order["streams"])
        ]  # fmt: skip
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        began, own = monotonic(), process_time()
        while not over.done():
            await asyncio.sleep(TICK_S)
            due = int((monotonic() - began) * order["per_s"])
            while counts["offered"] < due:
                number = counts["offered"] % order["sessions"]
                client = clients[number % len(clients)]
                counts["offered"] += 1
                if client.unanswered >= MOST_UNANSWERED:
                    counts["held_back"] += 1  # the stream's own bound: it would be refused there
                    continue
                client.post(_message(f"{label}-{number}"), answered)
        seconds = monotonic() - began
        result = {f"{name}_per_s": count / seconds for name, count in counts.items()}
        result["cpu"] = (process_time() - own) / seconds
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        os._exit(0)  # what is unanswered stays so: the flood is over


def main(arguments: list[str], say: Callable[[str], None]) -> bool:
    """Runs the benchmark with a command's arguments; returns whether both promises hold."""
    parser = argparse.ArgumentParser(prog="tests.bench fairness", description=__doc__)
    parser.add_argument("--model", default=Scene.model, help="what answers: echo/delay-A-B, or echo/echo (CPU-bound)")
    parser.add_argument("--brain-turns", type=int, default=Scene.brain_turns)
    parser.add_argument("--rounds", type=int, default=Scene.rounds)
    parser.add_argument("--turns", type=int, default=Scene.victim_turns)
    chosen = parser.parse_args(arguments)
    scene = Scene(model=chosen.model, brain_turns=chosen.brain_turns, rounds=chosen.rounds, victim_turns=chosen.turns)
    result = uvloop.run(measure(scene, say))
    say(
        f"neighbour: p99 {result['quiet_p99_ms']:.1f} ms quiet, {result['noisy_p99_ms']:.1f} ms beside the flood,"
        f" {result['allowed_ms']:.1f} ms allowed: {'HOLDS' if result['neighbour_holds'] else 'DOES NOT HOLD'}"
    )
    say(
        f"weights 300 : 100 got {result['weights']['turns_300']} : {result['weights']['turns_100']} turns"
        f" ({result['weights']['ratio']:.2f} : 1): {'HOLDS' if result['weights_hold'] else 'DOES NOT HOLD'}"
    )
    for name, used in result["rounds"][-1]["noisy"]["cpu"].items():
        say(f"  {name}: {used:.2f} of a core beside the flood")
    return bool(result["neighbour_holds"] and result["weights_hold"])


if __name__ == "__main__":
    if sys.argv[1] == "--flood":
        uvloop.run(_flood(json.loads(sys.argv[2])))
