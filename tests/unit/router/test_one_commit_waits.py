"""Who has to wait although it could begin while another group is being written: nothing begins early for which there is
no room, and nothing of which it is not known what it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest
from soma.cognition.v1.cognition_service_pb2 import StartTurn
from soma.controlplane.v1.agent_service_pb2 import AgentSpec
from soma.router.v1.inbound_pb2 import InBatch, Inbound

from services.router.application.state import CROWD
from services.router.domain.arrival import Policy
from soma_common.layout import BATCH_FORMAT
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import TENANT, inbound
from tests.unit.router.engine import Engine, running_engine
from tests.unit.router.test_one_commit import BESIDE, Door, given, waits
from tests.unit.router.test_one_commit_order import answer_all
from tests.unit.router.test_start_ahead import HERE, THERE, answered, at_rest, forget, rounds, turn_of, warm

OTHER = "other-tenant"


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        await warm(engine, HERE, THERE, BESIDE)
        yield engine


@pytest.fixture
async def door(engine: Engine) -> Door:
    """A group is being written, and takes its time."""
    door = Door(engine)
    await door.is_busy()
    return door


async def test_it_can_be_turned_off() -> None:
    async with running_engine(start_ahead=False) as engine:
        await warm(engine, HERE)
        door = Door(engine)
        await door.is_busy()
        await waits(engine, inbound(HERE))
        door.lets_one_in()
        await eventually(lambda: len(door.sent) == 2, what="its group at the door")
        await rounds()
        assert engine.brain.starts == []
        door.opens()
        engine.answer((await engine.started(1))[0], "ok")
        await engine.outcomes(1)


@pytest.mark.parametrize("is_known", [True, False], ids=["up to the next", "not known yet"])
async def test_what_a_former_owner_may_have_read_waits_for_the_group_to_be_sent(
    engine: Engine, door: Door, is_known: bool
) -> None:
    """What killed the former owner is read again: the next one must be able to count it."""
    engine.state.partitions[0].known_seq = engine.seq + 1 if is_known else None
    await waits(engine, inbound(HERE))
    await given(engine, inbound(THERE))
    if is_known:
        await given(engine, inbound(BESIDE))
    else:
        await waits(engine, inbound(BESIDE))
    door.lets_one_in()
    await engine.started(3)
    assert len(door.sent) == 2
    assert len(door.written) == 1
    assert len(door.sent[1].turns) == 3


async def test_a_session_that_is_not_in_memory_waits(engine: Engine, door: Door) -> None:
    await waits(engine, inbound("stranger"))
    await waits(engine, inbound("stranger", "k2"))
    door.opens()
    [start] = await engine.started(1)
    assert start.turn_id in engine.store.turns


async def test_a_session_whose_past_is_not_in_memory_waits(engine: Engine, door: Door) -> None:
    next(s for s in engine.state.partitions[0].sessions.values() if s.key.session == HERE).forget_context()
    await waits(engine, inbound(HERE))
    door.opens()
    [start] = await engine.started(1)
    assert start.turn_id in engine.store.turns


async def test_a_paused_session_waits(engine: Engine, door: Door) -> None:
    next(s for s in engine.state.partitions[0].sessions.values() if s.key.session == HERE).paused = True
    await waits(engine, inbound(HERE))
    door.opens()
    await rounds()
    assert engine.brain.starts == []
    assert turn_of(HERE, "k") not in engine.store.turns


async def test_what_looks_like_a_retry_waits(engine: Engine, door: Door) -> None:
    await waits(engine, inbound(HERE, "warm"))
    await waits(engine, inbound(THERE, "warm", b"something else"))
    door.opens()
    await engine.outcomes(1)
    await at_rest(engine)
    assert engine.brain.starts == []


async def test_a_message_that_waits_for_companions_waits(engine: Engine, door: Door) -> None:
    engine.directory.spec = AgentSpec(debounce_ms=1, debounce_max_ms=1)
    item = inbound(HERE)
    item.policy = Policy.ACCUMULATE.value  # type: ignore[assignment]
    await waits(engine, item)
    door.opens()
    [start] = await engine.started(1)
    assert start.turn_id in engine.store.turns


# ---- room


def live_starts(engine: Engine) -> list[bytes]:
    """Turns that have started and not ended, as the store knows."""
    return [turn for turn, status in engine.store.turns.items() if status == "running"]


async def test_a_brain_gets_no_more_than_it_takes(engine: Engine, door: Door) -> None:
    engine.brain.credit = 1
    sessions = [HERE, THERE, BESIDE]
    engine.accept(*(inbound(session) for session in sessions))
    await rounds()
    assert (len(engine.brain.starts), engine.brain.credit) == (1, 0)
    for group in range(2, 5):
        door.lets_one_in()
        await eventually(partial(door.has_seen, min(group, 2)), what="the next group")
        await rounds()
        assert len(live_starts(engine)) <= 1
        assert len(engine.brain.starts) == 1
    door.opens()
    for count in range(1, 4):
        engine.answer((await engine.started(count))[-1], "ok")
        await rounds()
        assert len(live_starts(engine)) <= 1
    await engine.outcomes(3)
    assert engine.brain.credit == 1


async def test_turns_that_wait_to_be_durable_keep_their_places(engine: Engine, door: Door) -> None:
    """A turn in the group that is written gets its brain later; what comes behind it takes no place away from it."""
    engine.brain.credit = 2
    late = next(s for s in engine.state.partitions[0].sessions.values() if s.key.session == HERE)
    late.forget_context()
    engine.accept(inbound(HERE))
    door.lets_one_in()
    await eventually(lambda: len(door.sent) == 2, what="the group with its start")
    await rounds()
    assert engine.brain.starts == []
    engine.accept(inbound(THERE), inbound(BESIDE))
    await rounds()
    door.lets_one_in()
    await eventually(lambda: turn_of(HERE, "k") in engine.store.turns, what="its start")
    await rounds()
    door.opens()
    await rounds()
    assert len(live_starts(engine)) <= 2, "no turn starts for which there is no brain"
    assert turn_of(HERE, "k") in {start.turn_id for start in engine.brain.starts}
    engine.brain.credit += 1
    engine.runner.assign()
    await answer_all(engine, 3)


async def test_what_comes_as_a_group_ends_counts_the_places_of_the_next(engine: Engine, door: Door) -> None:
    """A message comes in the very moment in which the group before is done: its turn is in the next, and has one of two
    places.
    """
    engine.brain.credit = 2
    door.lets_one_in()
    engine.accept(inbound(HERE))
    await eventually(lambda: len(door.sent) == 2, what="the group with its start")
    await rounds()
    [start] = engine.brain.starts
    assert engine.brain.credit == 1
    engine.accept(inbound(THERE), inbound(BESIDE))
    await rounds()
    door.opens()
    await rounds()
    assert start.turn_id in live_starts(engine)
    assert len(live_starts(engine)) <= 2, "no turn starts for which there is no brain"
    await answer_all(engine, 3)
    assert engine.brain.credit == 2


def accept_of(engine: Engine, tenant: str, *items: Inbound) -> None:
    """A batch of a tenant comes by the lane."""
    engine.seq += 1
    batch = InBatch(format=BATCH_FORMAT, tenant=tenant, items=items)
    engine.ingest.on_message(0, tenant, "stream", engine.seq, f"b{engine.seq}", batch.SerializeToString())


async def test_a_crowd_is_no_larger_for_being_early() -> None:
    """Of a tenant that is not alone a group starts no more than a crowd."""
    async with running_engine() as engine:
        crowd = [f"c{number}" for number in range(2 * CROWD + 5)]
        await warm(engine, *crowd)
        neighbour = inbound("n", "warm", tenant=OTHER)
        accept_of(engine, OTHER, neighbour)
        await engine.started(1)
        await rounds()
        forget(engine)
        door = Door(engine)
        await door.is_busy()
        engine.accept(*(inbound(name) for name in crowd))
        await rounds()
        assert len(engine.brain.starts) == CROWD
        accept_of(engine, OTHER, inbound("m", "k", tenant=OTHER))
        door.opens()
        await engine.started(len(crowd) + 1)
        sizes = [len([row for row in group.turns if row[3] == TENANT]) for group in door.sent]
        assert max(sizes) <= CROWD
        assert sum(sizes) == len(crowd)


async def test_a_crowd_does_not_grow_while_its_group_waits() -> None:
    """Messages come one after the other, each of them early: the next group counts all of them."""
    async with running_engine() as engine:
        crowd = [f"c{number}" for number in range(CROWD + 5)]
        await warm(engine, *crowd)
        accept_of(engine, OTHER, inbound("n", "warm", tenant=OTHER))
        await engine.started(1)
        await rounds()
        forget(engine)
        door = Door(engine)
        await door.is_busy()
        for name in crowd:
            engine.accept(inbound(name))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert len(engine.brain.starts) == CROWD
        door.opens()
        await engine.started(len(crowd))
        assert max(len(group.turns) for group in door.sent) <= CROWD


async def test_an_early_turn_does_not_overtake_those_that_wait_for_room(engine: Engine, door: Door) -> None:
    """A session that waits in line for a place gets it before one that has just spoken."""
    engine.brain.credit = 1
    [start] = await given(engine)
    door.opens()
    await eventually(lambda: start.turn_id in engine.state.running, what="start")
    await rounds()
    engine.accept(inbound(THERE))
    await rounds()
    assert len(engine.brain.starts) == 1
    door.shut()
    await door.is_busy()
    engine.answer(start, "ok")
    engine.brain.credit = 1
    await waits(engine, inbound(BESIDE))
    engine.brain.credit = 0
    door.opens()
    order: list[StartTurn] = await engine.started(2)
    assert order[1].turn_id == turn_of(THERE, "k")
    await answered_last(engine)


async def answered_last(engine: Engine) -> None:
    while len(engine.ended) < 3:
        engine.answer(engine.brain.starts[-1], "ok")
        await rounds()


async def test_a_message_answered_in_one_commit_is_remembered(engine: Engine, door: Door) -> None:
    """Its retry is known as one, and starts nothing."""
    [start] = await given(engine)
    engine.answer(start, "ok")
    door.opens()
    await engine.outcomes(1)
    door.shut()
    await door.is_busy()
    await waits(engine, inbound(HERE))
    door.opens()
    await at_rest(engine)
    assert len(engine.ended) == 1
    await answered(engine, inbound(HERE, "next"))


async def test_a_place_that_becomes_free_while_others_were_looked_at_is_taken(engine: Engine, door: Door) -> None:
    """Nothing else happens after it that would have the waiting session looked at."""
    door.opens()
    engine.brain.credit = 2
    engine.accept(inbound(HERE, "1"))
    [one] = await engine.started(1)
    await eventually(lambda: one.turn_id in engine.state.running, what="the start of the first turn")
    engine.accept(inbound(HERE, "2"))
    await rounds()
    door.shut()
    engine.answer(one, "ok")
    await rounds()
    engine.accept(inbound(THERE))
    await engine.started(2)
    door.opens()
    await eventually(lambda: len(engine.brain.starts) == 3, what="the turn that waited")
    assert engine.brain.starts[2].turn_id == turn_of(HERE, "2")
    for start in engine.brain.starts[1:]:
        engine.answer(start, "ok")
    await engine.outcomes(3)


async def test_a_start_that_a_brain_cannot_be_sent_costs_nobody_else(engine: Engine, door: Door) -> None:
    loop, failed = asyncio.get_running_loop(), list[object]()
    loop.set_exception_handler(lambda _, context: failed.append(context["exception"]))
    send = engine.brain.start

    def raises_once(start: StartTurn) -> None:
        if not failed:
            raise ValueError("it cannot be serialized")
        send(start)

    engine.brain.start = raises_once  # type: ignore[method-assign]
    engine.accept(inbound(HERE), inbound(THERE), inbound(BESIDE))
    await eventually(lambda: failed, what="the start that cannot be sent")
    door.opens()
    for start in await engine.started(3):
        engine.answer(start, "ok")
    await engine.outcomes(3)
