"""PauseAgent, ResumeAgent, PauseTenant and ResumeTenant on real PostgreSQL over a real socket."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import asyncpg
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from soma.controlplane.v1.agent_service_pb2 import (
    Agent,
    AgentSpec,
    CreateAgentRequest,
    DeleteAgentRequest,
    GetAgentRequest,
    ListAgentsRequest,
    PauseAgentRequest,
    ResumeAgentRequest,
    UpdateAgentRequest,
)
from soma.controlplane.v1.tenant_service_pb2 import (
    DeleteTenantRequest,
    GetTenantRequest,
    PauseTenantRequest,
    ResumeTenantRequest,
    Tenant,
    UpdateTenantRequest,
)

from services.controlplane.main import MIGRATIONS, SCHEMA
from soma_common.config_feed import ConfigFeed
from soma_common.grpc.channel import open_channel
from soma_common.postgres.migrations import apply_migrations
from soma_common.testing.auth import Identities
from soma_common.testing.embedded import Database
from tests.integration.controlplane.conftest import Caller, Plane, refused
from tests.integration.controlplane.test_process import running_process
from tests.stalls import Stalls

TENANT, AGENT = "tenants/demo", "tenants/demo/agents/helper"


async def test_a_paused_agent_is_read_back_and_keeps_its_revision(admin: Caller) -> None:
    await admin.tenant()
    made = await admin.agent()
    paused = (await admin.agents.PauseAgent(PauseAgentRequest(name=AGENT))).agent
    assert paused.paused
    assert (paused.revision, paused.spec) == (made.revision, made.spec)
    assert paused.etag != made.etag
    assert (await admin.agents.GetAgent(GetAgentRequest(name=AGENT))).agent == paused
    assert list((await admin.agents.ListAgents(ListAgentsRequest(parent=TENANT))).agents) == [paused]
    resumed = (await admin.agents.ResumeAgent(ResumeAgentRequest(name=AGENT))).agent
    assert not resumed.paused
    assert resumed.etag not in (made.etag, paused.etag)


async def test_a_tenants_pause_is_its_own_and_not_its_agents(admin: Caller) -> None:
    await admin.tenant()
    agent = await admin.agent()
    paused = (await admin.tenants.PauseTenant(PauseTenantRequest(name=TENANT))).tenant
    assert paused.paused
    assert not paused.suspended
    assert (await admin.tenants.GetTenant(GetTenantRequest(name=TENANT))).tenant == paused
    assert (await admin.agents.GetAgent(GetAgentRequest(name=AGENT))).agent == agent
    assert not (await admin.tenants.ResumeTenant(ResumeTenantRequest(name=TENANT))).tenant.paused


async def test_pausing_what_is_paused_changes_nothing(admin: Caller, plane: Plane) -> None:
    await admin.tenant()
    await admin.agent()
    answers = await asyncio.gather(*(admin.agents.PauseAgent(PauseAgentRequest(name=AGENT)) for _ in range(6)))
    assert all(answer == answers[0] for answer in answers)
    connection = await asyncpg.connect(plane.database.superuser_dsn)
    methods = await connection.fetch("SELECT method FROM controlplane.audit_log ORDER BY version")
    await connection.close()
    assert [row["method"] for row in methods] == ["CreateTenant", "CreateAgent", "PauseAgent"]


async def test_a_retry_gets_the_stored_answer_and_undoes_no_later_resume(admin: Caller) -> None:
    await admin.tenant()
    await admin.agent()
    request = PauseAgentRequest(name=AGENT, request_id="r-1")
    first = await admin.agents.PauseAgent(request)
    await admin.agents.ResumeAgent(ResumeAgentRequest(name=AGENT))
    assert await admin.agents.PauseAgent(request) == first
    assert not (await admin.agents.GetAgent(GetAgentRequest(name=AGENT))).agent.paused
    async with refused("REQUEST_ID_REUSED"):
        await admin.agents.ResumeAgent(ResumeAgentRequest(name=AGENT, request_id="r-1"))
    tenant = PauseTenantRequest(name=TENANT, request_id="r-2")
    paused = await admin.tenants.PauseTenant(tenant)
    await admin.tenants.ResumeTenant(ResumeTenantRequest(name=TENANT))
    assert await admin.tenants.PauseTenant(tenant) == paused
    assert not (await admin.tenants.GetTenant(GetTenantRequest(name=TENANT))).tenant.paused


async def test_an_etag_admits_one_of_a_pause_and_an_update(admin: Caller) -> None:
    """Whoever is first: the other is told, and what it would have done has not been done."""
    tenant = await admin.tenant()
    for _ in range(8):
        seen = await admin.agent()
        patch = Agent(name=AGENT, display_name="x", etag=seen.etag)
        answers = await asyncio.gather(
            admin.agents.PauseAgent(PauseAgentRequest(name=AGENT, etag=seen.etag)),
            admin.agents.UpdateAgent(UpdateAgentRequest(agent=patch)),
            return_exceptions=True,
        )
        now = (await admin.agents.GetAgent(GetAgentRequest(name=AGENT))).agent
        assert [isinstance(answer, Message) for answer in answers] == [now.paused, now.display_name == "x"]
        assert now.paused != (now.display_name == "x")
        await admin.agents.DeleteAgent(DeleteAgentRequest(name=AGENT))
    async with refused("ETAG_MISMATCH"):
        await admin.tenants.PauseTenant(PauseTenantRequest(name=TENANT, etag="old"))
    assert (await admin.tenants.PauseTenant(PauseTenantRequest(name=TENANT, etag=tenant.etag))).tenant.paused
    async with refused("ETAG_MISMATCH"):
        await admin.tenants.ResumeTenant(ResumeTenantRequest(name=TENANT, etag=tenant.etag))


async def test_an_update_keeps_a_pause_and_cannot_make_one(admin: Caller) -> None:
    await admin.tenant()
    await admin.agent()
    for mask in (None, FieldMask(paths=["paused"])):
        async with refused("INVALID_REQUEST"):
            await admin.agents.UpdateAgent(UpdateAgentRequest(agent=Agent(name=AGENT, paused=True), update_mask=mask))
        async with refused("INVALID_REQUEST"):
            await admin.tenants.UpdateTenant(
                UpdateTenantRequest(tenant=Tenant(name=TENANT, paused=True), update_mask=mask)
            )
    seen = (await admin.agents.PauseAgent(PauseAgentRequest(name=AGENT))).agent
    async with refused("INVALID_REQUEST"):
        lifted = UpdateAgentRequest(agent=Agent(name=AGENT), update_mask=FieldMask(paths=["paused"]))
        await admin.agents.UpdateAgent(lifted)
    seen.display_name = "Helper"
    assert (await admin.agents.UpdateAgent(UpdateAgentRequest(agent=seen))).agent.paused
    await admin.tenants.PauseTenant(PauseTenantRequest(name=TENANT))
    assert (await admin.tenants.UpdateTenant(UpdateTenantRequest(tenant=Tenant(name=TENANT, weight=7)))).tenant.paused


async def test_what_is_made_again_is_not_paused(admin: Caller) -> None:
    await admin.tenant()
    await admin.agent()
    await admin.agents.PauseAgent(PauseAgentRequest(name=AGENT))
    await admin.tenants.PauseTenant(PauseTenantRequest(name=TENANT))
    await admin.tenants.DeleteTenant(DeleteTenantRequest(name=TENANT, force=True))
    assert not (await admin.tenant()).paused
    assert not (await admin.agent()).paused
    async with refused("INVALID_REQUEST"):
        born_paused = Agent(spec=AgentSpec(model="echo/echo"), paused=True)
        await admin.agents.CreateAgent(CreateAgentRequest(parent=TENANT, agent_id="other", agent=born_paused))


async def test_what_is_not_there_cannot_be_paused(admin: Caller) -> None:
    async with refused("TENANT_NOT_FOUND"):
        await admin.tenants.PauseTenant(PauseTenantRequest(name=TENANT))
    async with refused("TENANT_NOT_FOUND"):
        await admin.agents.ResumeAgent(ResumeAgentRequest(name=AGENT))
    await admin.tenant()
    async with refused("AGENT_NOT_FOUND"):
        await admin.agents.PauseAgent(PauseAgentRequest(name=AGENT))
    async with refused("INVALID_REQUEST"):
        await admin.agents.PauseAgent(PauseAgentRequest(name=TENANT))


async def test_who_may_pause(admin: Caller, plane: Plane) -> None:
    await admin.tenant()
    await admin.tenant("acme")
    await admin.agent()
    async with plane.caller("demo", "admin") as own:
        assert (await own.agents.PauseAgent(PauseAgentRequest(name=AGENT))).agent.paused
        for denied in (
            own.tenants.PauseTenant(PauseTenantRequest(name=TENANT)),
            own.tenants.ResumeTenant(ResumeTenantRequest(name=TENANT)),
        ):
            async with refused("PERMISSION_DENIED"):
                await denied
    for tenant, role in (("acme", "admin"), ("demo", "channel")):
        async with plane.caller(tenant, role) as other, refused("PERMISSION_DENIED"):
            await other.agents.ResumeAgent(ResumeAgentRequest(name=AGENT))


async def test_the_feed_carries_a_pause_within_a_second(admin: Caller, plane: Plane) -> None:
    await admin.tenant()
    await admin.agent(debounce_ms=20, max_running_turns=2)
    token = plane.identities.bearer("router-0", "*", ["service"])
    async with Stalls() as stalls, open_channel(plane.target, token=token, service="controlplane") as channel:
        feed = ConfigFeed(channel, "router-0")
        task = asyncio.create_task(feed.run())
        try:
            await feed.ready.wait()
            known = feed.agent("demo", "helper")
            assert known is not None
            assert (known.spec.debounce_ms, known.spec.max_running_turns, known.paused) == (20, 2, False)
            paused = (await admin.agents.PauseAgent(PauseAgentRequest(name=AGENT))).agent
            await stalls.within(1.0, lambda: feed.agent("demo", "helper") == paused)
            held = (await admin.tenants.PauseTenant(PauseTenantRequest(name=TENANT))).tenant
            await stalls.within(1.0, lambda: feed.tenant("demo") == held)
            resumed = (await admin.tenants.ResumeTenant(ResumeTenantRequest(name=TENANT))).tenant
            await stalls.within(1.0, lambda: feed.tenant("demo") == resumed)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_pause_survives_the_death_of_the_control_plane(tmp_path: Path, postgres: Database) -> None:
    """Answered is committed: killed right after its answer, the process has lost nothing."""
    identities = Identities(tmp_path)
    async with running_process(tmp_path, postgres, identities) as (plane, process), plane.caller() as admin:
        await admin.tenant()
        await admin.agent()
        tenant = (await admin.tenants.PauseTenant(PauseTenantRequest(name=TENANT))).tenant
        agent = (await admin.agents.PauseAgent(PauseAgentRequest(name=AGENT))).agent
        process.send(signal.SIGKILL)
        await process.ended()
    async with running_process(tmp_path, postgres, identities) as (again, _), again.caller() as admin:
        assert (await admin.tenants.GetTenant(GetTenantRequest(name=TENANT))).tenant == tenant
        assert (await admin.agents.GetAgent(GetAgentRequest(name=AGENT))).agent == agent
        assert tenant.paused
        assert agent.paused


async def test_rows_of_the_release_before_are_not_paused(tmp_path: Path, postgres: Database) -> None:
    """Rows written before the migration, and by a process of that release after it, which names no such column."""
    first = tmp_path / "migrations"
    first.mkdir()
    (first / "0001_config.sql").write_text((MIGRATIONS / "0001_config.sql").read_text(encoding="utf-8"))
    await apply_migrations(postgres.owner_dsn("controlplane"), SCHEMA, first)
    connection = await asyncpg.connect(postgres.dsn("controlplane"))
    await connection.execute("SELECT set_config('soma.tenants', '*', false)")
    insert = (
        "INSERT INTO controlplane.tenants"
        " (tenant, display_name, weight, max_running_turns, suspended, version, create_time, update_time)"
        " VALUES ($1, '', 1, 0, false, 1, now(), now())"
    )
    await connection.execute(insert, "before")
    await apply_migrations(postgres.owner_dsn("controlplane"), SCHEMA, MIGRATIONS)
    await connection.execute(insert, "after")
    rows = await connection.fetch("SELECT tenant, paused FROM controlplane.tenants ORDER BY tenant")
    await connection.close()
    assert [tuple(row) for row in rows] == [("after", False), ("before", False)]
