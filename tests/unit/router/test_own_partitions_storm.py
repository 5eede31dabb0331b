"""The lease keeper in a storm: whatever fails, and in whatever order, it has its partitions in the end, in one hand at
a time, and each death of an owner is one strike.
"""

import random
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

import pytest

from services.router.application.group import FenceLost, StoreLost
from services.router.application.own_partitions import LEASE_S, SETTLED_S, TAKES_AT_ONCE
from services.router.application.ports import AcquiredRow, LeaseRow, PendingRow
from services.router.application.restore_sessions import SLICE
from services.router.domain.partition import Partition
from tests.unit.router.test_own_partitions import ME, World, pending, running

OTHER: Final = "router-1"
PARTITIONS: Final = 8
STEPS: Final = 60


class Storm(World):
    """A database that fails at random, and another router that takes, dies and leaves."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(PARTITIONS, monkeypatch)
        self.dice = random.Random(seed)
        self.trouble = 0.0
        self.deaths: dict[int, bool] = {}
        """Partitions that this router took and has not loaded: whether their former owner died."""
        self.routers = 2

    def fails(self) -> None:
        if self.dice.random() < self.trouble:
            raise StoreLost("as the dice say")

    async def beat(self, terms: Sequence[UUID]) -> frozenset[int]:
        self.fails()
        held = await super().beat(terms)
        self.fails()
        return held

    async def leases(self) -> tuple[list[LeaseRow], frozenset[str]]:
        self.fails()
        return await super().leases()

    async def acquire(self, partition: int, term: UUID, seen: UUID | None) -> AcquiredRow | None:
        self.fails()
        await self.lasts(self.dice.choice((0.0, 0.0, 2.0)) * (self.trouble > 0))
        row = self.rows[partition]
        if row.owner not in (None, ME) and not (row.expires_at < self.now and row.term == seen):
            return None
        if row.owner == OTHER:
            self.deaths[partition] = True
        self.deaths.setdefault(partition, False)
        taken = await super().acquire(partition, term, seen)
        self.fails()
        return taken

    async def load(self, partition: int, term: UUID, strike: bool, found: Callable[[list[PendingRow]], None]) -> None:
        self.fails()
        await self.lasts(self.dice.choice((0.0, 0.5, 5.0)) * (self.trouble > 0))
        self.fails()
        if self.rows[partition].term != term:
            raise FenceLost(frozenset({partition}))
        died = self.deaths.pop(partition)
        assert strike == (died and partition not in self.keeper._held_before), (partition, strike, died)
        await super().load(partition, term, strike, found)

    async def undelivered_channels(self, partition: int) -> list[tuple[str, str]]:
        self.fails()
        return []

    def attach(self, partition: Partition) -> None:
        assert not partition.restoring
        assert self.rows[partition.id].term == partition.term or not self.keeper.in_time or self.trouble
        super().attach(partition)

    def other_takes(self, number: int) -> None:
        """As a router does: only what is free or has run out, and its own."""
        row = self.rows[number]
        if row.owner in (None, OTHER) or row.expires_at < self.now:
            self.deaths.pop(number, None)  # who died is its strike
            if row.owner != OTHER:
                self.held_by(OTHER, number)
            row.expires_at = self.now + LEASE_S

    def never_had_them(self) -> None:
        """As if this router had never had what is not its own."""
        self.keeper._held_before -= {number for number, row in enumerate(self.rows) if row.owner != ME}

    def something(self) -> None:
        """Something happens."""
        number = self.dice.randrange(PARTITIONS)
        match self.dice.randrange(9):
            case 0 | 1:
                self.other_takes(number)
            case 2:  # the other leaves
                self.never_had_them()
                for row in self.rows:
                    if row.owner == OTHER:
                        row.owner, row.expires_at = None, float("-inf")
            case 3:
                self.keeper.end_all("store_lost")
            case 4:
                self.keeper.end_fenced(frozenset({number}))
            case 5:
                self.now += self.dice.choice((0.5, 2.0, LEASE_S + 0.1))  # it stands still
            case 6:
                self.trouble = self.dice.choice((0.0, 0.1, 0.5))
            case 7:
                self.routers = self.dice.choice((1, 2))
            case _:
                self.never_had_them()


@pytest.mark.parametrize("seed", range(8))
async def test_after_a_storm_everything_is_taken_and_each_death_was_one_strike(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Storm(seed, monkeypatch)
    for number in range(0, PARTITIONS, 3):
        world.pending[number] = [pending(place, f"s{number}-{place}") for place in range(1, 2 * SLICE + 3)]
    async with running(world):
        for _ in range(STEPS):
            world.something()
            await world.goes_on(world.dice.choice((0.25, 0.5, 1.0)))
            assert len(world.keeper._takes) <= TAKES_AT_ONCE
        world.trouble, world.routers = 0.0, 1
        for row in world.rows:
            if row.owner == OTHER:  # it died
                row.expires_at = world.now - 1
        await world.goes_on(SETTLED_S + 3 * LEASE_S)
        while world.keeper._takes:
            await world.goes_on(0.25)
        assert world.owned == set(range(PARTITIONS))
        held = world.state.partitions
        assert all(row.owner == ME and row.term == held[n].term for n, row in enumerate(world.rows))
        assert not any(partition.restoring for partition in held.values())
        assert world.state.mailbox.waiting == sum(len(rows) for rows in world.pending.values())
        assert not world.keeper._owed_strikes
        await world.keeper.release_all()
        assert [row.owner for row in world.rows] == [None] * PARTITIONS
        assert world.state.mailbox.waiting == world.state.scheduler.waiting == 0
