"""UpdateAgent: the fields that a mask names, if the caller has seen the present state."""

from __future__ import annotations

from soma.controlplane.v1.agent_service_pb2 import UpdateAgentRequest, UpdateAgentResponse

from services.controlplane.application.answer_once import answer_once, ask
from services.controlplane.application.ports import Change, ConfigStore
from services.controlplane.domain.agent import changed_agent
from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.refusals import agent_not_found, tenant_not_found


class UpdateAgent:
    """Changes agents in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: UpdateAgentRequest, actor: str) -> UpdateAgentResponse:
        """Change the agent; an update that changes nothing leaves its etag as it is and wakes no watcher.

        Raises:
            NotFound: TENANT_NOT_FOUND or AGENT_NOT_FOUND.
            Conflict: ETAG_MISMATCH.
            AlreadyExists: the request id was used for another request.
            InvalidRequest: the mask or a field breaks a rule.
        """
        name = AgentName.parse(request.agent.name, "agent.name")

        async def apply(change: Change) -> UpdateAgentResponse:
            stored = await change.agent(name)
            if stored is None:
                known = await change.tenant(TenantName(name.tenant)) is not None
                raise agent_not_found(name.tenant, name.agent) if known else tenant_not_found(name.tenant)
            changed = changed_agent(stored, request.agent, request.update_mask, change.stamp)
            if changed is not None:
                await change.put_agent(stored, changed)
            return UpdateAgentResponse(agent=changed or stored)

        asked = ask(actor, "UpdateAgent", name.tenant, request)
        return await answer_once(self._store, asked, UpdateAgentResponse, apply)
