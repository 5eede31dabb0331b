"""The control plane's code, its contract and its neighbours agree."""

from __future__ import annotations

from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.application.watch_config import HEARTBEAT_S
from services.controlplane.domain import agent, tenant
from soma_common.config_feed import SILENCE_LIMIT_S

SERVERS_OWN = {"name", "revision", "etag", "create_time", "update_time"}


def test_every_field_is_the_callers_or_the_servers() -> None:
    """A new field of the contract must be put on one side."""
    assert {field.name for field in Agent.DESCRIPTOR.fields} == {*agent.WRITABLE, *SERVERS_OWN}
    assert {field.name for field in Tenant.DESCRIPTOR.fields} == {*tenant.WRITABLE, *SERVERS_OWN} - {"revision"}


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
