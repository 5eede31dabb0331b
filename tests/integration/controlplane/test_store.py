"""What the database holds after a change, what row-level security keeps apart, and what callers get without it."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import orjson
import pytest
from soma.controlplane.v1.agent_service_pb2 import DeleteAgentRequest
from soma.controlplane.v1.config_service_pb2 import WatchConfigRequest
from soma.controlplane.v1.tenant_service_pb2 import CreateTenantRequest, GetTenantRequest, Tenant, UpdateTenantRequest

from soma_common.testing.embedded import FaultyPostgres, soma_database
from soma_common.testing.eventually import eventually
from tests.integration.controlplane.conftest import Caller, Plane, refused, running_plane


async def test_every_change_has_its_audit_row(admin: Caller, plane: Plane) -> None:
    await admin.tenants.CreateTenant(CreateTenantRequest(tenant_id="demo", request_id="r-1"))
    await admin.tenants.UpdateTenant(UpdateTenantRequest(tenant=Tenant(name="tenants/demo", weight=5)))
    await admin.agent()
    await admin.agents.DeleteAgent(DeleteAgentRequest(name="tenants/demo/agents/helper"))
    async with refused("ALREADY_EXISTS"):
        await admin.tenant()
    connection = await asyncpg.connect(plane.database.superuser_dsn)
    rows = await connection.fetch("SELECT * FROM controlplane.audit_log ORDER BY version")
    changes = await connection.fetch("SELECT version, name FROM controlplane.config_changes ORDER BY version")
    head = await connection.fetchval("SELECT version FROM controlplane.config_head")
    await connection.close()
    assert [row["method"] for row in rows] == ["CreateTenant", "UpdateTenant", "CreateAgent", "DeleteAgent"]
    assert [row["version"] for row in rows] == [1, 2, 3, 4] == [row["version"] for row in changes]
    assert head == 4
    assert {row["actor"] for row in rows} == {"tester"}
    assert rows[0]["before"] is None
    assert rows[0]["request_id"] == "r-1"
    assert orjson.loads(rows[1]["after"])["weight"] == 5
    assert rows[3]["after"] is None


@pytest.mark.parametrize("table", ["audit_log", "agent_revisions"])
async def test_the_service_cannot_rewrite_the_past(admin: Caller, plane: Plane, table: str) -> None:
    await admin.tenant()
    await admin.agent()
    connection = await asyncpg.connect(plane.database.dsn("controlplane"))
    await connection.execute("SELECT set_config('soma.tenants', '*', false)")
    for statement in (f"DELETE FROM controlplane.{table}", f"UPDATE controlplane.{table} SET tenant = 'x'"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    await connection.close()


async def test_rows_of_other_tenants_are_out_of_reach(admin: Caller, plane: Plane) -> None:
    for tenant in ("demo", "acme"):
        await admin.tenant(tenant)
        await admin.agent(tenant=tenant)
    connection = await asyncpg.connect(plane.database.dsn("controlplane"))
    tables = ("tenants", "agents", "agent_revisions", "config_changes", "audit_log")

    async def tenants_seen(setting: str) -> set[str]:
        await connection.execute("SELECT set_config('soma.tenants', $1, false)", setting)
        rows = [await connection.fetch(f"SELECT DISTINCT tenant FROM controlplane.{table}") for table in tables]
        assert len({frozenset(row["tenant"] for row in found) for found in rows}) == 1
        return {row["tenant"] for row in rows[0]}

    assert await tenants_seen("") == set()
    assert await tenants_seen("demo") == {"demo"}
    assert await tenants_seen("demo,acme") == {"demo", "acme"}
    assert await tenants_seen("*") == {"demo", "acme"}
    await connection.execute("SELECT set_config('soma.tenants', 'demo', false)")
    assert (
        await connection.execute("UPDATE controlplane.agents SET display_name = 'x' WHERE tenant = 'acme'")
        == "UPDATE 0"
    )
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("INSERT INTO controlplane.agents VALUES ('acme', 'spy', '', '', 1, now(), now())")
    await connection.close()


async def test_without_the_database_callers_are_told_to_come_back(tmp_path: Path, own_postgres: FaultyPostgres) -> None:
    async with running_plane(tmp_path, soma_database(own_postgres)) as plane, plane.caller() as admin:
        await admin.tenant()
        await own_postgres.kill9()
        async with refused("STORE_UNAVAILABLE"):
            await admin.tenants.GetTenant(GetTenantRequest(name="tenants/demo"))
        async with refused("STORE_UNAVAILABLE"):
            await admin.tenant("acme")
        async with refused("STORE_UNAVAILABLE"):
            await admin.config.WatchConfig(WatchConfigRequest(instance="x-0")).read()
        await own_postgres.restart()

        async def is_back() -> bool:
            try:
                return bool((await admin.tenant("acme")).etag)
            except Exception as error:
                raise AssertionError(repr(error)) from error

        await eventually(is_back, 5.0)


async def test_a_frozen_database_ends_no_wait_later_than_its_time(tmp_path: Path, own_postgres: FaultyPostgres) -> None:
    async with running_plane(tmp_path, soma_database(own_postgres)) as plane, plane.caller() as admin:
        await admin.tenant()
        own_postgres.sigstop()
        try:
            async with refused("DEADLINE_EXCEEDED"):
                await admin.tenants.GetTenant(GetTenantRequest(name="tenants/demo"), timeout=0.5)
        finally:
            own_postgres.sigcont()
        await admin.tenants.GetTenant(GetTenantRequest(name="tenants/demo"))


async def test_a_change_does_not_wait_for_ever_for_another(admin: Caller, plane: Plane) -> None:
    await admin.tenant()
    connection = await asyncpg.connect(plane.database.superuser_dsn)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SELECT FROM controlplane.config_head FOR UPDATE")
    async with refused("STORE_UNAVAILABLE"):
        await admin.tenant("acme")
    await admin.tenants.GetTenant(GetTenantRequest(name="tenants/demo"))  # Who only reads waits for nobody.
    await transaction.rollback()
    await connection.close()
    await admin.tenant("acme")
