"""What a tenant may be. The contract's message is the entity: a second class for it would have to agree with it."""

from __future__ import annotations

from typing import Final

from google.protobuf.field_mask_pb2 import FieldMask
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.domain.field_mask import merged
from services.controlplane.domain.names import TenantName
from services.controlplane.domain.text import check_text
from services.controlplane.domain.version import Stamp, check_etag, etag_of

WRITABLE: Final = ("display_name", "weight", "max_running_turns", "suspended")
"""The fields a caller may set; all others are the server's."""
BY_VERB: Final = {"paused": "PauseTenant and ResumeTenant"}
"""The server's fields that a caller changes by a verb of their own, and which."""


def new_tenant(name: TenantName, wanted: Tenant, stamp: Stamp) -> Tenant:
    """The tenant `name` as its creator wants it.

    Raises:
        InvalidRequest: a field breaks a rule.
    """
    tenant = merged(Tenant(), wanted, FieldMask(paths=["*"]), WRITABLE, BY_VERB)
    _check(tenant)
    tenant.name = str(name)
    tenant.create_time.FromDatetime(stamp.time)
    return _stamped(tenant, stamp)


def changed_tenant(stored: Tenant, patch: Tenant, mask: FieldMask | None, stamp: Stamp) -> Tenant | None:
    """`stored` with the fields of `patch` that `mask` names; None when that changes nothing.

    Raises:
        Conflict: the patch carries an etag that is not the stored one.
        InvalidRequest: the mask or a field breaks a rule.
    """
    check_etag(stored.name, patch.etag, stored.etag)
    tenant = merged(stored, patch, mask, WRITABLE, BY_VERB)
    _check(tenant)
    return None if tenant == stored else _stamped(tenant, stamp)


def paused_tenant(stored: Tenant, etag: str, stamp: Stamp, *, paused: bool) -> Tenant | None:
    """`stored` with its pause begun or ended; None when that changes nothing.

    Raises:
        Conflict: `etag` is set and not the stored one.
    """
    check_etag(stored.name, etag, stored.etag)
    if stored.paused == paused:
        return None
    tenant = Tenant()
    tenant.CopyFrom(stored)
    tenant.paused = paused
    return _stamped(tenant, stamp)


def _stamped(tenant: Tenant, stamp: Stamp) -> Tenant:
    tenant.etag = etag_of(tenant.name, stamp.version)
    tenant.update_time.FromDatetime(stamp.time)
    return tenant


def _check(tenant: Tenant) -> None:
    check_text("tenant.display_name", tenant.display_name)
