"""AgentService on real PostgreSQL over a real socket."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.controlplane.v1.agent_service_pb2 import (
    Agent,
    AgentSpec,
    CreateAgentRequest,
    DeleteAgentRequest,
    GetAgentRequest,
    ListAgentsRequest,
    UpdateAgentRequest,
)
from soma.controlplane.v1.tenant_service_pb2 import DeleteTenantRequest

from tests.integration.controlplane.conftest import Caller, Plane, refused

NAME = "tenants/demo/agents/helper"


@pytest.fixture(autouse=True)
async def _tenant(admin: Caller) -> None:
    await admin.tenant()


async def test_a_created_agent_is_read_back(admin: Caller) -> None:
    created = await admin.agent(instructions="Be kind.", tools=["calculate"], temperature_millis=0)
    assert created.name == NAME
    assert created.spec.HasField("temperature_millis")
    assert len(created.revision) == 16
    assert (await admin.agents.GetAgent(GetAgentRequest(name=NAME))).agent == created


async def test_unknown_parents_and_agents_are_told_apart(admin: Caller) -> None:
    async with refused("TENANT_NOT_FOUND"):
        await admin.agent(tenant="nobody")
    async with refused("TENANT_NOT_FOUND"):
        await admin.agents.ListAgents(ListAgentsRequest(parent="tenants/nobody"))
    for name, reason in ((NAME, "AGENT_NOT_FOUND"), ("tenants/nobody/agents/helper", "TENANT_NOT_FOUND")):
        async with refused(reason):
            await admin.agents.GetAgent(GetAgentRequest(name=name))
        async with refused(reason):
            await admin.agents.DeleteAgent(DeleteAgentRequest(name=name))
        async with refused(reason):
            await admin.agents.UpdateAgent(UpdateAgentRequest(agent=Agent(name=name, display_name="x")))


async def test_of_racing_creations_one_wins(admin: Caller) -> None:
    answers = await asyncio.gather(*(admin.agent() for _ in range(12)), return_exceptions=True)
    assert sum(isinstance(answer, Agent) for answer in answers) == 1


async def test_a_creation_races_the_end_of_its_tenant(admin: Caller, plane: Plane) -> None:
    """Whoever is first: no agent is left without its tenant."""
    ends = [admin.tenants.DeleteTenant(DeleteTenantRequest(name="tenants/demo"))]
    await asyncio.gather(*(admin.agent(f"a-{n}") for n in range(6)), *ends, return_exceptions=True)
    connection = await asyncpg.connect(plane.database.superuser_dsn)
    orphans = await connection.fetchval(
        "SELECT count(*) FROM controlplane.agents LEFT JOIN controlplane.tenants USING (tenant) WHERE weight IS NULL"
    )
    await connection.close()
    assert orphans == 0


async def test_request_ids_are_unique_in_a_tenant(admin: Caller) -> None:
    await admin.tenant("acme")

    def request(tenant: str, agent: str) -> CreateAgentRequest:
        spec = AgentSpec(model="echo/echo")
        return CreateAgentRequest(parent=f"tenants/{tenant}", agent_id=agent, agent=Agent(spec=spec), request_id="r-1")

    first = await admin.agents.CreateAgent(request("demo", "a"))
    assert await admin.agents.CreateAgent(request("demo", "a")) == first
    async with refused("REQUEST_ID_REUSED"):
        await admin.agents.CreateAgent(request("demo", "b"))
    await admin.agents.CreateAgent(request("acme", "a"))


async def test_a_nested_mask_changes_one_field_of_the_spec(admin: Caller) -> None:
    before = await admin.agent(instructions="old", tools=["calculate"], max_steps=5)
    patch = Agent(name=NAME, spec=AgentSpec(model="echo/echo", instructions="new", max_steps=9), etag=before.etag)
    masked = UpdateAgentRequest(agent=patch, update_mask=FieldMask(paths=["spec.instructions"]))
    after = (await admin.agents.UpdateAgent(masked)).agent
    assert (after.spec.instructions, list(after.spec.tools), after.spec.max_steps) == ("new", ["calculate"], 5)
    assert after.etag != before.etag
    assert after.revision != before.revision


async def test_without_a_mask_the_fields_that_are_set_change(admin: Caller) -> None:
    await admin.agent(instructions="old", tools=["calculate"])
    patch = Agent(name=NAME, display_name="Helper", spec=AgentSpec(model="echo/echo", tools=["current_time"]))
    after = (await admin.agents.UpdateAgent(UpdateAgentRequest(agent=patch))).agent
    assert (after.display_name, after.spec.instructions) == ("Helper", "old")
    assert list(after.spec.tools) == ["current_time"]


async def test_a_star_replaces_everything(admin: Caller) -> None:
    await admin.agent(instructions="old", tools=["calculate"])
    patch = Agent(name=NAME, spec=AgentSpec(model="offline/assistant"))
    after = (await admin.agents.UpdateAgent(UpdateAgentRequest(agent=patch, update_mask=FieldMask(paths=["*"])))).agent
    assert after.spec == AgentSpec(model="offline/assistant")


async def test_a_revision_names_content(admin: Caller, plane: Plane) -> None:
    first = await admin.agent(instructions="one")
    twin = await admin.agent("twin", instructions="one")
    assert first.revision == twin.revision

    async def become(text: str) -> Agent:
        patch = Agent(name=NAME, spec=AgentSpec(model="echo/echo", instructions=text))
        return (await admin.agents.UpdateAgent(UpdateAgentRequest(agent=patch))).agent

    second, again = await become("two"), await become("one")
    assert second.revision != first.revision
    assert again.revision == first.revision
    assert again.etag != first.etag
    await admin.agents.DeleteAgent(DeleteAgentRequest(name=NAME))
    connection = await asyncpg.connect(plane.database.superuser_dsn)
    kept = await connection.fetch("SELECT revision FROM controlplane.agent_revisions WHERE agent = 'helper'")
    await connection.close()
    assert {row["revision"] for row in kept} == {first.revision, second.revision}


async def test_an_etag_admits_one_of_racing_updates(admin: Caller) -> None:
    seen = await admin.agent()

    async def update(text: str) -> Message:
        patch = Agent(name=NAME, etag=seen.etag, display_name=text)
        return await admin.agents.UpdateAgent(UpdateAgentRequest(agent=patch))

    answers = await asyncio.gather(*(update(f"name {n}") for n in range(10)), return_exceptions=True)
    assert sum(isinstance(answer, Message) for answer in answers) == 1
    async with refused("ETAG_MISMATCH"):
        await admin.agents.DeleteAgent(DeleteAgentRequest(name=NAME, etag=seen.etag))


@pytest.mark.parametrize(
    ("field", "value"),
    [("arrival_policy", 99), ("debounce_ms", 600_001), ("debounce_max_ms", 299), ("max_running_turns", 100_001)],
)
async def test_a_spec_outside_its_bounds_is_refused(admin: Caller, field: str, value: int) -> None:
    async with refused("INVALID_REQUEST"):
        await admin.agent("helper", "demo", **{field: value})


async def test_what_an_agent_says_of_arriving_messages_is_kept(admin: Caller, plane: Plane) -> None:
    made = await admin.agent(
        arrival_policy=ArrivalPolicy.ARRIVAL_POLICY_ACCUMULATE,
        debounce_ms=50,
        debounce_max_ms=400,
        max_running_turns=3,
    )
    assert (await admin.agents.GetAgent(GetAgentRequest(name=NAME))).agent == made
    assert list((await admin.agents.ListAgents(ListAgentsRequest(parent="tenants/demo"))).agents) == [made]
    patch = Agent(name=NAME, spec=AgentSpec(debounce_ms=401))
    async with refused("INVALID_REQUEST"):
        await admin.agents.UpdateAgent(
            UpdateAgentRequest(agent=patch, update_mask=FieldMask(paths=["spec.debounce_ms"]))
        )
    patch.spec.debounce_max_ms = 500
    changed = (await admin.agents.UpdateAgent(UpdateAgentRequest(agent=patch))).agent
    assert (changed.spec.debounce_ms, changed.spec.max_running_turns) == (401, 3)


@pytest.mark.parametrize("model", ["", "echo", "Echo/echo", "echo/"])
async def test_a_model_of_another_form_is_refused(admin: Caller, model: str) -> None:
    async with refused("INVALID_REQUEST"):
        await admin.agent(model=model)


async def test_an_agent_without_a_spec_is_refused(admin: Caller) -> None:
    async with refused("INVALID_REQUEST"):
        await admin.agents.CreateAgent(CreateAgentRequest(parent="tenants/demo", agent_id="a", agent=Agent()))


async def test_pages_belong_to_their_tenant(admin: Caller) -> None:
    await admin.tenant("acme")
    for n in range(5):
        await admin.agent(f"a-{n}")
    first = await admin.agents.ListAgents(ListAgentsRequest(parent="tenants/demo", page_size=3))
    rest = ListAgentsRequest(parent="tenants/demo", page_token=first.next_page_token)
    second = await admin.agents.ListAgents(rest)
    assert [agent.name[-1] for agent in (*first.agents, *second.agents)] == ["0", "1", "2", "3", "4"]
    assert not second.next_page_token
    async with refused("PAGE_TOKEN_INVALID"):
        await admin.agents.ListAgents(ListAgentsRequest(parent="tenants/acme", page_token=first.next_page_token))


async def test_a_subject_of_one_tenant_reaches_no_other(admin: Caller, plane: Plane) -> None:
    await admin.tenant("acme")
    await admin.agent()
    async with plane.caller("acme", "admin") as acme:
        for denied in (
            acme.agents.GetAgent(GetAgentRequest(name=NAME)),
            acme.agents.ListAgents(ListAgentsRequest(parent="tenants/demo")),
            acme.agents.UpdateAgent(UpdateAgentRequest(agent=Agent(name=NAME, display_name="x"))),
            acme.agents.DeleteAgent(DeleteAgentRequest(name=NAME)),
        ):
            async with refused("PERMISSION_DENIED"):
                await denied
        await acme.agent("own", "acme")
