"""Calls and cancels from all sides while tool gateways are killed at random; invariants are checked afterwards."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from soma.common.v1.message_pb2 import SessionKey
from soma.toolgw.v1.tool_service_pb2 import InvocationState, Reversal, RevertTurnResponse

from soma_common.errors import from_rpc_error, reason_name
from soma_common.testing.eventually import eventually
from soma_common.testing.tool_server import Give, RecordedToolCall, ToolServer, WitnessTool
from tests.integration.toolgw.conftest import Gateway, Surroundings, failure_of, result_of, running_process

KEYS = 60
TURNS = 24
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
        await self._kill(self._chance.choice(sorted(self._gateways)))

    async def kill_all_during_a_call(self) -> None:
        """Kill both while the endpoint has a call of one of them, and start their successors."""
        self._around.http.awake.clear()
        await asyncio.wait_for(self._around.http.asleep.acquire(), 15.0)
        await asyncio.gather(*(self._kill(name) for name in sorted(self._gateways)))
        self._around.http.awake.set()

    async def _kill(self, name: str) -> None:
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
            patience_ms = chance.choice([0, 50, 300])
            return STATES[(await fleet.any().cancel(work.key, timeout=5.0, timeout_ms=patience_ms)).state]

        async def storm(work: Work) -> None:
            await asyncio.sleep(chance.uniform(0, STORM_S))
            asks = [settle(lambda: call(work), seen[work.key]) for _ in range(chance.randint(1, 3))]
            if chance.random() < 0.4:
                asks.append(settle(lambda: cancel(work), seen[work.key]))
            await asyncio.gather(*asks)

        async def kills() -> None:
            for number in range(KILLS):
                await asyncio.sleep(STORM_S / (KILLS + 1))
                # Chance alone may let every call be between its steps; then the storm would have shown nothing.
                await (fleet.kill_one() if number else fleet.kill_all_during_a_call())

        await asyncio.gather(kills(), *(storm(work) for work in works))
        await eventually(lambda: all(len(ends) == 1 for ends in seen.values()), 15.0, f"one end each: {seen}")
        notes = result_of(await fleet.any().invoke("recall_notes", f"{seed}-recall"))["notes"]
    check(works, {key: next(iter(ends)) for key, ends in seen.items()}, surroundings.http.calls, notes)


@dataclass(frozen=True)
class Turn:
    """A turn whose calls are to be taken back."""

    number: int
    seed: int

    @property
    def turn_id(self) -> str:
        """Its id."""
        return f"{self.seed:016x}{self.number:016x}"

    @property
    def session(self) -> SessionKey:
        """A session of its own."""
        return SessionKey(tenant="demo", agent="helper", channel="chat", session=f"s-{self.number}")

    @property
    def keys(self) -> tuple[str, str, str]:
        """Of its three calls."""
        return f"{self.turn_id}/1/0", f"{self.turn_id}/2/0", f"{self.turn_id}/3/0"


async def work(gateway: Gateway, turn: Turn) -> None:
    """Two calls of an endpoint with a note between them."""
    calls: tuple[tuple[str, dict[str, Any]], ...] = (
        ("put", {}),
        ("remember_note", {"note": turn.turn_id}),
        ("pay", {}),
    )
    for step, (key, (tool, arguments)) in enumerate(zip(turn.keys, calls, strict=True), 1):
        result_of(await gateway.invoke(tool, key, arguments, turn.session, step=step, turn_id=turn.turn_id))


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_dies_a_turn_is_taken_back_once(surroundings: Surroundings, seed: int) -> None:
    def slow(call: RecordedToolCall) -> Give:
        return Give(None, delay_s=0.2 if call.tool.startswith("un") else 0.0)

    takes = {"type": "object", "properties": {"arguments": {}, "result": {}}}
    tools = (
        WitnessTool("put", "idempotent", compensation="unput"),
        WitnessTool("pay", "side_effectful", compensation="unpay"),
        WitnessTool("unput", "idempotent", takes),
        WitnessTool("unpay", "side_effectful", takes),
    )
    chance = random.Random(seed)
    turns = [Turn(number, seed) for number in range(TURNS)]
    answers: dict[str, list[RevertTurnResponse]] = {turn.turn_id: [] for turn in turns}
    async with AsyncExitStack() as scope, ToolServer(tools, slow) as server:
        server.write_tools_file(surroundings.folder / "tools.json")
        fleet = Fleet(surroundings, scope, chance)
        await asyncio.gather(fleet.start("toolgw-0"), fleet.start("toolgw-1"))
        for turn in turns:
            await work(fleet.any(), turn)

        async def revert(turn: Turn) -> None:
            await asyncio.sleep(chance.uniform(0, STORM_S))
            while True:
                try:
                    answer = await fleet.any().revert(turn.session, turn.turn_id, timeout=5.0)
                except grpc.aio.AioRpcError as error:
                    if reason_name(from_rpc_error(error).reason) not in AGAIN:
                        raise
                    await asyncio.sleep(0.1)
                else:
                    answers[turn.turn_id].append(answer)
                    return

        async def kills() -> None:
            for _ in range(KILLS):
                await asyncio.sleep(STORM_S / (KILLS + 1))
                await fleet.kill_one()

        await asyncio.gather(kills(), *(revert(turn) for turn in turns for _ in range(3)))
        notes = {
            turn.turn_id: result_of(await fleet.any().invoke("recall_notes", f"{n}-recall", session=turn.session))[
                "notes"
            ]
            for n, turn in enumerate(turns)
        }
    for turn in turns:
        check_reverted(turn, answers[turn.turn_id], server, notes[turn.turn_id])
    assert any(answer[0].reversal == Reversal.REVERSAL_REVERTED for answer in answers.values())


def check_reverted(turn: Turn, answers: list[RevertTurnResponse], server: ToolServer, notes: list[str]) -> None:
    """What must hold of one turn: everybody was told the same, and it is true."""
    first, calls, (put, note, pay) = answers[0], server.calls_by_key(), turn.keys
    assert all(answer == first for answer in answers), answers
    assert calls[f"{pay}/compensation"] <= 1
    if first.reversal == Reversal.REVERSAL_REVERTED:
        assert calls[f"{pay}/compensation"] == 1
        assert calls[f"{put}/compensation"] >= 1
        assert notes == []
    else:  # Its process died with the payment's compensation, whose end nobody knows.
        assert list(first.kept) == [pay, note, put]
        assert calls[f"{put}/compensation"] == 0
        assert notes == [turn.turn_id]


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
                assert notes.count(work.key) == (1 if end == "done" else 0), f"{work}: {end}, {notes}"
    assert {"done", "cancelled"} <= set(ends.values())  # Else the storm has shown nothing.
    assert any(called > 1 for called in calls.values()) or "unknown" in ends.values()
