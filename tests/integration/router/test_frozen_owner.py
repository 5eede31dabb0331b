"""An owner that is frozen at any moment holds its partition's row for a second at most, and wakes up fenced off.

A group is one statement, sent in one piece and answered in one: between the lock and the commit the server waits for
nothing that the client would have to do. So nobody can stop a router "between two statements of a transaction"; what
can be done is shown: a client that opened a transaction by hand loses it after a second, a frozen writer's group is
committed without it.
"""

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from uuid import uuid4

import asyncpg
import pytest

from services.router.adapters.store_postgres import _WRITER_SETTINGS, PostgresLeases
from services.router.domain.partition import Partition
from soma_common.postgres.connect import CONNECTION_LOST, connect
from soma_common.testing.eventually import eventually
from tests.integration.router.store import Store


@asynccontextmanager
async def zombie(
    store: Store, owner: Partition, messages: int, *more: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A writer process that holds `owner`'s term."""
    arguments = [store.database.dsn("router"), str(owner.term), str(messages), *more]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.integration.router.zombie", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(10):
        return (await process.stdout.readline()).decode().strip()


async def take_over(store: Store, owner: Partition) -> float:
    """Takes the partition from the frozen owner; returns how long it had to wait for the row, in seconds."""
    await store.eye.execute("UPDATE router.leases SET expires_at = '-infinity' WHERE partition = 0")
    other = PostgresLeases(store.database.dsn("router"), "router-1")
    await other.leases()  # connects
    began = monotonic()
    row = await other.acquire(0, uuid4(), owner.term)
    waited = monotonic() - began
    await other.close()
    assert row is not None, "the frozen owner holds the row"
    return waited


async def test_an_open_transaction_of_a_frozen_client_is_over_after_a_second(store: Store) -> None:
    owner = await store.take(0)
    frozen = await connect(store.database.dsn("router"), **_WRITER_SETTINGS)  # type: ignore[arg-type]
    await frozen.execute("BEGIN")
    await frozen.execute("UPDATE router.partitions SET head = head WHERE id = 0")
    assert await take_over(store, owner) < 1.5
    with pytest.raises((*CONNECTION_LOST, asyncpg.PostgresError)):
        await frozen.execute("COMMIT")


@pytest.mark.parametrize("seed", range(4))
async def test_a_writer_frozen_at_any_moment_holds_nothing_and_wakes_up_fenced_off(store: Store, seed: int) -> None:
    owner = await store.take(0)
    async with zombie(store, owner, messages=20) as process:
        assert await line(process) == "ready"
        assert await line(process) == "written 1"
        await asyncio.sleep(random.Random(seed).uniform(0, 0.05))
        process.send_signal(signal.SIGSTOP)
        assert await take_over(store, owner) < 1.0
        written = len(await store.rows("messages", "partition, position"))
        process.send_signal(signal.SIGCONT)
        said = "written"
        while said.startswith("written"):
            said = await line(process)
        assert said == "FenceLost"
    assert len(await store.rows("messages", "partition, position")) == written, "it wrote after it was robbed"


@pytest.mark.parametrize("messages", [1, 500, 2000])
async def test_a_writer_that_reads_no_answer_holds_nothing(store: Store, messages: int) -> None:
    """The answer to a group may be larger than the socket takes: the server then waits for the client to read it, and
    must not hold the row meanwhile.
    """
    owner = await store.take(0)
    async with zombie(store, owner, messages, "once") as process:
        assert await line(process) == "ready"
        await eventually(lambda: is_frozen(process.pid), timeout_s=10)
        await eventually(partial(is_waiting_for_its_client, store), timeout_s=10)
        assert await take_over(store, owner) < 1.5


def is_frozen(pid: int) -> bool:
    """Whether a process is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def is_waiting_for_its_client(store: Store) -> bool:
    """Whether the server has done what it can for the zombie."""
    state = "SELECT wait_event_type FROM pg_stat_activity WHERE application_name = 'zombie writer'"
    return bool(await store.eye.fetchval(state) == "Client")
