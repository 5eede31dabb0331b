"""CreateTenant: a new tenant, once per request id."""

from __future__ import annotations

from soma.controlplane.v1.tenant_service_pb2 import CreateTenantRequest, CreateTenantResponse

from services.controlplane.application.answer_once import answer_once, ask
from services.controlplane.application.ports import ALL_TENANTS, Change, ConfigStore
from services.controlplane.domain.names import TenantName
from services.controlplane.domain.refusals import already_exists
from services.controlplane.domain.tenant import new_tenant


class CreateTenant:
    """Creates tenants in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: CreateTenantRequest, actor: str) -> CreateTenantResponse:
        """Create the tenant that `request` describes.

        Raises:
            AlreadyExists: the id is taken (ALREADY_EXISTS), or the request id was used for another request.
            InvalidRequest: a field breaks a rule.
        """
        name = TenantName.parse(f"tenants/{request.tenant_id}", "tenant_id")

        async def apply(change: Change) -> CreateTenantResponse:
            if await change.tenant(name) is not None:
                raise already_exists(str(name))
            tenant = new_tenant(name, request.tenant, change.stamp)
            await change.put_tenant(None, tenant)
            return CreateTenantResponse(tenant=tenant)

        asked = ask(actor, "CreateTenant", ALL_TENANTS, request)
        return await answer_once(self._store, asked, CreateTenantResponse, apply)
