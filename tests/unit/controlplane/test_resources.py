"""Names, etags, revisions, and what tenants and agents may be."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.domain.agent import changed_agent, new_agent
from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.tenant import changed_tenant, new_tenant
from services.controlplane.domain.version import Stamp, etag_of, revision_of
from soma_common.errors import Conflict, InvalidRequest, reason_name

NAME = AgentName("demo", "helper")
FIRST = Stamp(1, datetime(2030, 1, 1, tzinfo=UTC))
SECOND = Stamp(2, datetime(2030, 1, 2, tzinfo=UTC))
WANTED = Agent(spec=AgentSpec(model="echo/echo"))


@pytest.mark.parametrize("name", ["tenants/a", "tenants/a-1", "tenants/" + "a" * 63])
def test_tenant_names(name: str) -> None:
    assert str(TenantName.parse(name, "name")) == name


@pytest.mark.parametrize(
    "name", ["", "a", "tenants/", "tenants/A", "tenants/-a", "tenants/a/", "tenants/a\n", "tenants/" + "a" * 64]
)
def test_other_names_are_refused_by_field(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        TenantName.parse(name, "parent")
    assert refused.value.field_violations[0].field == "parent"
    with pytest.raises(InvalidRequest):
        AgentName.parse(f"{name}/agents/x/y", "name")


def test_a_creator_sets_no_field_of_the_servers() -> None:
    wanted = Agent(name="tenants/x/agents/y", etag="mine", revision="mine", spec=AgentSpec(model="echo/echo"))
    agent = new_agent(NAME, wanted, FIRST)
    assert agent.name == str(NAME)
    assert agent.etag == etag_of(str(NAME), 1)
    assert agent.revision == revision_of(agent.spec)
    assert new_tenant(TenantName("demo"), Tenant(etag="mine"), FIRST).etag == etag_of("tenants/demo", 1)


def test_what_changes_nothing_is_no_change() -> None:
    agent = new_agent(NAME, WANTED, FIRST)
    assert changed_agent(agent, WANTED, None, SECOND) is None
    tenant = new_tenant(TenantName("demo"), Tenant(weight=3), FIRST)
    assert changed_tenant(tenant, Tenant(weight=3), None, SECOND) is None


def test_a_change_keeps_the_time_of_creation() -> None:
    agent = changed_agent(new_agent(NAME, WANTED, FIRST), Agent(display_name="x"), None, SECOND)
    assert agent is not None
    assert agent.create_time.ToDatetime(UTC) == FIRST.time
    assert agent.update_time.ToDatetime(UTC) == SECOND.time
    assert agent.revision == revision_of(agent.spec)


def test_an_old_etag_is_told_the_stored_one() -> None:
    agent = new_agent(NAME, WANTED, FIRST)
    with pytest.raises(Conflict) as refused:
        changed_agent(agent, Agent(etag="old", display_name="x"), None, SECOND)
    assert refused.value.metadata["stored_etag"] == agent.etag


def test_a_revision_depends_on_nothing_but_content() -> None:
    one, two = AgentSpec(model="a/b", tools=["x", "y"]), AgentSpec(model="a/b", tools=["y", "x"])
    assert revision_of(one) == revision_of(AgentSpec.FromString(one.SerializeToString()))
    assert revision_of(one) != revision_of(two)
    assert revision_of(AgentSpec(temperature_millis=0)) != revision_of(AgentSpec())
    # Stored revisions outlive releases: this one must come out for ever.
    assert revision_of(AgentSpec(model="echo/echo", instructions="Be kind.")) == "c187f6be061f1ab9"


def test_texts_with_a_zero_character_are_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        new_agent(NAME, Agent(spec=AgentSpec(model="a/b", instructions="ab\0")), FIRST)
    assert reason_name(refused.value.reason) == "CONTENT_INVALID"
    assert "character 2" in refused.value.message


@pytest.mark.parametrize("policy", [policy for policy in ArrivalPolicy.values() if policy > 1])
def test_policies_of_later_releases_are_refused_by_name(policy: ArrivalPolicy.ValueType) -> None:
    with pytest.raises(InvalidRequest) as refused:
        new_agent(NAME, Agent(spec=AgentSpec(model="a/b", arrival_policy=policy)), FIRST)
    assert refused.value.metadata == {
        "supported": "ARRIVAL_POLICY_ENQUEUE",
        "asked": ArrivalPolicy.Name(policy),
    }
