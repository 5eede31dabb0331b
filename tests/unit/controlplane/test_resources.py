"""Names, etags, revisions, and what tenants and agents may be."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.domain.agent import changed_agent, new_agent, paused_agent
from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.tenant import changed_tenant, new_tenant, paused_tenant
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


@pytest.mark.parametrize("policy", ArrivalPolicy.values())
def test_every_policy_may_be_set(policy: ArrivalPolicy.ValueType) -> None:
    wanted = Agent(spec=AgentSpec(model="a/b", arrival_policy=policy))
    assert new_agent(NAME, wanted, FIRST).spec.arrival_policy == policy


def test_a_policy_that_nobody_knows_is_refused_with_those_there_are() -> None:
    unknown = AgentSpec.FromString(AgentSpec(model="a/b").SerializeToString() + b"\x20\x63")  # arrival_policy: 99
    with pytest.raises(InvalidRequest) as refused:
        new_agent(NAME, Agent(spec=unknown), FIRST)
    assert "99" in refused.value.message
    assert "ARRIVAL_POLICY_STEER" in refused.value.message


@pytest.mark.parametrize(("silence", "longest"), [(0, 0), (2000, 0), (0, 300), (5000, 5000), (1, 600_000)])
def test_a_group_may_wait_as_long_as_its_silence_or_longer(silence: int, longest: int) -> None:
    spec = AgentSpec(model="a/b", debounce_ms=silence, debounce_max_ms=longest)
    assert new_agent(NAME, Agent(spec=spec), FIRST).spec == spec


@pytest.mark.parametrize(("silence", "longest"), [(2001, 0), (0, 299), (5000, 4999)])
def test_a_group_that_is_due_before_its_silence_is_refused(silence: int, longest: int) -> None:
    spec = AgentSpec(model="a/b", debounce_ms=silence, debounce_max_ms=longest)
    with pytest.raises(InvalidRequest) as refused:
        new_agent(NAME, Agent(spec=spec), FIRST)
    assert refused.value.field_violations[0].field == "agent.spec.debounce_max_ms"


def test_a_pause_is_another_state_of_the_same_revision() -> None:
    agent = new_agent(NAME, WANTED, FIRST)
    paused = paused_agent(agent, agent.etag, SECOND, paused=True)
    assert paused is not None
    assert (paused.paused, paused.revision) == (True, agent.revision)
    assert paused.etag != agent.etag
    assert paused.update_time.ToDatetime(UTC) == SECOND.time
    assert not agent.paused
    tenant = new_tenant(TenantName("demo"), Tenant(weight=3), FIRST)
    held = paused_tenant(tenant, "", SECOND, paused=True)
    assert held is not None
    assert (held.paused, held.weight) == (True, 3)
    assert held.etag != tenant.etag


def test_a_pause_that_is_so_already_is_no_change_unless_its_etag_is_old() -> None:
    agent, tenant = new_agent(NAME, WANTED, FIRST), new_tenant(TenantName("demo"), Tenant(), FIRST)
    assert paused_agent(agent, "", SECOND, paused=False) is None
    assert paused_tenant(tenant, tenant.etag, SECOND, paused=False) is None
    with pytest.raises(Conflict):
        paused_agent(agent, "old", SECOND, paused=False)
    with pytest.raises(Conflict):
        paused_tenant(tenant, "old", SECOND, paused=True)


def test_an_update_that_would_pause_is_told_the_verb() -> None:
    agent = new_agent(NAME, WANTED, FIRST)
    for mask in (
        None,
        FieldMask(paths=["*"]),
        FieldMask(paths=["paused"]),
        FieldMask(paths=["display_name", "paused"]),
    ):
        with pytest.raises(InvalidRequest) as refused:
            changed_agent(agent, Agent(paused=True, display_name="x", spec=WANTED.spec), mask, SECOND)
        assert "PauseAgent and ResumeAgent" in refused.value.message
    with pytest.raises(InvalidRequest) as refused:
        new_tenant(TenantName("demo"), Tenant(paused=True), FIRST)
    assert "PauseTenant and ResumeTenant" in refused.value.message


def test_an_update_of_what_was_read_paused_keeps_the_pause() -> None:
    paused = paused_agent(new_agent(NAME, WANTED, FIRST), "", FIRST, paused=True)
    assert paused is not None
    patch = Agent()
    patch.CopyFrom(paused)
    patch.display_name = "x"
    for mask in (None, FieldMask(paths=["*"])):
        changed = changed_agent(paused, patch, mask, SECOND)
        assert changed is not None
        assert (changed.paused, changed.display_name) == (True, "x")
    kept = changed_agent(paused, Agent(display_name="y"), None, SECOND)
    assert kept is not None
    assert kept.paused
