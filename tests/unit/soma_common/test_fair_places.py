"""Places that tenants take in turns: who is served next, who is refused, and that no place is ever lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from soma_common.errors import ResourceExhausted, reason_name
from soma_common.fair_places import FairPlaces


class Readers:
    """Tasks that hold a place until they are let go, and who got one when."""

    def __init__(self, places: FairPlaces) -> None:
        self.places = places
        self.served: list[str] = []
        self._holding: list[tuple[str, asyncio.Event]] = []

    def ask(self, tenant: str, timeout_s: float = 30.0) -> asyncio.Task[None]:
        return asyncio.create_task(self._read(tenant, timeout_s))

    async def end_one(self, tenant: str | None = None) -> None:
        """The read of longest ends, or that tenant's."""
        at = next(n for n, (whose, _) in enumerate(self._holding) if tenant in (None, whose))
        self._holding.pop(at)[1].set()
        await settled()

    @property
    def holding(self) -> Counter[str]:
        return Counter(tenant for tenant, _ in self._holding)

    async def _read(self, tenant: str, timeout_s: float) -> None:
        async with self.places.taken(tenant, timeout_s):
            self.served.append(tenant)
            done = asyncio.Event()
            held = (tenant, done)
            self._holding.append(held)
            try:
                await done.wait()
            finally:
                if held in self._holding:
                    self._holding.remove(held)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def stopped(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def fair(places: int = 4, of_tenant: int = 3, waiting: int = 50) -> FairPlaces:
    return FairPlaces(places, of_tenant=of_tenant, waiting=waiting, bound="router.tenant_reads")


async def test_one_tenant_never_has_all_places() -> None:
    readers = Readers(fair())
    tasks = [readers.ask("flood") for _ in range(20)]
    await settled()
    assert readers.holding == {"flood": 3}
    tasks.append(readers.ask("other"))
    await settled()
    assert readers.holding == {"flood": 3, "other": 1}
    await stopped(tasks)


async def test_tenants_that_wait_are_served_in_turn() -> None:
    readers = Readers(fair())
    tasks = [readers.ask("flood") for _ in range(20)]
    tasks += [readers.ask(f"t{number}") for number in range(3) for _ in range(2)]
    await settled()
    for _ in range(8):
        await readers.end_one()
    first = readers.served[4:12]
    assert {"t0", "t1", "t2"} <= set(first[:4]), first
    assert Counter(readers.served)["t2"] == 2, "nobody's second comes after all of the flood"
    await stopped(tasks)


async def test_a_line_of_a_tenant_is_bounded() -> None:
    readers = Readers(fair(places=1, of_tenant=1, waiting=2))
    tasks = [readers.ask("a") for _ in range(3)]
    await settled()
    refused, other = readers.ask("a"), readers.ask("b")
    await settled()
    error = refused.exception()
    assert isinstance(error, ResourceExhausted)
    assert reason_name(error.reason) == "QUEUE_FULL"
    assert error.metadata == {"bound": "router.tenant_reads", "value": "2"}
    assert not other.done()
    await stopped([*tasks, other])


async def test_who_waits_too_long_leaves_the_line() -> None:
    readers = Readers(fair(places=1, of_tenant=1))
    first = readers.ask("a")
    await settled()
    with pytest.raises(TimeoutError):
        await readers.ask("b", timeout_s=0.01)
    await readers.end_one()
    await first
    second = readers.ask("c")
    await settled()
    assert readers.holding == {"c": 1}, "the place was not kept for who had left"
    await stopped([second])


async def test_a_place_that_comes_as_its_taker_leaves_goes_on() -> None:
    readers = Readers(fair(places=1, of_tenant=1))
    first, leaving, last = readers.ask("a"), readers.ask("b"), readers.ask("c")
    await settled()
    readers._holding[0][1].set()
    await asyncio.sleep(0)  # `first` goes on, and gives its place to `leaving`
    leaving.cancel()
    await asyncio.gather(first, leaving, return_exceptions=True)
    await settled()
    assert readers.served == ["a", "c"]
    await stopped([last])


@pytest.mark.parametrize("seed", range(20))
async def test_no_place_is_lost_or_made(seed: int) -> None:
    dice = random.Random(seed)
    readers = Readers(fair(places=3, of_tenant=2, waiting=4))
    tasks: list[asyncio.Task[None]] = []
    for _ in range(300):
        chance = dice.random()
        if chance < 0.5:
            tasks.append(readers.ask(dice.choice("abcd"), timeout_s=dice.choice([0.0, 30.0])))
        elif chance < 0.75 and readers.holding:
            readers._holding.pop(dice.randrange(len(readers._holding)))[1].set()
        elif tasks:
            dice.choice(tasks).cancel()
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        assert readers.holding.total() <= 3
        assert all(held <= 2 for held in readers.holding.values())
    await stopped(tasks)
    last = [readers.ask(tenant) for tenant in "abc"]
    await settled()
    assert readers.holding == {"a": 1, "b": 1, "c": 1}, "all places are there"
    assert not readers.places._lines
    await stopped(last)
    assert not readers.places._held
