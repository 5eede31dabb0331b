"""ListAgents: the agents of a tenant, page by page, sorted by id."""

from __future__ import annotations

from soma.controlplane.v1.agent_service_pb2 import ListAgentsRequest, ListAgentsResponse

from services.controlplane.application.ports import ConfigStore
from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.refusals import tenant_not_found
from soma_common.paging import Page


class ListAgents:
    """Reads agents from `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: ListAgentsRequest) -> ListAgentsResponse:
        """Return a page.

        Raises:
            NotFound: TENANT_NOT_FOUND.
            InvalidRequest: PAGE_TOKEN_INVALID, or the parent has another form.
        """
        parent = TenantName.parse(request.parent, "parent")
        page = Page.asked(("agents", str(parent)), request.page_size, request.page_token)
        found = await self._store.agents(
            parent, page.after, page.size + 1
        )  # One more tells whether there is a next page.
        if not found and await self._store.tenant(parent) is None:
            raise tenant_not_found(parent.tenant)
        shown = found[: page.size]
        more = len(found) > page.size
        token = page.next_token(AgentName.parse(shown[-1].name, "name").agent) if more else ""
        return ListAgentsResponse(agents=shown, next_page_token=token)
