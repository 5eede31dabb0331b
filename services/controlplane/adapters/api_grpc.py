"""TenantService, AgentService and ConfigService over gRPC. Who may call is decided before a servicer is reached."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from grpc import aio
from soma.controlplane.v1 import agent_service_pb2 as agents
from soma.controlplane.v1 import config_service_pb2 as config
from soma.controlplane.v1 import tenant_service_pb2 as tenants
from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceServicer
from soma.controlplane.v1.config_service_pb2_grpc import ConfigServiceServicer
from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceServicer

from services.controlplane.application.create_agent import CreateAgent
from services.controlplane.application.create_tenant import CreateTenant
from services.controlplane.application.delete_agent import DeleteAgent
from services.controlplane.application.delete_tenant import DeleteTenant
from services.controlplane.application.get_agent import GetAgent
from services.controlplane.application.get_tenant import GetTenant
from services.controlplane.application.list_agents import ListAgents
from services.controlplane.application.list_tenants import ListTenants
from services.controlplane.application.pause_agent import PauseAgent, ResumeAgent
from services.controlplane.application.pause_tenant import PauseTenant, ResumeTenant
from services.controlplane.application.ports import ConfigStore
from services.controlplane.application.update_agent import UpdateAgent
from services.controlplane.application.update_tenant import UpdateTenant
from services.controlplane.application.watch_config import WatchConfig
from soma_common.grpc.call_context import caller

TENANT_SERVICE: Final = "soma.controlplane.v1.TenantService"
AGENT_SERVICE: Final = "soma.controlplane.v1.AgentService"
CONFIG_SERVICE: Final = "soma.controlplane.v1.ConfigService"


class TenantApi(TenantServiceServicer):
    """Keeps tenants in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._create = CreateTenant(store)
        self._get = GetTenant(store)
        self._list = ListTenants(store)
        self._update = UpdateTenant(store)
        self._delete = DeleteTenant(store)
        self._pause = PauseTenant(store)
        self._resume = ResumeTenant(store)

    async def CreateTenant(
        self,
        request: tenants.CreateTenantRequest,
        context: aio.ServicerContext[tenants.CreateTenantRequest, tenants.CreateTenantResponse],
    ) -> tenants.CreateTenantResponse:
        """Creates a tenant."""
        return await self._create(request, caller().subject)

    async def GetTenant(
        self,
        request: tenants.GetTenantRequest,
        context: aio.ServicerContext[tenants.GetTenantRequest, tenants.GetTenantResponse],
    ) -> tenants.GetTenantResponse:
        """Returns one tenant."""
        return await self._get(request)

    async def ListTenants(
        self,
        request: tenants.ListTenantsRequest,
        context: aio.ServicerContext[tenants.ListTenantsRequest, tenants.ListTenantsResponse],
    ) -> tenants.ListTenantsResponse:
        """Lists tenants by name."""
        return await self._list(request)

    async def UpdateTenant(
        self,
        request: tenants.UpdateTenantRequest,
        context: aio.ServicerContext[tenants.UpdateTenantRequest, tenants.UpdateTenantResponse],
    ) -> tenants.UpdateTenantResponse:
        """Changes the fields of a tenant that the mask names."""
        return await self._update(request, caller().subject)

    async def DeleteTenant(
        self,
        request: tenants.DeleteTenantRequest,
        context: aio.ServicerContext[tenants.DeleteTenantRequest, tenants.DeleteTenantResponse],
    ) -> tenants.DeleteTenantResponse:
        """Deletes a tenant."""
        return await self._delete(request, caller().subject)

    async def PauseTenant(
        self,
        request: tenants.PauseTenantRequest,
        context: aio.ServicerContext[tenants.PauseTenantRequest, tenants.PauseTenantResponse],
    ) -> tenants.PauseTenantResponse:
        """Begins no more turns of a tenant."""
        return await self._pause(request, caller().subject)

    async def ResumeTenant(
        self,
        request: tenants.ResumeTenantRequest,
        context: aio.ServicerContext[tenants.ResumeTenantRequest, tenants.ResumeTenantResponse],
    ) -> tenants.ResumeTenantResponse:
        """Ends the pause of a tenant."""
        return await self._resume(request, caller().subject)


class AgentApi(AgentServiceServicer):
    """Keeps agents in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._create = CreateAgent(store)
        self._get = GetAgent(store)
        self._list = ListAgents(store)
        self._update = UpdateAgent(store)
        self._delete = DeleteAgent(store)
        self._pause = PauseAgent(store)
        self._resume = ResumeAgent(store)

    async def CreateAgent(
        self,
        request: agents.CreateAgentRequest,
        context: aio.ServicerContext[agents.CreateAgentRequest, agents.CreateAgentResponse],
    ) -> agents.CreateAgentResponse:
        """Creates an agent."""
        return await self._create(request, caller().subject)

    async def GetAgent(
        self,
        request: agents.GetAgentRequest,
        context: aio.ServicerContext[agents.GetAgentRequest, agents.GetAgentResponse],
    ) -> agents.GetAgentResponse:
        """Returns one agent."""
        return await self._get(request)

    async def ListAgents(
        self,
        request: agents.ListAgentsRequest,
        context: aio.ServicerContext[agents.ListAgentsRequest, agents.ListAgentsResponse],
    ) -> agents.ListAgentsResponse:
        """Lists the agents of a tenant by name."""
        return await self._list(request)

    async def UpdateAgent(
        self,
        request: agents.UpdateAgentRequest,
        context: aio.ServicerContext[agents.UpdateAgentRequest, agents.UpdateAgentResponse],
    ) -> agents.UpdateAgentResponse:
        """Changes the fields of an agent that the mask names."""
        return await self._update(request, caller().subject)

    async def DeleteAgent(
        self,
        request: agents.DeleteAgentRequest,
        context: aio.ServicerContext[agents.DeleteAgentRequest, agents.DeleteAgentResponse],
    ) -> agents.DeleteAgentResponse:
        """Deletes an agent."""
        return await self._delete(request, caller().subject)

    async def PauseAgent(
        self,
        request: agents.PauseAgentRequest,
        context: aio.ServicerContext[agents.PauseAgentRequest, agents.PauseAgentResponse],
    ) -> agents.PauseAgentResponse:
        """Begins no more turns of an agent."""
        return await self._pause(request, caller().subject)

    async def ResumeAgent(
        self,
        request: agents.ResumeAgentRequest,
        context: aio.ServicerContext[agents.ResumeAgentRequest, agents.ResumeAgentResponse],
    ) -> agents.ResumeAgentResponse:
        """Ends the pause of an agent."""
        return await self._resume(request, caller().subject)


class ConfigApi(ConfigServiceServicer):
    """Feeds the runtime."""

    def __init__(self, watch: WatchConfig) -> None:
        self._watch = watch

    async def WatchConfig(
        self,
        request: config.WatchConfigRequest,
        context: aio.ServicerContext[config.WatchConfigRequest, config.WatchConfigResponse],
    ) -> AsyncIterator[config.WatchConfigResponse]:
        """Streams the configuration: first everything, then every change, in order."""
        frames = self._watch(request)
        try:
            async for frame in frames:
                yield frame
        finally:
            await frames.aclose()
