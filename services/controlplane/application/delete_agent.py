"""DeleteAgent: an agent goes; its revisions stay for the turns that still name them."""

from __future__ import annotations

from soma.controlplane.v1.agent_service_pb2 import DeleteAgentRequest, DeleteAgentResponse

from services.controlplane.application.answer_once import answer_once, ask
from services.controlplane.application.ports import Change, ConfigStore
from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.refusals import agent_not_found, tenant_not_found
from services.controlplane.domain.version import check_etag


class DeleteAgent:
    """Removes agents from `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: DeleteAgentRequest, actor: str) -> DeleteAgentResponse:
        """Delete the agent.

        Raises:
            NotFound: TENANT_NOT_FOUND or AGENT_NOT_FOUND.
            Conflict: ETAG_MISMATCH.
            AlreadyExists: the request id was used for another request.
        """
        name = AgentName.parse(request.name, "name")

        async def apply(change: Change) -> DeleteAgentResponse:
            stored = await change.agent(name)
            if stored is None:
                known = await change.tenant(TenantName(name.tenant)) is not None
                raise agent_not_found(name.tenant, name.agent) if known else tenant_not_found(name.tenant)
            check_etag(stored.name, request.etag, stored.etag)
            await change.remove_agent(stored)
            return DeleteAgentResponse()

        asked = ask(actor, "DeleteAgent", name.tenant, request)
        return await answer_once(self._store, asked, DeleteAgentResponse, apply)
