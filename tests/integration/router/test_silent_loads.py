"""Loads over a connection that is there and says nothing: a host that is gone, a flow that a firewall has forgotten."""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from services.router.adapters import store_postgres
from services.router.adapters.store_postgres import PostgresLeases
from services.router.application.group import StoreLost
from soma_common.testing.eventually import eventually
from tests.chaos.fault_proxy import HOST, Address, FaultLink, FaultProxy
from tests.integration.router.store import Store
from tests.integration.router.test_long_loads import LONG, begun, dispatch_of, make_slow, nobody_loads, with_a_turn


@pytest.fixture
async def link(store: Store) -> AsyncIterator[FaultLink]:
    """What is between a router and the database."""
    async with FaultProxy() as proxy:
        yield await proxy.open(
            "router-0", "postgres", Address(path=str(store.database.server.socket_directory / ".s.PGSQL.5432"))
        )


def leases_over(link: FaultLink, store: Store) -> PostgresLeases:
    return PostgresLeases(
        f"postgresql:///{store.database.name}?host={HOST}&port={link.port}&user=soma_router", "router-0"
    )


@pytest.mark.parametrize("given_up", ["cancelled", "in its time"])
async def test_a_load_that_hears_nothing_any_more_has_an_end(
    store: Store, link: FaultLink, monkeypatch: pytest.MonkeyPatch, given_up: str
) -> None:
    if given_up == "in its time":
        monkeypatch.setattr(store_postgres, "LOAD_S", 1.0)
    await with_a_turn(store)
    await make_slow(store, 20)
    partition = await store.take(LONG)
    leases = leases_over(link, store)
    load = asyncio.create_task(leases.load(LONG, partition.term, True, lambda _: None))
    await begun(store)
    link.blackhole()
    if given_up == "cancelled":
        load.cancel()
    await asyncio.wait([load], timeout=3)
    assert load.done()
    with pytest.raises(asyncio.CancelledError if given_up == "cancelled" else StoreLost):
        await load
    link.heal()
    await eventually(lambda: nobody_loads(store), 3)
    assert await dispatch_of(store) == (1, 0)
    assert await leases.undelivered_channels(LONG) == []
    await leases.close()


async def test_a_take_does_not_begin_on_a_connection_that_was_not_used_for_long(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days may lie between two takes, and firewalls forget what says nothing."""

    async def backend() -> object:
        assert await store.leases.acquire(LONG, uuid4(), None) is not None
        loads = "SELECT pid FROM pg_stat_activity WHERE application_name = 'router-0 loads' ORDER BY backend_start DESC"
        return await store.eye.fetchval(loads)

    first = await backend()
    assert await backend() == first
    monkeypatch.setattr(store_postgres, "_STALE_S", 0.0)
    assert await backend() != first
