"""The configuration as a feed: complete copies, and the change log followed as it grows.

Changes are noticed by NOTIFY, and at the latest `POLL_S` later by looking. The log is followed on one connection of its
own. When that connection is lost, the database may be another one when it comes back (a failover may have lost the last
changes), so every watch is ended then and starts anew with a complete copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import groupby
from typing import Final

import asyncpg
import structlog
from soma.controlplane.v1.agent_service_pb2 import Agent
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.adapters.rows import AGENT_COLUMNS, TENANT_COLUMNS, agent_from, tenant_from
from services.controlplane.adapters.store_postgres import CHANNEL, PooledConnection
from services.controlplane.application.ports import ALL_TENANTS, ConfigPart
from services.controlplane.application.watch_config import Watchers
from services.controlplane.domain.refusals import watch_again
from soma_common.errors import Unavailable
from soma_common.postgres.connect import CONNECTION_LOST, Connection, Pool
from soma_common.postgres.errors import OVERLOADED, store_errors

POLL_S: Final = 1.0
"""Longest time until a change is noticed whose notification was lost."""
RECONNECT_S: Final = 0.2
CHANGES_AT_ONCE: Final = 1000
"""Lines of the log read at once; a version is never cut in two."""
PART_BYTES: Final = 1024 * 1024
"""A piece of a complete copy is sent when it holds this much."""
MAX_COPIES_AT_ONCE: Final = 4
"""Complete copies being read at the same time; each holds a connection of the pool."""

log = structlog.get_logger(__name__)


class PostgresSnapshot:
    """A complete copy, read inside one REPEATABLE READ transaction."""

    def __init__(self, connection: PooledConnection, version: int) -> None:
        self._connection = connection
        self._version = version

    @property
    def version(self) -> int:
        """The version of the copy."""
        return self._version

    async def parts(self) -> AsyncIterator[ConfigPart]:
        """The copy in pieces of at most about a megabyte."""
        tenants: list[Tenant] = []
        async for row in self._connection.cursor(f"SELECT {TENANT_COLUMNS} FROM controlplane.tenants ORDER BY tenant"):
            tenants.append(tenant_from(row))
            if len(tenants) == CHANGES_AT_ONCE:
                yield ConfigPart(self._version, tenants=tenants)
                tenants = []
        agents: list[Agent] = []
        size = 0
        async for row in self._connection.cursor(
            f"SELECT {AGENT_COLUMNS} FROM controlplane.agents JOIN controlplane.agent_revisions"
            " USING (tenant, agent, revision) ORDER BY tenant, agent"
        ):
            agent = agent_from(row)
            agents.append(agent)
            size += agent.ByteSize()
            if size >= PART_BYTES:
                yield ConfigPart(self._version, tenants=tenants, agents=agents)
                tenants, agents, size = [], [], 0
        if tenants or agents:
            yield ConfigPart(self._version, tenants=tenants, agents=agents)


class PostgresSnapshots:
    """Where complete copies come from."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._places = asyncio.Semaphore(MAX_COPIES_AT_ONCE)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[PostgresSnapshot]:
        """Open a copy. A reader that stalls loses its transaction (idle_in_transaction_session_timeout), and with it
        the watch."""
        async with (
            self._places,
            store_errors(),
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            await connection.execute("SELECT set_config('soma.tenants', $1, true)", ALL_TENANTS)
            version = await connection.fetchval("SELECT version FROM controlplane.config_head")
            yield PostgresSnapshot(connection, version)


class ChangeFollower:
    """Follows the change log and hands what it finds to `watchers`."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        watchers: Watchers,
        poll_s: float = POLL_S,
    ) -> None:
        self._connect = connect
        self._watchers = watchers
        self._poll_s = poll_s
        self._changed = asyncio.Event()
        self.following = asyncio.Event()
        """Set while changes are noticed."""

    async def run(self) -> None:
        """Follow until cancelled; a lost connection is made again."""
        while True:
            try:
                await self._follow_once()
            except (*CONNECTION_LOST, *OVERLOADED, Unavailable) as error:
                log.warning("config.follow.interrupted", error=repr(error))
            await asyncio.sleep(RECONNECT_S)

    async def _follow_once(self) -> None:
        connection = await self._connect()
        try:
            await self._follow(connection)
        finally:
            self.following.clear()
            connection.terminate()

    async def _follow(self, connection: Connection) -> None:
        """Follow on one connection. Raises what a lost connection raises."""
        await connection.add_listener(CHANNEL, self._notified)
        await connection.execute("SELECT set_config('soma.tenants', $1, false)", ALL_TENANTS)
        seen: int = await connection.fetchval("SELECT version FROM controlplane.config_head")
        # Watches that began before this point may have missed what was changed while nobody followed.
        self._watchers.end_all(watch_again("the change log was out of reach for a while"))
        self.following.set()
        while True:
            rows = await connection.fetch(
                "SELECT version, kind, name, body FROM controlplane.config_changes WHERE version > $1"
                " ORDER BY version FETCH FIRST ($2) ROWS WITH TIES",
                seen,
                CHANGES_AT_ONCE,
            )
            for part in _parts(rows):
                if part.version != seen + 1:
                    self._watchers.end_all(watch_again("the change log has a gap"))
                seen = part.version
                self._watchers.publish(part)
            if not rows:
                await self._wait()

    async def _wait(self) -> None:
        """Until a notification comes or it is time to look."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), self._poll_s)
        self._changed.clear()

    def _notified(self, *_: object) -> None:
        self._changed.set()


def _parts(rows: list[asyncpg.Record]) -> list[ConfigPart]:
    """Lines of the change log, in order, as one part per version."""
    parts: list[ConfigPart] = []
    for version, lines in groupby(rows, key=lambda row: row["version"]):
        tenants: list[Tenant] = []
        agents: list[Agent] = []
        deleted: list[str] = []
        for line in lines:
            if line["body"] is None:
                deleted.append(line["name"])
            elif line["kind"] == "tenant":
                tenants.append(Tenant.FromString(line["body"]))
            else:
                agents.append(Agent.FromString(line["body"]))
        parts.append(ConfigPart(version, tenants, agents, deleted))
    return parts
