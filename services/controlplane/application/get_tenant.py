"""GetTenant: one tenant by name."""

from __future__ import annotations

from soma.controlplane.v1.tenant_service_pb2 import GetTenantRequest, GetTenantResponse

from services.controlplane.application.ports import ConfigStore
from services.controlplane.domain.names import TenantName
from services.controlplane.domain.refusals import tenant_not_found


class GetTenant:
    """Reads tenants from `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: GetTenantRequest) -> GetTenantResponse:
        """Return the tenant.

        Raises:
            NotFound: TENANT_NOT_FOUND.
            InvalidRequest: the name has another form.
        """
        name = TenantName.parse(request.name, "name")
        tenant = await self._store.tenant(name)
        if tenant is None:
            raise tenant_not_found(name.tenant)
        return GetTenantResponse(tenant=tenant)
