"""Creates a tenant and an agent through the control plane's API, as an administrator would.

Safe to repeat: what is there stays as it is.
"""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from soma.controlplane.v1.agent_service_pb2 import (
    Agent,
    AgentSpec,
    CreateAgentRequest,
    GetAgentRequest,
    UpdateAgentRequest,
)
from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceStub
from soma.controlplane.v1.tenant_service_pb2 import CreateTenantRequest, GetTenantRequest, Tenant
from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceStub

from soma_common.errors import from_rpc_error
from soma_common.grpc.channel import open_channel

if TYPE_CHECKING:
    from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceAsyncStub
    from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceAsyncStub

TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Provided:
    """An agent and its tenant as the control plane has them."""

    tenant: Tenant
    agent: Agent


async def provision(target: str, token: str, tenant: str, agent: str, spec: AgentSpec) -> Provided:
    """See to it that `tenant` exists and has `agent`, with `spec` if it is made now; `target` is the control plane's
    address.

    Raises:
        SomaError: the control plane refused, or does not answer.
    """
    async with _asking(target, token) as channel:
        provided = await _provided_tenant(TenantServiceStub(channel), tenant)
        return Provided(provided, await _provided_agent(AgentServiceStub(channel), tenant, agent, spec))


async def change_model(target: str, token: str, agent: Agent, model: str) -> Agent:
    """Give `agent` another model, and return it as it is then.

    Raises:
        SomaError: the control plane refused, or does not answer; above all when somebody has changed the agent since
            it was read.
    """
    changed = Agent(name=agent.name, spec=AgentSpec(model=model), etag=agent.etag)
    update = UpdateAgentRequest(agent=changed, update_mask=FieldMask(paths=["spec.model"]), request_id=_request_id())
    async with _asking(target, token) as channel:
        return (await AgentServiceStub(channel).UpdateAgent(update, timeout=TIMEOUT_S)).agent


@asynccontextmanager
async def _asking(target: str, token: str) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(target, token=lambda: token, service="controlplane", wait_for_ready=True) as channel:
        try:
            yield channel
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


async def _provided_tenant(tenants: "TenantServiceAsyncStub", tenant: str) -> Tenant:
    try:
        return (await tenants.GetTenant(GetTenantRequest(name=f"tenants/{tenant}"), timeout=TIMEOUT_S)).tenant
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
    wanted = CreateTenantRequest(
        tenant_id=tenant, tenant=Tenant(display_name=tenant.capitalize()), request_id=_request_id()
    )
    return (await tenants.CreateTenant(wanted, timeout=TIMEOUT_S)).tenant


async def _provided_agent(agents: "AgentServiceAsyncStub", tenant: str, agent: str, spec: AgentSpec) -> Agent:
    name = f"tenants/{tenant}/agents/{agent}"
    try:
        return (await agents.GetAgent(GetAgentRequest(name=name), timeout=TIMEOUT_S)).agent
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
    wanted = Agent(display_name=agent.capitalize(), spec=spec)
    request = CreateAgentRequest(parent=f"tenants/{tenant}", agent_id=agent, agent=wanted, request_id=_request_id())
    return (await agents.CreateAgent(request, timeout=TIMEOUT_S)).agent


def _request_id() -> str:
    """Of one change: the channel's own retries of the call repeat it."""
    return f"somastack-{uuid.uuid4().hex}"
