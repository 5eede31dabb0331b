"""A partition with so much pending that its load takes longer than a lease lasts: on the real tables, with a real load
that is made slow, after it has written and before it answers.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any, cast

import pytest

from services.router.adapters import store_postgres
from services.router.adapters.store_postgres import _LOAD_PAGE, PostgresLeases
from services.router.application.group import FenceLost, StoreLost
from services.router.application.own_partitions import LEASE_S, TAKES_AT_ONCE, OwnPartitions
from services.router.application.ports import PendingRow
from services.router.application.state import RouterState
from services.router.domain.partition import Partition
from soma_common.postgres.connect import COMMAND_TIMEOUT_S
from soma_common.testing.eventually import eventually
from tests.integration.router.store import LAYOUT, Store
from tests.unit.router.builders import inbound, ingest, names_in

LONG = 5
FUNCTION = "router.load_partition(integer, uuid, integer)"
LOADER = """
import asyncio, sys
from uuid import UUID
from services.router.adapters.store_postgres import PostgresLeases
dsn, number, term = sys.argv[1:]
asyncio.run(PostgresLeases(dsn, "router-8").load(int(number), UUID(term), True, lambda _: None))
"""
LOADING = "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ ' loads$' AND state <> 'idle'"


async def make_slow(store: Store, seconds: float, number: int = LONG, before: str = "RETURN QUERY") -> None:
    """Has the load of one partition take so much longer: as it is, with the rows of its running turns in its hands."""
    await make_quick(store)
    text = await store.eye.fetchval(f"SELECT pg_get_functiondef('{FUNCTION}'::regprocedure)")
    sleep = f"IF p_partition = {number} THEN PERFORM pg_sleep({seconds}); END IF;"
    assert text.count(before) == 1
    await store.eye.execute(text.replace(before, f"{sleep}\n    {before}"))


async def make_quick(store: Store) -> None:
    """Takes that back."""
    text = await store.eye.fetchval(f"SELECT pg_get_functiondef('{FUNCTION}'::regprocedure)")
    lines = [line for line in text.splitlines() if "pg_sleep" not in line]
    await store.eye.execute("\n".join(lines))


class Router:
    """A router's lease keeper on the real store; of the rest of a router, it has what the keeper asks for."""

    def __init__(self, store: Store, name: str) -> None:
        self.leases = PostgresLeases(store.database.dsn("router"), name)
        self.state = RouterState(LAYOUT, cast(Any, None), 100, 100)
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        self.ended: list[int] = []
        self.resumed: list[bytes] = []
        world = cast(Any, self)
        self.attach = self.detach = self.adopt = self.end_terms = self.assign = nothing
        self.restore = self.apply = self.meet = self.ready = nothing
        self.arrivals = self.controls = self
        self.keeper = OwnPartitions(self.state, self.leases, world, world, world, name)
        self.leases.on_freed = self.keeper.lease_freed

    def resume(self, turn: Any) -> None:
        """A turn that runs is this router's to go on with."""
        self.resumed.append(turn.id)
        self.state.running[turn.id] = turn
        self.state.scheduler.started(turn.session.key)

    def drop(self, partition: Partition) -> None:
        """A term has ended."""
        self.ended.append(partition.id)

    @property
    def owned(self) -> set[int]:
        return set(self.state.partitions)


@asynccontextmanager
async def running(store: Store, name: str = "router-0") -> AsyncIterator[Router]:
    router = Router(store, name)
    task = asyncio.create_task(router.keeper.run())
    try:
        yield router
    finally:
        await router.keeper.release_all()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await router.leases.close()


async def dispatch_of(store: Store) -> tuple[int, int]:
    """(dispatch, strikes) of the one turn that runs."""
    row = await store.eye.fetchrow("SELECT dispatch, strikes FROM router.turns")
    assert row is not None
    return row["dispatch"], row["strikes"]


async def with_a_turn(store: Store, number: int = LONG) -> Partition:
    """A partition in which a turn runs, whose owner is gone."""
    partition = await store.take(number, "router-9")
    await store.started(partition, inbound(names_in(number, 1)[0]), 1)
    await store.leases.release([])
    await store.eye.execute("UPDATE router.leases SET owner = NULL, expires_at = '-infinity'")
    return partition


async def begun(store: Store) -> None:
    """A load has written what it writes and sleeps."""
    sleeping = LOADING + " AND wait_event = 'PgSleep'"

    async def sleeps() -> bool:
        return cast(int, await store.eye.fetchval(sleeping)) > 0

    await eventually(sleeps, 5)


async def nobody_loads(store: Store) -> bool:
    return cast(int, await store.eye.fetchval(LOADING)) == 0


async def test_a_load_longer_than_a_lease_ends_no_term_and_is_robbed_by_nobody(store: Store) -> None:
    """Nor does it end where another statement would be given up."""
    await with_a_turn(store)
    await make_slow(store, max(LEASE_S, COMMAND_TIMEOUT_S) + 0.5)
    async with running(store) as router:
        await eventually(lambda: router.owned == set(range(8)) - {LONG}, 2)
        async with running(store, "router-1") as other:
            while LONG not in router.owned:
                assert LONG not in other.owned
                assert router.keeper.in_time
                await asyncio.sleep(0.05)
            lease = (await store.leases.leases())[0][LONG]
            assert (lease.owner, lease.expired) == ("router-0", False)
            assert len(router.resumed) == 1
            await eventually(lambda: set(router.ended) <= other.owned, 2, "what ended was given to the other")
    assert await dispatch_of(store) == (2, 0)


async def test_a_heartbeat_does_not_wait_for_loads(store: Store) -> None:
    await make_slow(store, 20)
    terms = [(await store.take(number)).term for number in range(8)]
    loads = [
        asyncio.create_task(store.leases.load(LONG, terms[LONG], False, lambda _: None))
        for _ in range(TAKES_AT_ONCE + 1)
    ]
    await begun(store)
    began = monotonic()
    assert await store.leases.beat(terms) == set(range(8))
    assert len((await store.leases.leases())[0]) == 8
    assert monotonic() - began < 1
    assert await store.eye.fetchval(LOADING) == TAKES_AT_ONCE, "more than so many are not loaded at a time"
    for load in loads:
        load.cancel()
    await asyncio.gather(*loads, return_exceptions=True)


async def test_a_load_has_an_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_postgres, "LOAD_S", 0.5)
    await with_a_turn(store)
    await make_slow(store, 20)
    partition = await store.take(LONG)
    with pytest.raises(StoreLost):
        await store.load(partition, strike=True)
    await eventually(partial(nobody_loads, store), 2)
    assert await dispatch_of(store) == (1, 0)


async def test_a_load_that_is_cancelled_leaves_nothing_behind(store: Store) -> None:
    await with_a_turn(store)
    await make_slow(store, 20)
    partition = await store.take(LONG)
    load = asyncio.create_task(store.leases.load(LONG, partition.term, True, lambda _: None))
    await begun(store)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert await dispatch_of(store) == (1, 0), "neither another dispatch nor a strike"
    await make_quick(store)
    async with asyncio.timeout(1.5):  # its rows are free: nobody waits until a lock times out
        rows = await store.load(partition, strike=True)
    assert [row.dispatch for row in rows] == [2]
    assert await dispatch_of(store) == (2, 1)


async def test_a_load_whose_router_died_does_not_stand_in_the_way_of_the_next(store: Store) -> None:
    """The server computes; that its client is gone it would notice when it answers."""
    await with_a_turn(store)
    await make_slow(store, 20)
    partition = await store.take(LONG)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LOADER, store.database.dsn("router"), str(LONG), str(partition.term)),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    await begun(store)
    process.kill()
    await process.wait()
    await eventually(partial(nobody_loads, store), LEASE_S)
    assert await dispatch_of(store) == (1, 0)


async def test_a_load_whose_connection_is_lost_is_begun_again_and_ends_no_other_term(store: Store) -> None:
    await with_a_turn(store)
    await make_slow(store, 20)
    async with running(store) as router:
        await eventually(lambda: router.owned == set(range(8)) - {LONG}, 2)
        await begun(store)
        await make_quick(store)
        await store.eye.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'router-0 loads'"
        )
        await eventually(lambda: router.owned == set(range(8)), 3)
        assert router.ended == []
        assert len(router.resumed) == 1
    assert await dispatch_of(store) == (2, 0)


async def test_a_term_lost_while_loading_ends_the_load(store: Store) -> None:
    await with_a_turn(store)
    await make_slow(store, 20)
    async with running(store) as router:
        await eventually(lambda: router.owned == set(range(8)) - {LONG}, 2)
        await begun(store)
        await store.eye.execute(
            "UPDATE router.leases SET owner = 'router-1', term = gen_random_uuid(),"
            " expires_at = clock_timestamp() + interval '1 hour' WHERE partition = $1",
            LONG,
        )
        await eventually(lambda: not router.keeper._takes, 3)
        await eventually(partial(nobody_loads, store), 1)
        assert router.owned == set(range(8)) - {LONG}
        assert not router.ended
        assert not router.resumed
    assert await dispatch_of(store) == (1, 0)


async def test_who_stops_in_a_load_hands_the_partition_over_at_once(store: Store) -> None:
    await with_a_turn(store)
    await make_slow(store, 20)
    async with running(store) as router, running(store, "router-1") as other:
        await eventually(lambda: len(router.owned | other.owned) == 7, 3)
        await begun(store)
        loading, next_ = (router, other) if LONG in router.keeper._takes else (other, router)
        await make_quick(store)
        began = monotonic()
        await loading.keeper.release_all()
        await eventually(lambda: next_.owned == set(range(8)), 2)
        assert monotonic() - began < 2
        assert len(next_.resumed) == 1
    assert await dispatch_of(store) == (2, 0), "once, and nobody was struck"


async def test_pages_are_of_one_moment_and_in_order(store: Store) -> None:
    partition = await store.take(LONG)
    names = names_in(LONG, 3)
    count = 2 * _LOAD_PAGE + 1
    items = [inbound(names[number % 3], f"k{number}") for number in range(count)]
    for first in range(0, count, 500):
        await store.commit(ingest(partition, first + 1, *items[first : first + 500]))
    pages: list[list[PendingRow]] = []
    committing: list[asyncio.Task[Any]] = []

    def found(page: list[PendingRow]) -> None:
        pages.append(page)
        if len(pages) == 1:
            committing.append(asyncio.create_task(_more(store, partition, names[0], count)))

    await store.leases.load(LONG, partition.term, False, found)
    await asyncio.gather(*committing)
    assert [len(page) for page in pages] == [_LOAD_PAGE, _LOAD_PAGE, 1]
    assert [row.position for page in pages for row in page] == list(range(1, count + 1))
    assert len(await store.load(partition)) == count + 1


def _more(store: Store, partition: Partition, name: str, seq: int) -> Coroutine[Any, Any, Any]:
    return store.commit(ingest(partition, seq + 1, inbound(name, "more")))


async def test_a_page_that_is_exactly_full_is_not_the_last(store: Store) -> None:
    partition = await store.take(LONG)
    name = names_in(LONG, 1)[0]
    await store.commit(ingest(partition, 1, *(inbound(name, f"k{number}") for number in range(_LOAD_PAGE))))
    pages: list[int] = []
    await store.leases.load(LONG, partition.term, False, lambda page: pages.append(len(page)))
    assert pages == [_LOAD_PAGE, 0]


async def test_a_load_under_another_term_is_fenced_and_the_connection_goes_on(store: Store) -> None:
    partition = await store.take(LONG)
    await store.take(LONG)
    with pytest.raises(FenceLost):
        await store.load(partition)
    assert await store.leases.undelivered_channels(LONG) == []


async def test_a_load_that_was_overtaken_by_the_next_owners_changes_nothing(store: Store) -> None:
    """Its term was current when it began. What it writes then is neither a strike nor a dispatch that nobody has."""
    await with_a_turn(store)
    await make_slow(store, 2, before="UPDATE router.turns t")
    partition = await store.take(LONG)
    load = asyncio.create_task(store.leases.load(LONG, partition.term, True, lambda _: None))
    await begun(store)
    await make_quick(store)
    again = await store.take(LONG)
    assert [row.dispatch for row in await store.load(again, strike=True)] == [2]
    with pytest.raises(FenceLost):
        await load
    assert await dispatch_of(store) == (2, 1)


async def test_a_take_begins_on_a_new_connection_if_the_last_was_lost_unused(store: Store) -> None:
    """Nothing goes on there: it needs no second try."""
    partition = await store.take(LONG)
    await store.load(partition)
    await store.eye.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'router-0 loads'"
    )

    used = store.leases._loads._free[-1]._connection
    assert used is not None
    await eventually(used.is_closed)
    row = await store.leases.acquire(LONG, partition.term, None)
    assert row is not None
