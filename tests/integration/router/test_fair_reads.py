"""Reads of the API: a tenant that asks for very much at once waits for itself, and is told so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.router.adapters.api_messages import unavailable
from services.router.adapters.history_postgres import PostgresHistory
from services.router.application.group import StoreLost
from soma_common.errors import ResourceExhausted, reason_name
from soma_common.testing.embedded import Database
from tests.integration.router.store import Store
from tests.unit.router.builders import inbound

TURNS = 300
BOUND = 120
ID = inbound("s").session_id


@pytest.fixture
async def reader(store: Store, postgres: Database) -> AsyncIterator[PostgresHistory]:
    """A router's reader for its API; the tenant "flood" has turns to list."""
    await store.eye.execute(
        "INSERT INTO router.turns (turn_id, session_id, partition, tenant, number, first_position, last_position,"
        " status, outcome, step_count, agent_revision, end_time)"
        " SELECT sha256(p::text::bytea), $1, 0, 'flood', p, p, p, 3, 1, 1, 'r', now() FROM generate_series(1, $2) p",
        ID,
        TURNS,
    )
    await store.eye.execute(
        "INSERT INTO router.sessions (session_id, partition, tenant, agent, channel, session, done_position,"
        " turn_count) VALUES ($1, 0, 'flood', 'a', 'c', 's', $2, $2)",
        ID,
        TURNS,
    )
    history = await PostgresHistory.open(
        postgres.dsn("router"), "asked", tenant_reads=BOUND, bound="router.tenant_reads"
    )
    yield history
    await history.close()


async def listing(reader: PostgresHistory) -> int:
    return len(await reader.tenant_turns("flood", None, None, TURNS))


async def test_a_read_does_not_wait_behind_those_of_another_tenant(reader: PostgresHistory) -> None:
    flood = [asyncio.create_task(listing(reader)) for _ in range(BOUND)]
    await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
    before = sum(task.done() for task in flood)
    assert before < BOUND // 2, "the flood is under way"
    assert await reader.session("other", ID) is None
    behind = sum(task.done() for task in flood) - before
    assert behind < BOUND // 4, "the other tenant's read was one of the next"
    assert await asyncio.gather(*flood) == [TURNS] * BOUND


async def test_too_many_reads_are_refused_and_take_nothing(reader: PostgresHistory) -> None:
    reads = [asyncio.create_task(listing(reader)) for _ in range(BOUND + 20)]
    ended = await asyncio.gather(*reads, return_exceptions=True)
    refused = [end for end in ended if isinstance(end, BaseException)]
    assert len(refused) == 20 - 3, "three have a connection, the others of the bound wait"
    for error in refused:
        assert isinstance(error, StoreLost)
        said = unavailable(error)
        assert isinstance(said, ResourceExhausted)
        assert reason_name(said.reason) == "QUEUE_FULL"
        assert said.metadata["bound"] == "router.tenant_reads"
    assert await listing(reader) == TURNS
