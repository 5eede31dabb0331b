"""GetAgent: one agent by name."""

from __future__ import annotations

from soma.controlplane.v1.agent_service_pb2 import GetAgentRequest, GetAgentResponse

from services.controlplane.application.ports import ConfigStore
from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.refusals import agent_not_found, tenant_not_found


class GetAgent:
    """Reads agents from `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: GetAgentRequest) -> GetAgentResponse:
        """Return the agent.

        Raises:
            NotFound: TENANT_NOT_FOUND or AGENT_NOT_FOUND.
            InvalidRequest: the name has another form.
        """
        name = AgentName.parse(request.name, "name")
        agent = await self._store.agent(name)
        if agent is not None:
            return GetAgentResponse(agent=agent)
        if await self._store.tenant(TenantName(name.tenant)) is None:
            raise tenant_not_found(name.tenant)
        raise agent_not_found(name.tenant, name.agent)
