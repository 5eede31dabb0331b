"""DeleteTenant: a tenant, and with `force` its agents too."""

from __future__ import annotations

from soma.controlplane.v1.tenant_service_pb2 import DeleteTenantRequest, DeleteTenantResponse

from services.controlplane.application.answer_once import answer_once, ask
from services.controlplane.application.ports import ALL_TENANTS, Change, ConfigStore
from services.controlplane.domain.names import TenantName
from services.controlplane.domain.refusals import not_empty, tenant_not_found
from services.controlplane.domain.version import check_etag


class DeleteTenant:
    """Removes tenants from `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: DeleteTenantRequest, actor: str) -> DeleteTenantResponse:
        """Delete the tenant; watchers see it and its agents go under one version.

        Raises:
            NotFound: TENANT_NOT_FOUND.
            Conflict: ETAG_MISMATCH.
            FailedPrecondition: NOT_EMPTY, it has agents and `force` is not set.
            AlreadyExists: the request id was used for another request.
        """
        name = TenantName.parse(request.name, "name")

        async def apply(change: Change) -> DeleteTenantResponse:
            stored = await change.tenant(name)
            if stored is None:
                raise tenant_not_found(name.tenant)
            check_etag(stored.name, request.etag, stored.etag)
            agents = await change.agents_of(name)
            if agents and not request.force:
                raise not_empty(stored.name)
            for agent in agents:
                await change.remove_agent(agent)
            await change.remove_tenant(stored)
            return DeleteTenantResponse()

        asked = ask(actor, "DeleteTenant", ALL_TENANTS, request)
        return await answer_once(self._store, asked, DeleteTenantResponse, apply)
