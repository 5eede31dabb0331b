"""What the tool gateway refuses, each refusal with its reason and what to change. A tool's own failure is no refusal:
it is a result (`outcome.Failure`), told to the model."""

from __future__ import annotations

from soma.common.v1.error_reason_pb2 import ErrorReason

from soma_common.errors import (
    AlreadyExists,
    Conflict,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)


def invalid_field(
    field: str, description: str, reason: Reason = ErrorReason.ERROR_REASON_INVALID_REQUEST
) -> InvalidRequest:
    """`field` of the request breaks a rule; `description` says which and what to send instead."""
    return InvalidRequest(reason, f"{field}: {description}", field_violations=[FieldViolation(field, description)])


def key_missing() -> InvalidRequest:
    """A call without an idempotency key: it could run twice."""
    return invalid_field(
        "idempotency_key",
        "required: 1 to 128 printable ASCII characters, the same for every retry of this call and for no other call",
        ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_MISSING,
    )


def key_reused(key: str) -> AlreadyExists:
    """The key belongs to a call of another session, tool or arguments."""
    return AlreadyExists(
        ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED,
        f"idempotency_key {key!r} was used for another session, tool or arguments: choose another key for another call",
        metadata={"idempotency_key": key},
    )


def key_reserved(key: str) -> InvalidRequest:
    """The key of a compensation: nobody else may run or cancel it."""
    return invalid_field("idempotency_key", f"{key!r} ends like the key of a compensation: choose another key")


def tool_not_found(tenant: str, agent: str, tool: str) -> NotFound:
    """No such tool, or not for this tenant or agent: the two are not told apart, so that nobody can look for others'
    tools."""
    return NotFound(
        ErrorReason.ERROR_REASON_TOOL_NOT_FOUND,
        f"agent {agent!r} of tenant {tenant!r} has no tool {tool!r}:"
        " ListTools shows the tenant's tools, and the agent's spec must name it",
        metadata={"tenant": tenant, "agent": agent, "tool": tool},
    )


def call_cancelled(key: str) -> Conflict:
    """The call was cancelled before it ran; it never will."""
    return Conflict(
        ErrorReason.ERROR_REASON_TOOL_CANCELLED,
        f"the call {key!r} was cancelled before it ran",
        metadata={"idempotency_key": key},
    )


def outcome_unknown(key: str, tool: str) -> Conflict:
    """The call was begun and it cannot be known what it did; it is never tried again."""
    return Conflict(
        ErrorReason.ERROR_REASON_TOOL_OUTCOME_UNKNOWN,
        f"the call {key!r} of {tool!r} was begun and its end is not known:"
        " look at what the tool acts on before you repeat it under another key",
        metadata={"idempotency_key": key, "tool": tool},
    )


def too_many_runs(what: str, bound: int) -> ResourceExhausted:
    """As many calls as may run at once; this one was not begun."""
    return ResourceExhausted(
        ErrorReason.ERROR_REASON_QUEUE_FULL,
        f"{bound} tool calls of {what} run or wait already; this one was not begun",
        metadata={"bound": str(bound), "scope": what},
        retry_delay_s=0.2,
    )


def too_many_waiting(what: str, bound: int, key: str) -> ResourceExhausted:
    """As many requests as may wait for calls that were begun before; this request's call goes on without it."""
    return ResourceExhausted(
        ErrorReason.ERROR_REASON_QUEUE_FULL,
        f"{bound} requests of {what} wait for calls that were begun before; the call {key!r} was begun too and may be"
        " running: ask again with the same key",
        metadata={"bound": str(bound), "scope": what, "idempotency_key": key},
        retry_delay_s=0.5,
    )


def lease_not_held() -> Unavailable:
    """This instance cannot show that it lives, so it begins nothing."""
    return Unavailable(
        ErrorReason.ERROR_REASON_STORE_UNAVAILABLE,
        "this instance could not renew its lease in the database; nothing was begun",
        retry_delay_s=1.0,
    )


def draining() -> Unavailable:
    """This instance is shutting down."""
    return Unavailable(
        ErrorReason.ERROR_REASON_DRAINING, "this instance is shutting down: call again", retry_delay_s=0.2
    )


def access_unknown() -> Unavailable:
    """No configuration has arrived yet, so nobody is known to be allowed anything."""
    return Unavailable(
        ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
        "the control plane has not told this instance yet which tools agents may use; nothing was begun",
        retry_delay_s=1.0,
    )
