"""UpdateTenant: the fields that a mask names, if the caller has seen the present state."""

from __future__ import annotations

from soma.controlplane.v1.tenant_service_pb2 import UpdateTenantRequest, UpdateTenantResponse

from services.controlplane.application.answer_once import answer_once, ask
from services.controlplane.application.ports import ALL_TENANTS, Change, ConfigStore
from services.controlplane.domain.names import TenantName
from services.controlplane.domain.refusals import tenant_not_found
from services.controlplane.domain.tenant import changed_tenant


class UpdateTenant:
    """Changes tenants in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: UpdateTenantRequest, actor: str) -> UpdateTenantResponse:
        """Change the tenant; an update that changes nothing leaves its etag as it is and wakes no watcher.

        Raises:
            NotFound: TENANT_NOT_FOUND.
            Conflict: ETAG_MISMATCH.
            AlreadyExists: the request id was used for another request.
            InvalidRequest: the mask or a field breaks a rule.
        """
        name = TenantName.parse(request.tenant.name, "tenant.name")

        async def apply(change: Change) -> UpdateTenantResponse:
            stored = await change.tenant(name)
            if stored is None:
                raise tenant_not_found(name.tenant)
            changed = changed_tenant(stored, request.tenant, request.update_mask, change.stamp)
            if changed is not None:
                await change.put_tenant(stored, changed)
            return UpdateTenantResponse(tenant=changed or stored)

        asked = ask(actor, "UpdateTenant", ALL_TENANTS, request)
        return await answer_once(self._store, asked, UpdateTenantResponse, apply)
