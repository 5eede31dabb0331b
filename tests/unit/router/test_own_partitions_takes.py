"""Takes that fail: none stands in another's way, and nobody is struck for it."""

from collections.abc import Callable
from uuid import UUID

import pytest

from services.router.application.group import StoreLost
from services.router.application.own_partitions import TAKES_AT_ONCE
from services.router.application.ports import AcquiredRow, PendingRow
from tests.unit.router.test_own_partitions import World, running


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(8, monkeypatch)


async def test_partitions_that_cannot_be_loaded_keep_no_others_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = world.load
    broken = set(range(TAKES_AT_ONCE))

    async def fails(partition: int, term: UUID, strike: bool, found: Callable[[list[PendingRow]], None]) -> None:
        if partition in broken:
            raise StoreLost("a page is damaged")
        await load(partition, term, strike, found)

    monkeypatch.setattr(world, "load", fails)
    async with running(world):
        await world.goes_on(3)
        assert world.owned == set(range(8)) - broken
        broken.clear()
        await world.goes_on(3)
        assert world.owned == set(range(8))


async def test_blocked_partitions_have_their_next_try_behind_the_others(world: World) -> None:
    world.acquire_fails = set(range(TAKES_AT_ONCE))
    world.acquire_takes_s = lambda number: 2.0 if number in world.acquire_fails else 0.0
    world.load_takes_s = lambda _: 0.5
    async with running(world):
        await world.goes_on(2 + 0.5 * 6 / TAKES_AT_ONCE + 1)
        assert world.owned == set(range(8)) - world.acquire_fails


async def test_it_is_ready_when_all_is_taken_that_is_quickly_taken(world: World) -> None:
    async with running(world):
        assert world.owned == set(range(8))


def unheard(world: World, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The next time that a partition is taken, the connection breaks before the answer."""
    acquire, broken = world.acquire, {number}

    async def breaks(partition: int, term: UUID, seen: UUID | None) -> AcquiredRow | None:
        row = await acquire(partition, term, seen)
        if partition in broken:
            broken.clear()
            raise StoreLost("the connection broke")
        return row

    monkeypatch.setattr(world, "acquire", breaks)


async def test_nobody_is_struck_if_it_is_not_heard_that_a_free_partition_was_taken(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    unheard(world, monkeypatch, 3)
    await world.rounds(4)
    assert world.owned == set(range(8))
    assert world.asked_strikes == 0


async def test_a_death_is_a_strike_although_it_is_not_heard_that_the_partition_was_taken(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    unheard(world, monkeypatch, 3)
    world.held_by("router-1", 3, for_s=-1)
    await world.rounds(20)
    assert world.owned == set(range(8))
    assert world.asked_strikes == 1
