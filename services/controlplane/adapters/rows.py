"""From rows of the tables `tenants` and `agents` to the messages of the contract."""

from __future__ import annotations

from typing import Final

import asyncpg
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.domain.version import etag_of

TENANT_COLUMNS: Final = (
    "tenant, display_name, weight, max_running_turns, suspended, paused, version, tenants.create_time, update_time"
)
AGENT_COLUMNS: Final = "tenant, agent, display_name, revision, spec, paused, version, agents.create_time, update_time"


def tenant_from(row: asyncpg.Record) -> Tenant:
    """The tenant that a row of TENANT_COLUMNS holds."""
    name = f"tenants/{row['tenant']}"
    tenant = Tenant(
        name=name,
        display_name=row["display_name"],
        weight=row["weight"],
        max_running_turns=row["max_running_turns"],
        suspended=row["suspended"],
        paused=row["paused"],
        etag=etag_of(name, row["version"]),
    )
    tenant.create_time.FromDatetime(row["create_time"])
    tenant.update_time.FromDatetime(row["update_time"])
    return tenant


def agent_from(row: asyncpg.Record) -> Agent:
    """The agent that a row of AGENT_COLUMNS holds."""
    name = f"tenants/{row['tenant']}/agents/{row['agent']}"
    agent = Agent(
        name=name,
        display_name=row["display_name"],
        spec=AgentSpec.FromString(row["spec"]),
        revision=row["revision"],
        paused=row["paused"],
        etag=etag_of(name, row["version"]),
    )
    agent.create_time.FromDatetime(row["create_time"])
    agent.update_time.FromDatetime(row["update_time"])
    return agent
