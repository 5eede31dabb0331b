"""ListTenants: all tenants, page by page, sorted by id."""

from __future__ import annotations

from soma.controlplane.v1.tenant_service_pb2 import ListTenantsRequest, ListTenantsResponse

from services.controlplane.application.ports import ConfigStore
from services.controlplane.domain.names import TenantName
from soma_common.paging import Page


class ListTenants:
    """Reads tenants from `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: ListTenantsRequest) -> ListTenantsResponse:
        """Return a page.

        Raises:
            InvalidRequest: PAGE_TOKEN_INVALID.
        """
        page = Page.asked(("tenants",), request.page_size, request.page_token)
        found = await self._store.tenants(page.after, page.size + 1)  # One more tells whether there is a next page.
        shown = found[: page.size]
        more = len(found) > page.size
        token = page.next_token(TenantName.parse(shown[-1].name, "name").tenant) if more else ""
        return ListTenantsResponse(tenants=shown, next_page_token=token)
