"""A real standby: lanes keep what it has not on its disk."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from soma_common.embedded.postgres import PostgresConfig, binary
from soma_common.testing.embedded import FaultyPostgres, soma_database
from soma_common.testing.eventually import eventually
from tests.integration.router.store import Store, open_store
from tests.unit.router.builders import inbound, ingest


@pytest.fixture
async def primary(own_postgres: FaultyPostgres) -> AsyncIterator[Store]:
    async with open_store(soma_database(own_postgres)) as store:
        yield store


@pytest.fixture
async def standby(own_postgres: FaultyPostgres, primary: Store, tmp_path: Path) -> AsyncIterator[FaultyPostgres]:
    """A standby that follows; it copies what the primary has so far."""
    server = FaultyPostgres(PostgresConfig(tmp_path / "standby", durable=False, shared_buffers_mb=32))
    server.data_directory.parent.mkdir(mode=0o700)
    copy: list[str | Path] = ["-d", own_postgres.dsn(), "-D", server.data_directory, "-R", "-X", "stream", "-c", "fast"]
    copying = await asyncio.create_subprocess_exec(binary("pg_basebackup"), *copy)
    assert await copying.wait() == 0
    await server.start()
    yield server
    server.sigcont()
    await server.stop()


async def test_what_a_standby_has_not_on_its_disk_is_known(primary: Store, standby: FaultyPostgres) -> None:
    await primary.eye.execute("GRANT pg_read_all_stats TO soma_router")
    await eventually(lambda: follows(primary), 10, "the standby has everything")
    owner = await primary.take(0)
    standby.sigstop()
    before = await primary.history.committed_place()
    await primary.commit(ingest(owner, 1, inbound()))
    after = await primary.history.committed_place()
    assert after.flushed is not None
    assert after.flushed <= before.written < after.written
    standby.sigcont()
    await eventually(lambda: follows(primary), 10, "the standby has everything")


async def test_a_standby_that_may_not_be_looked_at_has_nothing(primary: Store, standby: FaultyPostgres) -> None:
    async def is_there() -> bool:
        return (await primary.history.committed_place()).flushed is not None

    await eventually(is_there, 10, "the standby is connected")
    assert (await primary.history.committed_place()).flushed == 0


async def follows(primary: Store) -> bool:
    place = await primary.history.committed_place()
    return place.flushed is not None and place.flushed >= place.written
