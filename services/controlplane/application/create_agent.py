"""CreateAgent: a new agent in a tenant, once per request id."""

from __future__ import annotations

from soma.controlplane.v1.agent_service_pb2 import CreateAgentRequest, CreateAgentResponse

from services.controlplane.application.answer_once import answer_once, ask
from services.controlplane.application.ports import Change, ConfigStore
from services.controlplane.domain.agent import new_agent
from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.refusals import already_exists, tenant_not_found


class CreateAgent:
    """Creates agents in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: CreateAgentRequest, actor: str) -> CreateAgentResponse:
        """Create the agent that `request` describes.

        Raises:
            NotFound: TENANT_NOT_FOUND.
            AlreadyExists: the id is taken (ALREADY_EXISTS), or the request id was used for another request.
            InvalidRequest: a field breaks a rule.
        """
        tenant = TenantName.parse(request.parent, "parent")
        name = AgentName.parse(f"{tenant}/agents/{request.agent_id}", "agent_id")

        async def apply(change: Change) -> CreateAgentResponse:
            if await change.tenant(tenant) is None:
                raise tenant_not_found(tenant.tenant)
            if await change.agent(name) is not None:
                raise already_exists(str(name))
            agent = new_agent(name, request.agent, change.stamp)
            await change.put_agent(None, agent)
            return CreateAgentResponse(agent=agent)

        asked = ask(actor, "CreateAgent", tenant.tenant, request)
        return await answer_once(self._store, asked, CreateAgentResponse, apply)
