"""The control plane's code, its contract and its neighbours agree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.application.watch_config import HEARTBEAT_S
from services.controlplane.domain import agent, tenant
from services.router.application import ingest_messages as routers
from soma_common.config_feed import SILENCE_LIMIT_S

ROOT = Path(__file__).parents[3]
SERVERS_OWN = {"name", "revision", "etag", "create_time", "update_time"}


def test_every_field_is_the_callers_or_the_servers() -> None:
    """A new field of the contract must be put on one side."""
    agents = {*agent.WRITABLE, *agent.BY_VERB, *SERVERS_OWN}
    tenants = {*tenant.WRITABLE, *tenant.BY_VERB, *SERVERS_OWN} - {"revision"}
    assert {field.name for field in Agent.DESCRIPTOR.fields} == agents
    assert {field.name for field in Tenant.DESCRIPTOR.fields} == tenants


@pytest.mark.parametrize(
    ("service", "verbs"), [("AgentService", agent.BY_VERB), ("TenantService", tenant.BY_VERB)], ids=["agent", "tenant"]
)
def test_the_verbs_that_refusals_name_exist(service: str, verbs: Mapping[str, str]) -> None:
    methods = descriptor_pool.Default().FindServiceByName(f"soma.controlplane.v1.{service}").methods_by_name
    assert {verb for named in verbs.values() for verb in named.split(" and ")} <= set(methods)


def test_the_contract_states_the_debounce_that_is_checked_and_the_routers_use() -> None:
    spec = (ROOT / "proto" / "soma" / "controlplane" / "v1" / "agent_service.proto").read_text(encoding="utf-8")
    stated = {field: int(ms) for ms, field in re.findall(r"0 means (\d+)\.[^;]*?uint32 (debounce\w+) =", spec)}
    assert stated == {"debounce_ms": agent.DEFAULT_DEBOUNCE_MS, "debounce_max_ms": agent.DEFAULT_DEBOUNCE_MAX_MS}
    assert stated == {"debounce_ms": routers.DEFAULT_DEBOUNCE_MS, "debounce_max_ms": routers.DEFAULT_DEBOUNCE_MAX_MS}


def test_a_spec_has_no_maps() -> None:
    """Its serialization names revisions, and the order of a map's entries is nobody's promise."""
    assert not [
        field.name
        for field in AgentSpec.DESCRIPTOR.fields
        if field.message_type is not None and field.message_type.GetOptions().map_entry
    ]


def test_a_feed_hears_several_heartbeats_before_it_gives_up() -> None:
    assert HEARTBEAT_S * 2 < SILENCE_LIMIT_S
    assert HEARTBEAT_S <= 5  # The contract's promise.
