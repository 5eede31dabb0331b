"""Tenants and agents in PostgreSQL, schema `controlplane`.

Every change locks the row `config_head` first and holds it to its commit: changes happen one after the other, so a
check made inside a change (the etag, the emptiness of a tenant, the request id) still holds when it commits, and
versions are dense. Administration is rare; what it gives up in parallelism it gains in having no races to think
about.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import asyncpg
import orjson
from google.protobuf.json_format import MessageToDict
from soma.controlplane.v1.agent_service_pb2 import Agent
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.adapters.rows import AGENT_COLUMNS, TENANT_COLUMNS, agent_from, tenant_from
from services.controlplane.application.ports import ALL_TENANTS, Answered, Ask
from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.version import Stamp
from soma_common.postgres.connect import Pool
from soma_common.postgres.errors import store_errors

REQUEST_ID_LIFE_H: Final = 24
"""How long an answer is kept for retries."""
CHANNEL: Final = "soma_config"
"""NOTIFY channel that wakes those who follow the change log; the payload is the new version."""

PooledConnection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"


class PostgresChange:
    """An open change on a connection that holds the lock row."""

    def __init__(self, connection: PooledConnection, asked: Ask, stamp: Stamp) -> None:
        self._connection = connection
        self._asked = asked
        self._stamp = stamp
        self._written = 0

    @property
    def stamp(self) -> Stamp:
        """The version this change gets if it writes something, and its time."""
        return self._stamp

    @property
    def wrote(self) -> bool:
        """Whether something was changed, so that the version counts."""
        return self._written > 0

    async def answered(self) -> Answered | None:
        """The answer given under this request id within its life, if there is one."""
        row = await self._connection.fetchrow(
            "SELECT fingerprint, response FROM controlplane.answered_requests"
            " WHERE tenant = $1 AND request_id = $2 AND answer_time > $3::timestamptz - make_interval(hours => $4)",
            self._asked.scope,
            self._asked.request_id,
            self._stamp.time,
            REQUEST_ID_LIFE_H,
        )
        return None if row is None else Answered(row["fingerprint"], row["response"])

    async def remember(self, response: bytes) -> None:
        """Keep the serialized response under the request id, in the place of one whose life is over."""
        await self._connection.execute(
            "DELETE FROM controlplane.answered_requests WHERE tenant = $1 AND request_id = $2",
            self._asked.scope,
            self._asked.request_id,
        )
        await self._connection.execute(
            "INSERT INTO controlplane.answered_requests (tenant, request_id, fingerprint, response, answer_time)"
            " VALUES ($1, $2, $3, $4, $5)",
            self._asked.scope,
            self._asked.request_id,
            self._asked.fingerprint,
            response,
            self._stamp.time,
        )

    async def tenant(self, name: TenantName) -> Tenant | None:
        """A tenant as stored."""
        return await _tenant(self._connection, name)

    async def agent(self, name: AgentName) -> Agent | None:
        """An agent as stored."""
        return await _agent(self._connection, name)

    async def agents_of(self, name: TenantName) -> Sequence[Agent]:
        """All agents of a tenant."""
        return await _agents(self._connection, name, "", None)

    async def put_tenant(self, before: Tenant | None, tenant: Tenant) -> None:
        """Store a new tenant (`before` None) or a new state of one."""
        name = TenantName.parse(tenant.name, "tenant.name")
        await self._connection.execute(
            "INSERT INTO controlplane.tenants"
            " (tenant, display_name, weight, max_running_turns, suspended, paused, version, create_time, update_time)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)"
            " ON CONFLICT (tenant) DO UPDATE SET display_name = $2, weight = $3, max_running_turns = $4,"
            " suspended = $5, paused = $6, version = $7, update_time = $8",
            name.tenant,
            tenant.display_name,
            tenant.weight,
            tenant.max_running_turns,
            tenant.suspended,
            tenant.paused,
            self._stamp.version,
            self._stamp.time,
        )
        await self._log("tenant", name.tenant, tenant.name, before, tenant)

    async def remove_tenant(self, before: Tenant) -> None:
        """Remove a tenant that has no agents."""
        name = TenantName.parse(before.name, "name")
        await self._connection.execute("DELETE FROM controlplane.tenants WHERE tenant = $1", name.tenant)
        await self._log("tenant", name.tenant, before.name, before, None)

    async def put_agent(self, before: Agent | None, agent: Agent) -> None:
        """Store a new agent (`before` None) or a new state of one; its revision is kept for good."""
        name = AgentName.parse(agent.name, "agent.name")
        await self._connection.execute(
            "INSERT INTO controlplane.agent_revisions (tenant, agent, revision, spec, create_time)"
            " VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
            name.tenant,
            name.agent,
            agent.revision,
            agent.spec.SerializeToString(deterministic=True),
            self._stamp.time,
        )
        await self._connection.execute(
            "INSERT INTO controlplane.agents"
            " (tenant, agent, display_name, revision, paused, version, create_time, update_time)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $7)"
            " ON CONFLICT (tenant, agent) DO UPDATE"
            " SET display_name = $3, revision = $4, paused = $5, version = $6, update_time = $7",
            name.tenant,
            name.agent,
            agent.display_name,
            agent.revision,
            agent.paused,
            self._stamp.version,
            self._stamp.time,
        )
        await self._log("agent", name.tenant, agent.name, before, agent)

    async def remove_agent(self, before: Agent) -> None:
        """Remove an agent; its revisions stay."""
        name = AgentName.parse(before.name, "name")
        await self._connection.execute(
            "DELETE FROM controlplane.agents WHERE tenant = $1 AND agent = $2", name.tenant, name.agent
        )
        await self._log("agent", name.tenant, before.name, before, None)

    async def _log(
        self, kind: str, tenant: str, name: str, before: Tenant | Agent | None, after: Tenant | Agent | None
    ) -> None:
        """The line of the change log and the row of the audit log for one written resource."""
        self._written += 1
        version, time = self._stamp
        await self._connection.execute(
            "INSERT INTO controlplane.config_changes (version, ordinal, tenant, kind, name, body, change_time)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7)",
            version,
            self._written,
            tenant,
            kind,
            name,
            None if after is None else after.SerializeToString(),
            time,
        )
        await self._connection.execute(
            "INSERT INTO controlplane.audit_log"
            " (version, ordinal, change_time, tenant, actor, method, request_id, resource, before, after)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            version,
            self._written,
            time,
            tenant,
            self._asked.actor,
            self._asked.method,
            self._asked.request_id,
            name,
            _as_json(before),
            _as_json(after),
        )


class PostgresConfigStore:
    """The store on a pool of connections of the role `soma_controlplane`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def change(self, asked: Ask) -> AsyncIterator[PostgresChange]:
        """Open a change under the lock row; leaving the block commits it and wakes the watchers."""
        async with store_errors(), self._transaction(asked.scope) as connection:
            row = await connection.fetchrow(
                "SELECT version, clock_timestamp() AS time FROM controlplane.config_head FOR UPDATE"
            )
            if row is None:
                raise RuntimeError("controlplane.config_head has lost its row: restore the database")
            change = PostgresChange(connection, asked, Stamp(row["version"] + 1, row["time"]))
            yield change
            if change.wrote:
                await connection.execute("UPDATE controlplane.config_head SET version = $1", change.stamp.version)
                await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, str(change.stamp.version))

    async def tenant(self, name: TenantName) -> Tenant | None:
        """A tenant as stored."""
        async with store_errors(), self._transaction(name.tenant) as connection:
            return await _tenant(connection, name)

    async def tenants(self, after: str, limit: int) -> Sequence[Tenant]:
        """At most `limit` tenants whose id sorts after `after`, sorted by id."""
        async with store_errors(), self._transaction(ALL_TENANTS) as connection:
            rows = await connection.fetch(
                f"SELECT {TENANT_COLUMNS} FROM controlplane.tenants WHERE tenant > $1 ORDER BY tenant LIMIT $2",
                after,
                limit,
            )
        return [tenant_from(row) for row in rows]

    async def agent(self, name: AgentName) -> Agent | None:
        """An agent as stored."""
        async with store_errors(), self._transaction(name.tenant) as connection:
            return await _agent(connection, name)

    async def agents(self, parent: TenantName, after: str, limit: int) -> Sequence[Agent]:
        """At most `limit` agents of a tenant whose id sorts after `after`, sorted by id."""
        async with store_errors(), self._transaction(parent.tenant) as connection:
            return await _agents(connection, parent, after, limit)

    async def forget(self) -> None:
        """Remove answers and lines of the change log whose time is over; run now and then."""
        async with store_errors(), self._transaction(ALL_TENANTS) as connection:
            await connection.execute(
                "DELETE FROM controlplane.answered_requests"
                " WHERE answer_time < clock_timestamp() - make_interval(hours => $1)",
                REQUEST_ID_LIFE_H,
            )
            # Who follows the log is never more than seconds behind; who finds a gap starts anew with a complete copy.
            await connection.execute(
                "DELETE FROM controlplane.config_changes WHERE change_time < clock_timestamp() - interval '1 hour'"
            )

    @asynccontextmanager
    async def _transaction(self, tenants: str) -> AsyncIterator[PooledConnection]:
        """A transaction that row-level security lets see `tenants` only."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT set_config('soma.tenants', $1, true)", tenants)
            yield connection


async def _tenant(connection: PooledConnection, name: TenantName) -> Tenant | None:
    row = await connection.fetchrow(f"SELECT {TENANT_COLUMNS} FROM controlplane.tenants WHERE tenant = $1", name.tenant)
    return None if row is None else tenant_from(row)


async def _agent(connection: PooledConnection, name: AgentName) -> Agent | None:
    row = await connection.fetchrow(
        f"SELECT {AGENT_COLUMNS} FROM controlplane.agents JOIN controlplane.agent_revisions"
        " USING (tenant, agent, revision) WHERE tenant = $1 AND agent = $2",
        name.tenant,
        name.agent,
    )
    return None if row is None else agent_from(row)


async def _agents(connection: PooledConnection, parent: TenantName, after: str, limit: int | None) -> Sequence[Agent]:
    """Agents of `parent` after the id `after`; `limit` None: all of them."""
    rows = await connection.fetch(
        f"SELECT {AGENT_COLUMNS} FROM controlplane.agents JOIN controlplane.agent_revisions"
        " USING (tenant, agent, revision) WHERE tenant = $1 AND agent > $2 ORDER BY agent LIMIT $3",
        parent.tenant,
        after,
        limit,
    )
    return [agent_from(row) for row in rows]


def _as_json(resource: Tenant | Agent | None) -> str | None:
    """The resource as JSON text for the audit log."""
    if resource is None:
        return None
    content: dict[str, Any] = MessageToDict(resource)
    return orjson.dumps(content).decode()
