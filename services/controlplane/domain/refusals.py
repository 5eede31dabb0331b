"""What the control plane refuses, each refusal with its reason and what to change.

One function per refusal, so that two use cases never say the same thing in two ways.
"""

from __future__ import annotations

from collections.abc import Mapping

from soma.common.v1.error_reason_pb2 import ErrorReason

from soma_common.errors import (
    AlreadyExists,
    Conflict,
    FailedPrecondition,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)


def invalid_field(
    field: str,
    description: str,
    reason: Reason = ErrorReason.ERROR_REASON_INVALID_REQUEST,
    metadata: Mapping[str, str] | None = None,
) -> InvalidRequest:
    """`field` of the request breaks a rule; `description` says which and what to send instead."""
    return InvalidRequest(
        reason,
        f"{field}: {description}",
        metadata=metadata,
        field_violations=[FieldViolation(field=field, description=description)],
    )


def tenant_not_found(tenant: str) -> NotFound:
    """No such tenant."""
    return NotFound(
        ErrorReason.ERROR_REASON_TENANT_NOT_FOUND,
        f"there is no tenant {tenant!r}; ListTenants shows those there are",
        metadata={"tenant": tenant},
    )


def agent_not_found(tenant: str, agent: str) -> NotFound:
    """No such agent in a tenant that exists."""
    return NotFound(
        ErrorReason.ERROR_REASON_AGENT_NOT_FOUND,
        f"tenant {tenant!r} has no agent {agent!r}; ListAgents shows those it has",
        metadata={"tenant": tenant, "agent": agent},
    )


def already_exists(name: str) -> AlreadyExists:
    """The name is taken."""
    return AlreadyExists(
        ErrorReason.ERROR_REASON_ALREADY_EXISTS,
        f"{name} exists already: update it, or choose another id",
        metadata={"name": name},
    )


def etag_mismatch(name: str, sent: str, stored: str) -> Conflict:
    """Somebody changed the resource after the caller read it."""
    return Conflict(
        ErrorReason.ERROR_REASON_ETAG_MISMATCH,
        f"{name} was changed in between: read it again and repeat the change with its etag {stored!r}",
        metadata={"name": name, "sent_etag": sent, "stored_etag": stored},
    )


def not_empty(name: str) -> FailedPrecondition:
    """A tenant that still has agents."""
    return FailedPrecondition(
        ErrorReason.ERROR_REASON_NOT_EMPTY,
        f"{name} still has agents: delete them first, or set force to delete them too",
        metadata={"name": name},
    )


def request_id_reused(request_id: str) -> AlreadyExists:
    """A request id that was used within its life for another request."""
    return AlreadyExists(
        ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
        f"request_id {request_id!r} was used before with another content: choose a new one for a new request",
        metadata={"request_id": request_id},
        field_violations=[FieldViolation(field="request_id", description="used before with another content")],
    )


def watcher_too_slow(instance: str, bound: int) -> ResourceExhausted:
    """A watcher that let more than `bound` changes pile up."""
    return ResourceExhausted(
        ErrorReason.ERROR_REASON_QUEUE_FULL,
        f"watcher {instance!r} is more than {bound} changes behind: watch again and read faster",
        metadata={"bound": str(bound)},
        retry_delay_s=1.0,
    )


def too_many_watchers(bound: int) -> ResourceExhausted:
    """As many watchers as this instance serves."""
    return ResourceExhausted(
        ErrorReason.ERROR_REASON_QUEUE_FULL,
        f"this instance serves {bound} watchers already: watch another instance, or later",
        metadata={"bound": str(bound)},
        retry_delay_s=5.0,
    )


def watch_again(why: str) -> Unavailable:
    """Changes may have been missed, so watchers need a new complete copy."""
    return Unavailable(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, f"{why}: watch again", retry_delay_s=0.1)


def stopping() -> Unavailable:
    """This instance is shutting down."""
    return Unavailable(
        ErrorReason.ERROR_REASON_DRAINING, "this instance is shutting down: watch again", retry_delay_s=0.1
    )
