"""Calls and cancels from all sides while tool gateways are killed at random; invariants are checked afterwards."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc
import pytest
from soma.toolgw.v1.tool_service_pb2 import InvocationState

from soma_common.errors import from_rpc_error, reason_name
from soma_common.testing.eventually import eventually
from tests.integration.toolgw.conftest import Gateway, Surroundings, failure_of, result_of, running_process

KEYS = 60
KILLS = 4
STORM_S = 6.0
SETTLED = {"TOOL_CANCELLED": "cancelled", "TOOL_OUTCOME_UNKNOWN": "unknown"}
AGAIN = {"SERVICE_UNAVAILABLE", "STORE_UNAVAILABLE", "DEADLINE_EXCEEDED", "QUEUE_FULL"}
STATES = {
    InvocationState.INVOCATION_STATE_DONE: "done",
    InvocationState.INVOCATION_STATE_CANCELLED: "cancelled",
    InvocationState.INVOCATION_STATE_OUTCOME_UNKNOWN: "unknown",
}


@dataclass(frozen=True)
class Work:
    """One call of the storm."""

    key: str
    tool: str

    @property
    def arguments(self) -> dict[str, object]:
        """What it is called with."""
        return {"note": self.key} if self.tool == "remember_note" else {"n": 1}


class Fleet:
    """Two gateways that die and come back under their names."""

    def __init__(self, around: Surroundings, scope: AsyncExitStack, chance: random.Random) -> None:
        self._around, self._scope, self._chance = around, scope, chance
        self._gateways: dict[str, Gateway] = {}

    async def start(self, name: str) -> None:
        """Start a gateway, or its successor."""
        self._gateways[name] = await self._scope.enter_async_context(running_process(self._around, name))

    async def kill_one(self) -> None:
        """Kill one of them and start its successor."""
        name = self._chance.choice(sorted(self._gateways))
        process = self._gateways[name].process
        assert process is not None
        process.send(signal.SIGKILL)
        await process.ended()
        await self.start(name)

    def any(self) -> Gateway:
        """One of them, dead or alive."""
        return self._gateways[self._chance.choice(sorted(self._gateways))]


async def settle(ask: Callable[[], Awaitable[str]], seen: set[str]) -> None:
    """Ask until there is a final answer, and note it."""
    while True:
        try:
            seen.add(await ask())
            return
        except grpc.aio.AioRpcError as error:
            reason = reason_name(from_rpc_error(error).reason)
            if reason in SETTLED:
                seen.add(SETTLED[reason])
                return
            if reason not in AGAIN:
                raise
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_dies_every_call_has_one_end(surroundings: Surroundings, seed: int) -> None:
    surroundings.describe(pay="/slow", put="/slow")
    chance = random.Random(seed)
    works = [Work(f"{seed}-{n}", chance.choice(["pay", "put", "remember_note"])) for n in range(KEYS)]
    seen: dict[str, set[str]] = {work.key: set() for work in works}
    async with AsyncExitStack() as scope:
        fleet = Fleet(surroundings, scope, chance)
        await asyncio.gather(fleet.start("toolgw-0"), fleet.start("toolgw-1"))

        async def call(work: Work) -> str:
            answer = await fleet.any().invoke(work.tool, work.key, work.arguments, timeout=5.0)
            assert not answer.HasField("error"), failure_of(answer)
            return "done"

        async def cancel(work: Work) -> str:
            return STATES[(await fleet.any().cancel(work.key, timeout=5.0)).state]

        async def storm(work: Work) -> None:
            await asyncio.sleep(chance.uniform(0, STORM_S))
            asks = [settle(lambda: call(work), seen[work.key]) for _ in range(chance.randint(1, 3))]
            if chance.random() < 0.4:
                asks.append(settle(lambda: cancel(work), seen[work.key]))
            await asyncio.gather(*asks)

        async def kills() -> None:
            for _ in range(KILLS):
                await asyncio.sleep(STORM_S / (KILLS + 1))
                await fleet.kill_one()

        await asyncio.gather(kills(), *(storm(work) for work in works))
        await eventually(lambda: all(len(ends) == 1 for ends in seen.values()), 1.0, f"one end each: {seen}")
        notes = result_of(await fleet.any().invoke("recall_notes", f"{seed}-recall"))["notes"]
    check(works, {key: next(iter(ends)) for key, ends in seen.items()}, surroundings.http.calls, notes)


def check(works: list[Work], ends: dict[str, str], calls: dict[str, int], notes: list[str]) -> None:
    """What must hold of each call, by its end."""
    for work in works:
        end, called = ends[work.key], calls.get(work.key, 0)
        match work.tool:
            case "pay":
                assert called <= 1, f"{work} ran {called} times"
                assert (end, called) not in {("done", 0), ("cancelled", 1)}, f"{work}: {end}, ran {called} times"
            case "put":
                assert (called > 0) or end != "done", f"{work}: {end}, ran {called} times"
                assert end != "cancelled" or called == 0, f"{work}: {end}, ran {called} times"
            case _:
                assert end != "unknown"
                assert notes.count(work.key) == (1 if end == "done" else 0), f"{work}: {end}, {notes}"
    assert {"done", "cancelled"} <= set(ends.values())  # Else the storm has shown nothing.
    assert any(called > 1 for called in calls.values()) or "unknown" in ends.values()
