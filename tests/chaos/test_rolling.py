"""Every service is stopped politely and started again, one replica after the other, and nobody outside notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from itertools import pairwise

import pytest
import pytest_asyncio
from soma.common.v1.turn_pb2 import Delivery, LiveEvent

from services.router.application.own_partitions import GIVE_UP_EVERY_S
from soma_common import ids
from soma_common.client.channel_client import ChannelClient
from soma_common.ids import SessionName
from soma_common.testing.eventually import eventually
from soma_common.testing.model_server import RecordedCall, Reply, Say
from tests.chaos.load import PARTITIONS, Load, Mix
from tests.chaos.report import SHARED_MACHINE
from tests.chaos.stack import CLERK, FaultyStack, errand, faulty_stack

REPLICAS = {"gateway": 2, "router": 3, "cognition": 2, "toolgw": 2}
ROUTERS = ("router-0", "router-1", "router-2")
ERRANDS = Mix(echo=4, slow=3, clerk=3, pause_s=0.3, watch=0.3)
HANDOVER_S = 1.0
SHUTDOWN_S = 30.0
LONG_ANSWER = " ".join(f"word{number}" for number in range(12))
LONG_ANSWER_TAKES_S = 1.8


def _rule(call: RecordedCall) -> Reply:
    if "a long answer" in call.last_text:
        return Say(LONG_ANSWER, delay_s=LONG_ANSWER_TAKES_S / 12)
    return errand(call)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[FaultyStack]:
    """Several of every service."""
    async with faulty_stack(REPLICAS) as running:
        running.model.rule = _rule
        yield running


async def test_a_router_that_stops_hands_its_partitions_over(fleet: FaultyStack) -> None:
    """To the others, evenly, before it is gone itself; and it gets its share back when it has returned."""
    handovers: list[float] = []
    async with Load(fleet, ERRANDS) as load:
        for router in ROUTERS[:1]:
            await _spread(fleet, ROUTERS)
            await load.flows()
            owned = {number for number, owner in (await _owners(fleet)).items() if owner == router}
            asked_at, _ = await fleet.terminate(router)
            await load.flows(each=2)
            taken = _taken_since(fleet, [other for other in ROUTERS if other != router], asked_at)
            assert taken.keys() == owned, "all of them and nothing else moved"
            handovers.append(max(taken.values()) - load.stalls.since(asked_at, asked_at + max(taken.values())))
            seen_s = load.silence(asked_at)
            print(f"handover of {len(owned)} partitions: {max(taken.values()):.3f} s, seen by clients: {seen_s:.3f} s")
            await fleet.is_up(router)
        await _spread(fleet, ROUTERS)
        counts = await load.finish()
    print(f"handover: owned by others after at most {max(handovers):.3f} s (bar {HANDOVER_S}); {counts}")
    assert max(handovers) < HANDOVER_S * SHARED_MACHINE
    assert not fleet.deaths
    assert await _strikes(fleet) == 0


async def test_a_router_that_comes_back_at_once_moves_partitions_once(fleet: FaultyStack) -> None:
    """Away, and back: what was its own is given back one by one, and nothing else is moved to and fro."""
    await _spread(fleet, ROUTERS)
    before = await _owners(fleet)
    epochs = await _epochs(fleet)
    await fleet.terminate("router-1")
    await fleet.is_up("router-1")
    await _spread(fleet, ROUTERS)
    moves = {number: epoch - epochs[number] for number, epoch in (await _epochs(fleet)).items()}
    owned = sum(owner == "router-1" for owner in before.values())
    given_back = PARTITIONS // len(ROUTERS)  # Of what is left over after an even division, nothing has to move.
    assert sum(moves.values()) == owned + given_back, f"{owned} away and {given_back} back: {moves}"
    gave_up = sorted(at for other in ("router-0", "router-2") for at in _logged_at(fleet, other, "router.rebalance"))
    assert all(later - earlier > GIVE_UP_EVERY_S / 2 for earlier, later in pairwise(gave_up[-given_back:]))


async def test_a_model_call_under_way_is_repeated_once_and_announced(fleet: FaultyStack) -> None:
    """Its router stops in the middle of an answer: the turn goes on elsewhere, and its watchers are told."""
    await _spread(fleet, ROUTERS)
    session = SessionName("demo", CLERK, "long", "long")
    owner = (await _owners(fleet))[ids.partition_of(session.id, PARTITIONS)]
    seen: list[LiveEvent] = []
    outcomes: list[Delivery] = []
    calls = len(fleet.model.calls)
    async with ChannelClient(
        fleet.gateways, token=fleet.token("demo"), tenant="demo", channel="long", instance="long-1",
        on_delivery=outcomes.append, on_live=seen.append,
    ) as client:  # fmt: skip
        await client.send(CLERK, "long", "a long answer")
        await eventually(lambda: any(event.HasField("text") for event in seen), 10, "the first words")
        await fleet.terminate(owner)
        await eventually(lambda: bool(outcomes), 30, "the outcome")
        await asyncio.sleep(0.3)  # a second one would come now
        assert ["".join(part.text for part in outcome.message.parts) for outcome in outcomes] == [LONG_ANSWER]
        made = [(call.step, call.dispatch) for call in fleet.model.calls[calls:]]
        assert made == [(1, 1), (1, 2)]
        restarts = [event for event in seen if event.HasField("restarted")]
        assert [event.dispatch for event in restarts] == [2]
        at = seen.index(restarts[0])
        assert {event.dispatch for event in seen[:at]} == {1}
        assert {event.dispatch for event in seen[at:]} == {2}
        await fleet.is_up(owner)


@pytest.mark.timeout(300)
async def test_every_replica_of_every_service_in_turn(fleet: FaultyStack) -> None:
    """Under load: nothing fails, nothing is lost, nothing comes twice, every shutdown is in order and in time."""
    await _roll(fleet, ERRANDS, rounds=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_round_after_round(fleet: FaultyStack) -> None:
    await _roll(fleet, Mix(echo=8, slow=4, clerk=4), rounds=10)


async def _roll(fleet: FaultyStack, mix: Mix, rounds: int) -> None:
    shutdowns: dict[str, float] = {}
    await _spread(fleet, ROUTERS)
    async with Load(fleet, mix) as load:
        await load.flows()
        for instance in fleet.layout.instances() * rounds:
            asked_at, stop_s = await fleet.terminate(instance.name)
            await fleet.is_up(instance.name)
            await load.flows(each=1)
            shutdowns[instance.name] = max(stop_s, shutdowns.get(instance.name, 0.0))
            print(f"{instance.name}: stopped in {stop_s:.2f} s, longest silence {load.silence(asked_at):.2f} s")
        streams = [load.client(tenant).streams for tenant in load.tenants]
        counts = await load.finish()
    slowest = max(shutdowns, key=lambda name: shutdowns[name])
    print(f"rolling restart: {counts}, slowest {slowest} {shutdowns[slowest]:.2f} s, streams {streams}")
    assert counts["accepted"] == counts["answered"] == counts["sent"], "a client was refused"
    assert max(shutdowns.values()) < SHUTDOWN_S
    assert await _strikes(fleet) == 0
    assert not fleet.deaths
    assert not fleet.failed_starts
    for instance in fleet.layout.instances():
        for event in ("service.stop_step_cut_off", "service.stop_step_failed", "service.task_would_not_stop"):
            assert not fleet.logged(instance.name, event), f"{instance.name}: {event}"


async def _strikes(stack: FaultyStack) -> int:
    """How many turns are suspected because a router or a brain died with them. One that stops politely is not dead."""
    database = await stack.database()
    suspects: int = await database.fetchval("SELECT count(*) FROM router.turns WHERE strikes > 0")
    await database.close()
    return suspects


# ---- who owns what


async def _owners(stack: FaultyStack) -> dict[int, str]:
    database = await stack.database()
    rows = await database.fetch("SELECT partition, owner FROM router.leases")
    await database.close()
    return {row["partition"]: row["owner"] for row in rows}


async def _epochs(stack: FaultyStack) -> dict[int, int]:
    database = await stack.database()
    rows = await database.fetch("SELECT id, epoch FROM router.partitions")
    await database.close()
    return {row["id"]: row["epoch"] for row in rows}


async def _spread(stack: FaultyStack, routers: Sequence[str]) -> None:
    """Wait until the routers own all partitions, none of them two more than another."""

    async def even() -> bool:
        owners = list((await _owners(stack)).values())
        counts = [owners.count(router) for router in routers]
        return sum(counts) == PARTITIONS and max(counts) - min(counts) <= 1

    await eventually(even, 45, "partitions are spread evenly", interval_s=0.1)


def _taken_since(stack: FaultyStack, routers: Sequence[str], since: float) -> dict[int, float]:
    """Seconds from `since` (monotonic) to the moment each partition was taken, as the routers' logs have it."""
    began = time.time() - (time.monotonic() - since)
    return {
        int(str(line["partition"])): at - began
        for router in routers
        for line in stack.logged(router, "router.partition_taken")
        if (at := datetime.fromisoformat(str(line["ts"])).timestamp()) > began
    }


def _logged_at(stack: FaultyStack, part: str, event: str) -> list[float]:
    return [datetime.fromisoformat(str(line["ts"])).timestamp() for line in stack.logged(part, event)]
