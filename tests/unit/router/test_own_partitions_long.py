"""Partitions whose load takes longer than a lease lasts, against a database whose delays a test sets."""

import asyncio
from collections.abc import Callable
from uuid import UUID, uuid4

import pytest

from services.router.application.group import StoreLost
from services.router.application.own_partitions import BEAT_S, LEASE_S, SETTLED_S, TAKES_AT_ONCE
from services.router.application.ports import AcquiredRow, PendingRow
from services.router.application.restore_sessions import SLICE, Found, restore_sessions
from services.router.domain.partition import Cursor, Partition
from tests.unit.router.engine import Engine
from tests.unit.router.test_own_partitions import ME, World, pending, running

LONG = 7
"""The partition with much to load: the last in its order, so that the others are there before."""
LONG_S = 4 * LEASE_S


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(8, monkeypatch)
    world.load_takes_s = lambda number: LONG_S if number == LONG else 0.0
    world.pending[LONG] = [pending(position, f"s{position}") for position in range(1, 8)]
    return world


def said_of(world: World, number: int) -> list[str]:
    return [event for event in world.events if event.endswith(f" {number}")]


async def test_a_load_that_takes_longer_than_a_lease_ends_no_term(world: World) -> None:
    async with running(world):
        await world.goes_on(LONG_S + 2)
        assert world.owned == set(range(8))
        assert world.loads.count(LONG) == 1
        assert not [event for event in world.events if event.startswith("drop")]
        assert world.always_in_time


async def test_the_lease_of_what_is_being_loaded_never_runs_out(world: World) -> None:
    async with running(world):
        await world.goes_on(1)
        term = world.rows[LONG].term
        while LONG not in world.owned:
            await world.goes_on(BEAT_S)
            assert (world.rows[LONG].owner, world.rows[LONG].term) == (ME, term)
            assert world.rows[LONG].expires_at > world.now


async def test_it_is_renewed_even_if_the_answer_that_it_was_taken_comes_late(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = world.acquire

    async def late(partition: int, term: UUID, seen: UUID | None) -> AcquiredRow | None:
        row = await acquire(partition, term, seen)
        await world.lasts(LONG_S if partition == LONG else 0)
        return row

    monkeypatch.setattr(world, "acquire", late)
    world.load_takes_s = lambda _: 0.0
    async with running(world):
        await world.goes_on(LONG_S - 1)
        assert world.rows[LONG].expires_at > world.now
        await world.goes_on(2)
        assert LONG in world.owned


async def test_what_takes_long_keeps_no_other_partition_waiting(world: World) -> None:
    world.load_takes_s = lambda number: LONG_S if number == 0 else 0.0
    async with running(world):
        await world.goes_on(1)
        assert world.owned == set(range(1, 8))


async def test_only_so_many_are_loaded_at_a_time_and_no_more_than_its_share(world: World) -> None:
    world.load_takes_s = lambda _: LONG_S
    world.routers = 2
    async with running(world):
        await world.goes_on(LONG_S - 1)
        assert sum(row.owner == ME for row in world.rows) == TAKES_AT_ONCE
        await world.goes_on(3 * LONG_S)
        assert len(world.owned) == 4
        assert sum(row.owner == ME for row in world.rows) == 4


async def test_a_lease_lost_while_loading_ends_the_load(world: World) -> None:
    world.routers = 2
    world.held_by("router-1", 0, 1, 2, 3, for_s=1e6)
    async with running(world):
        await world.goes_on(LONG_S / 2)
        world.held_by("router-1", LONG, for_s=1e6)
        await world.goes_on(2 * BEAT_S)
        assert not world.keeper._takes, "the load goes on for nobody"
        await world.goes_on(LONG_S)
        assert world.owned == {4, 5, 6}
        assert said_of(world, LONG) == []
        assert world.strikes.get(LONG) is None


async def test_a_load_outlives_a_stall_in_which_nobody_took_the_partition(world: World) -> None:
    async with running(world):
        await world.goes_on(1)
        world.now += LEASE_S + 0.1
        await world.goes_on(LONG_S)
        assert "drop 0" in world.events, "what it owned has ended"
        assert world.owned == set(range(8))
        assert world.loads.count(LONG) == 1


async def test_a_stall_in_which_the_partition_was_taken_ends_the_load(world: World) -> None:
    async with running(world):
        await world.goes_on(1)
        world.now += LEASE_S + 0.1
        world.held_by("router-1", LONG, for_s=1e6)
        await world.goes_on(LONG_S)
        assert world.owned == set(range(7))
        assert said_of(world, LONG) == []


@pytest.mark.parametrize("robbed", [False, True])
async def test_what_ends_with_a_stall_is_its_own_only_after_a_beat(
    world: World, monkeypatch: pytest.MonkeyPatch, robbed: bool
) -> None:
    """The process stood still until after its leases had run out, and the load is what it hears of first."""
    channels = world.undelivered_channels

    async def stands_still(partition: int) -> list[tuple[str, str]]:
        if partition == LONG and world.loads.count(LONG) == 1:
            world.now += LEASE_S + 0.1
            if robbed:
                world.held_by("router-1", LONG, for_s=1e6)
        return await channels(partition)

    monkeypatch.setattr(world, "undelivered_channels", stands_still)
    async with running(world):
        await world.goes_on(LONG_S + 3)
        assert (LONG in world.owned) is not robbed
        assert world.loads.count(LONG) == 1
        assert bool(said_of(world, LONG)) is not robbed


async def test_a_lost_database_connection_ends_loads_too(world: World) -> None:
    async with running(world):
        await world.goes_on(LONG_S / 2)
        world.keeper.end_all("store_lost")
        await world.settles()
        assert said_of(world, LONG) == []
        await world.goes_on(LONG_S + 2)
        assert world.owned == set(range(8))
        assert world.loads.count(LONG) == 2


async def test_a_load_that_loses_the_store_is_tried_again_after_the_next_look(world: World) -> None:
    world.load_takes_s = lambda _: 0.0
    world.load_fails = StoreLost("gone")
    async with running(world):
        await world.goes_on(2)
        assert len(world.loads) <= TAKES_AT_ONCE * (2 / 0.25 + 1), "and not in between"
        world.load_fails = None
        await world.goes_on(1)
        assert world.owned == set(range(8))


async def test_a_strike_that_was_not_stored_is_asked_for_again(world: World) -> None:
    world.held_by("router-1", LONG, for_s=-1)
    async with running(world):
        await world.goes_on(LEASE_S + 2)
        assert LONG in world.loads
        assert world.asked_strikes == 0
        world.keeper.end_all("store_lost")
        world.rows[LONG].owner = "router-1"  # it had it in between, and died again
        world.rows[LONG].expires_at = world.now - 1
        await world.goes_on(LEASE_S + LONG_S + 3)
        assert LONG in world.owned
        assert world.asked_strikes == 1


async def test_a_load_that_was_given_up_is_no_strike(world: World) -> None:
    """Nobody died: the partition was free, and it is this router that has it when it is taken again."""
    async with running(world):
        await world.goes_on(1)
        world.keeper.end_all("store_lost")
        await world.goes_on(LONG_S + 2)
        assert world.owned == set(range(8))
        assert world.asked_strikes == 0


async def test_a_strike_is_owed_until_a_load_has_stored_it(world: World) -> None:
    world.held_by("router-1", LONG, for_s=-1)
    async with running(world):
        await world.goes_on(LEASE_S + 2)
        world.keeper.end_all("store_lost")
        await world.goes_on(LONG_S + 2)
        assert world.loads.count(LONG) == 2
        assert world.asked_strikes == 1


async def test_a_shutdown_frees_what_is_being_loaded_at_once(world: World) -> None:
    async with running(world):
        await world.goes_on(1)
        await world.keeper.release_all()
        assert [row.owner for row in world.rows] == [None] * 8
        assert not world.keeper._takes
        await world.goes_on(LONG_S)
        assert world.owned == set()
        assert said_of(world, LONG) == []
        assert [row.owner for row in world.rows] == [None] * 8


async def test_what_is_being_loaded_is_not_given_up_to_another_router(world: World) -> None:
    async with running(world):
        await world.goes_on(1)
        world.routers = 2
        while sum(row.owner == ME for row in world.rows) > 4:
            await world.goes_on(1)
            world.held_by("router-1", *(n for n, row in enumerate(world.rows) if row.owner is None), for_s=1e6)
        assert LONG not in world.owned
        assert world.rows[LONG].owner == ME
        await world.goes_on(LONG_S)
        assert LONG in world.owned
        assert len(world.owned) == 4
        assert world.loads.count(LONG) == 1


async def test_what_nobody_expects_ends_the_process(world: World) -> None:
    world.load_fails = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        async with asyncio.timeout(10):
            await world.keeper.run()


async def test_who_stops_running_stops_loading(world: World) -> None:
    async with running(world):
        await world.goes_on(1)
        assert world.keeper._takes
    await world.settles()
    assert not world.keeper._takes
    assert LONG not in world.owned


# ---- what was loaded is put back in slices


def flood(sessions: int, each: int) -> list[PendingRow]:
    """Messages that wait, each session's one behind the other's."""
    places = [(turn, number) for turn in range(each) for number in range(sessions)]
    return [pending(position, f"s{number}") for position, (_, number) in enumerate(places, 1)]


async def test_others_do_what_they_have_to_between_slices(world: World) -> None:
    """And the lane is read, and watchers are answered, once all of it is there."""
    world.load_takes_s = lambda _: 0.0
    world.pending[LONG] = flood(SLICE, 4)
    seen: list[tuple[int, bool, bool]] = []

    async def other() -> None:
        while True:
            partition = world.state.partitions.get(LONG)
            if partition is not None:
                seen.append((world.state.mailbox.waiting, partition.restoring, f"attach {LONG}" in world.events))
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await world.rounds()
    while world.keeper._takes:
        await asyncio.sleep(0)
    await world.settles()
    task.cancel()
    between = [waiting for waiting, *_ in seen if 0 < waiting < 4 * SLICE]
    assert len(set(between)) >= 3
    assert all(waiting % 4 == 0 for waiting in between), "a session is there as a whole"
    assert {entry[1:] for entry in seen if entry[0] < 4 * SLICE} == {(True, False)}
    assert seen[-1] == (4 * SLICE, False, True)


async def test_a_term_that_ends_between_slices_leaves_nothing_behind(world: World) -> None:
    world.load_takes_s = lambda _: 0.0
    world.pending[LONG] = flood(SLICE, 4)
    begun = asyncio.create_task(world.rounds(each_s=0))
    while not world.state.mailbox.waiting:
        await asyncio.sleep(0)
    partition = world.state.partitions[LONG]
    world.keeper.end_fenced(frozenset({LONG}))
    while world.keeper._takes:
        await asyncio.sleep(0)
    await begun
    assert partition.lost
    assert partition.restoring
    assert not partition.sessions
    assert f"attach {LONG}" not in world.events
    assert world.state.mailbox.waiting == world.state.scheduler.waiting == 0


async def test_what_is_being_put_back_is_not_given_up(world: World) -> None:
    """It would be loaded for nothing, here and then there."""
    world.load_takes_s = lambda _: 0.0
    for number in range(8):
        if number != LONG:  # another would cost more turns a step
            world.pending[number] = [pending(1, f"s{number}", (bytes([number]) * 16, 1, 1))]
    await world.rounds()
    world.pending[LONG] = flood(SLICE, 4)
    world.keeper.end_fenced(frozenset({LONG}))
    again = asyncio.create_task(world.rounds(each_s=0))
    while LONG not in world.owned:
        await asyncio.sleep(0)
    assert world.state.partitions[LONG].restoring
    world.keeper._routers["router-1"] = world.now - SETTLED_S
    world.keeper._moved_at = 0.0
    leases, _ = await world.leases()
    await world.keeper._give_up(leases, world.now)
    assert len(world.owned) == 7
    assert LONG in world.owned
    await again


async def test_what_is_undelivered_has_its_place_before_a_turn_goes_on(world: World) -> None:
    world.load_takes_s = lambda _: 0.0
    world.pending[LONG] = [pending(1, str(LONG), (b"t" * 16, 1, 1))]
    await world.rounds()
    assert said_of(world, LONG) == [f"adopt {LONG}", f"resume {LONG}", f"attach {LONG}"]


def a_partition_found(rows: list[PendingRow]) -> tuple[Engine, Partition, Found]:
    engine, found = Engine(), Found()
    found.add(rows)
    partition = Partition(LONG, uuid4(), 1, 0, 0, Cursor(), 0)
    engine.state.partitions[LONG] = partition
    return engine, partition, found


def lost_after(slices: int) -> Callable[[Engine, Partition, Found], None]:
    def loses(engine: Engine, partition: Partition, found: Found) -> None:
        restoring = restore_sessions(engine.state, engine.runner, partition, found)
        for _ in range(slices):
            next(restoring)
        engine.runner.end_terms(engine.state.forget_partition(partition))
        assert list(restoring) == []

    return loses


@pytest.mark.parametrize("slices", [1, 2, 3])
async def test_of_turns_that_were_not_resumed_nothing_is_counted(slices: int) -> None:
    runs = [pending(n, f"runs{n}", (n.to_bytes(16), n, n)) for n in range(1, 2 * SLICE + 1)]
    waits = [pending(2 * SLICE + n, f"waits{n}") for n in range(1, 2 * SLICE + 1)]
    engine, partition, found = a_partition_found(waits + runs)
    lost_after(slices)(engine, partition, found)
    assert engine.state.running == {}
    assert engine.state.scheduler.running == engine.state.scheduler.waiting == 0
    assert engine.state.mailbox.waiting == 0
    assert partition.sessions == {}


async def test_turns_that_run_have_their_places_before_others_start() -> None:
    runs = [pending(2 * SLICE + n, f"runs{n}", (n.to_bytes(16), 2 * SLICE + n, 2 * SLICE + n)) for n in range(1, 4)]
    engine, partition, found = a_partition_found([*flood(2 * SLICE, 1), *runs])
    restoring = restore_sessions(engine.state, engine.runner, partition, found)
    next(restoring)
    assert len(engine.state.running) == 3
    assert engine.state.mailbox.waiting == SLICE - 3
