"""PauseTenant and ResumeTenant: whether a tenant's waiting messages become turns."""

from __future__ import annotations

from soma.controlplane.v1.tenant_service_pb2 import (
    PauseTenantRequest,
    PauseTenantResponse,
    ResumeTenantRequest,
    ResumeTenantResponse,
    Tenant,
)

from services.controlplane.application.answer_once import answer_once, ask
from services.controlplane.application.ports import ALL_TENANTS, Change, ConfigStore
from services.controlplane.domain.names import TenantName
from services.controlplane.domain.refusals import tenant_not_found
from services.controlplane.domain.tenant import paused_tenant


class PauseTenant:
    """Pauses tenants in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: PauseTenantRequest, actor: str) -> PauseTenantResponse:
        """Pause the tenant; one that is paused stays as it is.

        Raises:
            NotFound: TENANT_NOT_FOUND.
            Conflict: ETAG_MISMATCH.
            AlreadyExists: the request id was used for another request.
        """
        name = TenantName.parse(request.name, "name")

        async def apply(change: Change) -> PauseTenantResponse:
            return PauseTenantResponse(tenant=await _set(change, name, request.etag, paused=True))

        asked = ask(actor, "PauseTenant", ALL_TENANTS, request)
        return await answer_once(self._store, asked, PauseTenantResponse, apply)


class ResumeTenant:
    """Ends the pauses of tenants in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: ResumeTenantRequest, actor: str) -> ResumeTenantResponse:
        """Let the tenant go on; one that is not paused stays as it is. Raises what PauseTenant raises."""
        name = TenantName.parse(request.name, "name")

        async def apply(change: Change) -> ResumeTenantResponse:
            return ResumeTenantResponse(tenant=await _set(change, name, request.etag, paused=False))

        asked = ask(actor, "ResumeTenant", ALL_TENANTS, request)
        return await answer_once(self._store, asked, ResumeTenantResponse, apply)


async def _set(change: Change, name: TenantName, etag: str, *, paused: bool) -> Tenant:
    """The tenant as the change leaves it."""
    stored = await change.tenant(name)
    if stored is None:
        raise tenant_not_found(name.tenant)
    changed = paused_tenant(stored, etag, change.stamp, paused=paused)
    if changed is not None:
        await change.put_tenant(stored, changed)
    return changed or stored
