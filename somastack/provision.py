"""Creates a tenant and an agent through the control plane's API, as an administrator would. Safe to repeat."""

import uuid
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


async def provision(target: str, token: str, tenant: str, agent: str, spec: AgentSpec) -> None:
    """See to it that `tenant` exists and has `agent` with `spec`; `target` is the control plane's address.

    Raises:
        SomaError: the control plane refused, or does not answer.
    """
    async with open_channel(target, token=lambda: token, service="controlplane", wait_for_ready=True) as channel:
        try:
            await _provide_tenant(TenantServiceStub(channel), tenant)
            await _provide_agent(AgentServiceStub(channel), tenant, agent, spec)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


async def _provide_tenant(tenants: "TenantServiceAsyncStub", tenant: str) -> None:
    try:
        await tenants.GetTenant(GetTenantRequest(name=f"tenants/{tenant}"), timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        wanted = CreateTenantRequest(
            tenant_id=tenant, tenant=Tenant(display_name=tenant.capitalize()), request_id=_request_id()
        )
        await tenants.CreateTenant(wanted, timeout=TIMEOUT_S)


async def _provide_agent(agents: "AgentServiceAsyncStub", tenant: str, agent: str, spec: AgentSpec) -> None:
    name = f"tenants/{tenant}/agents/{agent}"
    try:
        present = (await agents.GetAgent(GetAgentRequest(name=name), timeout=TIMEOUT_S)).agent
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        wanted = Agent(display_name=agent.capitalize(), spec=spec)
        request = CreateAgentRequest(parent=f"tenants/{tenant}", agent_id=agent, agent=wanted, request_id=_request_id())
        await agents.CreateAgent(request, timeout=TIMEOUT_S)
        return
    if (present.spec.instructions, present.spec.model, list(present.spec.tools)) != (
        spec.instructions,
        spec.model,
        list(spec.tools),
    ):
        changed = Agent(name=name, spec=spec, etag=present.etag)
        mask = FieldMask(paths=["spec.instructions", "spec.model", "spec.tools"])
        update = UpdateAgentRequest(agent=changed, update_mask=mask, request_id=_request_id())
        await agents.UpdateAgent(update, timeout=TIMEOUT_S)


def _request_id() -> str:
    """Of one change: the channel's own retries of the call repeat it."""
    return f"somastack-{uuid.uuid4().hex}"
