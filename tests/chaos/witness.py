"""Outside witnesses of what routers do to PostgreSQL and say on the bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import asyncpg
from nats.aio.msg import Msg
from soma.router.v1.outbound_pb2 import OutBatch

from soma_common.nats.connection import connect_nats
from somastack.parts import NatsPart
from tests.chaos.stack import FaultyStack
from tests.stalls import Stalls

_COMMIT_WITNESS: Final = """
CREATE SCHEMA IF NOT EXISTS witness;
CREATE UNLOGGED TABLE IF NOT EXISTS witness.commits (
    number bigint GENERATED ALWAYS AS IDENTITY, at double precision, partition integer, term uuid, writer text
);
CREATE OR REPLACE FUNCTION witness.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO witness.commits (at, partition, term, writer) VALUES (
        extract(epoch FROM clock_timestamp()), NEW.id, NEW.term, current_setting('application_name'));
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER witness AFTER UPDATE ON router.partitions FOR EACH ROW EXECUTE FUNCTION witness.note();
"""
"""Every transaction of an owner updates its partition's row: the trigger's rows roll back with those that fail."""

_LONGEST_TRANSACTION: Final = """
SELECT coalesce(extract(epoch FROM max(clock_timestamp() - xact_start)), 0)::float
FROM pg_stat_activity WHERE application_name LIKE $1
  AND pid IN (SELECT pid FROM pg_locks WHERE granted AND mode <> 'AccessShareLock' AND locktype <> 'virtualxid')
"""


@dataclass(frozen=True, slots=True)
class Commit:
    """One transaction of a partition's owner. `at` is in seconds since the epoch, `writer` names its connection."""

    at: float
    partition: int
    term: str
    writer: str


class CommitWitness:
    """Records every commit of every partition, inside PostgreSQL, and looks at who holds locks."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection
        self.longest_lock_s = 0.0

    def close(self) -> None:
        """Give the connection up."""
        self._connection.terminate()

    async def commits(self) -> list[Commit]:
        """All commits so far, in the order in which each partition's row was locked."""
        rows = await self._connection.fetch("SELECT at, partition, term, writer FROM witness.commits ORDER BY number")
        return [Commit(row["at"], row["partition"], str(row["term"]), row["writer"]) for row in rows]

    async def watch_locks(self, router: str, seconds: float, stalls: Stalls) -> None:
        """Look ten times a second for how long the connections of a router have held a lock, but for the time in which
        the machine stood still.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            held_s = float(await self._connection.fetchval(_LONGEST_TRANSACTION, f"{router} %"))
            held_s -= stalls.since(time.monotonic() - held_s)
            self.longest_lock_s = max(self.longest_lock_s, held_s)
            await asyncio.sleep(0.1)


@dataclass
class Speech:
    """What routers said to gateways: (seconds since the epoch, deliveries, live events) by router."""

    batches: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)

    async def heard(self, message: Msg) -> None:
        """Note one batch."""
        batch = OutBatch.FromString(message.data)
        entry = (time.time(), len(batch.deliveries), len(batch.live))
        self.batches.setdefault(batch.router, []).append(entry)


@asynccontextmanager
async def commit_witness(stack: FaultyStack) -> AsyncIterator[CommitWitness]:
    """Watch the commits of a stack from here to the end of the block."""
    connection = await stack.database()
    try:
        await connection.execute(_COMMIT_WITNESS)
        yield CommitWitness(connection)
        await connection.execute("DROP TRIGGER witness ON router.partitions; DROP SCHEMA witness CASCADE")
    finally:
        connection.terminate()


@asynccontextmanager
async def speech_witness(stack: FaultyStack) -> AsyncIterator[Speech]:
    """Listen to everything that routers say to gateways, from here to the end of the block."""
    nats = stack.parts["nats"]
    assert isinstance(nats, NatsPart)
    client = await connect_nats(nats.server.url, nats.server.token_file, "witness-0")
    try:
        speech = Speech()
        await client.subscribe("soma.*.out.*", cb=speech.heard)
        await client.flush()
        yield speech
    finally:
        await client.close()


def zombies_words(commits: list[Commit], speech: Speech, router: str, woken_at: float) -> list[tuple[float, int, int]]:
    """What a router that was frozen and replaced said from its waking up (seconds since the epoch) to the moment at
    which it held a partition again. That may be what was behind its last look at the lease when it froze, in its hand
    or in the socket's buffer: a batch for each tenant.
    """
    back_at = min(c.at for c in commits if c.writer.startswith(f"{router} ") and c.at > woken_at)
    return [entry for entry in speech.batches.get(router, []) if woken_at < entry[0] < back_at]


def terms_that_came_back(commits: list[Commit]) -> list[Commit]:
    """Commits under a term after another term had committed to the same partition: there may be none."""
    present: dict[int, str] = {}
    over: dict[int, set[str]] = {}
    wrong = []
    for commit in commits:
        former = present.get(commit.partition)
        if former != commit.term and former is not None:
            over.setdefault(commit.partition, set()).add(former)
        present[commit.partition] = commit.term
        if commit.term in over.get(commit.partition, ()):
            wrong.append(commit)
    return wrong
