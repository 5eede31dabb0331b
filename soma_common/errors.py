"""One tree of errors for all services, and its form on the wire.

    SomaError
    ├── InvalidRequest       the request breaks a rule: change it
    ├── Unauthenticated      no valid token: get one
    ├── PermissionDenied     the caller may not do this: ask for the right
    ├── NotFound             no such thing: check the name
    ├── AlreadyExists        the name or key is taken: use another
    ├── Conflict             somebody else was first: read again, then retry
    ├── FailedPrecondition   the system is not in the state the call needs: change that state first
    ├── ResourceExhausted    a bound is reached, nothing was stored: wait, then retry
    ├── Unavailable          a needed part does not answer: retry with the same key
    ├── DeadlineExceeded     the time is over: retry with the same key or allow more
    ├── Unimplemented        not served here
    └── Internal             a defect: report it

The classes say what the caller does; the reason (`soma.common.v1.ErrorReason`) says why. Every reason belongs to
exactly one class and so to one gRPC code (`class_of`, docs/errors.md). On the wire an error is a `google.rpc.Status`
with exactly one `ErrorInfo` of domain `somastack.dev`, and `RetryInfo` or `BadRequest` where they apply.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeAlias

from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from soma.common.v1 import error_reason_pb2 as r
from soma.common.v1 import message_pb2

DOMAIN = "somastack.dev"
"""`google.rpc.ErrorInfo.domain` of every error of this system."""

STATUS_DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata key that carries the serialized `google.rpc.Status` (fixed by gRPC)."""

_REASON_PREFIX = "ERROR_REASON_"
_ERROR_INFO = "google.rpc.ErrorInfo"
_RETRY_INFO = "google.rpc.RetryInfo"
_BAD_REQUEST = "google.rpc.BadRequest"

Reason: TypeAlias = r.ErrorReason.ValueType
"""A value of `soma.common.v1.ErrorReason`."""


class FailedCall(Protocol):
    """What is read of a `grpc.aio.AioRpcError`. Named by shape, so that this module, which the pure core uses,
    imports no gRPC.
    """

    def code(self) -> Any:
        """Return the `grpc.StatusCode`."""
        ...

    def details(self) -> str | None:
        """Return the message."""
        ...

    def trailing_metadata(self) -> Any:
        """Return pairs of key and value, or None."""
        ...


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that breaks a rule.

    `field` is the path in the request (`session.tenant`, `parts[0].text`); `description` says what it has to be.
    """

    field: str
    description: str


class SomaError(Exception):
    """An error with a machine-readable reason.

    `message` is for a person and says what to change. `metadata` holds facts for a program (the name and value of a
    bound). `retry_delay_s` is the wait in seconds before a retry can help; None: no statement.
    """

    code: ClassVar[int] = code_pb2.INTERNAL
    """The gRPC code (`google.rpc.Code`, equal to `grpc.StatusCode.<X>.value[0]`)."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        metadata: Mapping[str, str] | None = None,
        retry_delay_s: float | None = None,
        field_violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: Mapping[str, str] = metadata or {}
        self.retry_delay_s = retry_delay_s
        self.field_violations: Sequence[FieldViolation] = tuple(field_violations)

    def __str__(self) -> str:
        return f"{reason_name(self.reason)}: {self.message}"


class InvalidRequest(SomaError):
    """The request breaks a rule of its contract; sent again unchanged it fails again."""

    code = code_pb2.INVALID_ARGUMENT


class Unauthenticated(SomaError):
    """The call carries no valid bearer token."""

    code = code_pb2.UNAUTHENTICATED


class PermissionDenied(SomaError):
    """The caller is known and may not do this."""

    code = code_pb2.PERMISSION_DENIED


class NotFound(SomaError):
    """The named thing does not exist."""

    code = code_pb2.NOT_FOUND


class AlreadyExists(SomaError):
    """The name or key is taken by something else."""

    code = code_pb2.ALREADY_EXISTS


class Conflict(SomaError):
    """Somebody else was first: read the present state, decide again, retry."""

    code = code_pb2.ABORTED


class FailedPrecondition(SomaError):
    """The call is well formed, but the system is not in the state it needs; a retry alone does not help."""

    code = code_pb2.FAILED_PRECONDITION


class ResourceExhausted(SomaError):
    """A bound is reached and nothing was stored; a retry after `retry_delay_s` may succeed."""

    code = code_pb2.RESOURCE_EXHAUSTED


class Unavailable(SomaError):
    """A needed part does not answer; whether the call took effect is unknown, so retry with the same key."""

    code = code_pb2.UNAVAILABLE


class DeadlineExceeded(SomaError):
    """The time allowed is over; whether the call took effect is unknown."""

    code = code_pb2.DEADLINE_EXCEEDED


class Unimplemented(SomaError):
    """The method is not served here."""

    code = code_pb2.UNIMPLEMENTED


class Internal(SomaError):
    """A defect of the server; the log knows more than the message."""

    code = code_pb2.INTERNAL


_CLASSES: Mapping[Reason, type[SomaError]] = MappingProxyType(
    {
        r.ERROR_REASON_INVALID_REQUEST: InvalidRequest,
        r.ERROR_REASON_UNAUTHENTICATED: Unauthenticated,
        r.ERROR_REASON_PERMISSION_DENIED: PermissionDenied,
        r.ERROR_REASON_TENANT_NOT_FOUND: NotFound,
        r.ERROR_REASON_AGENT_NOT_FOUND: NotFound,
        r.ERROR_REASON_SESSION_NOT_FOUND: NotFound,
        r.ERROR_REASON_TURN_NOT_FOUND: NotFound,
        r.ERROR_REASON_TOOL_NOT_FOUND: NotFound,
        r.ERROR_REASON_ALREADY_EXISTS: AlreadyExists,
        r.ERROR_REASON_ETAG_MISMATCH: Conflict,
        r.ERROR_REASON_REQUEST_ID_REUSED: AlreadyExists,
        r.ERROR_REASON_IDEMPOTENCY_KEY_REUSED: AlreadyExists,
        r.ERROR_REASON_IDEMPOTENCY_KEY_MISSING: InvalidRequest,
        r.ERROR_REASON_CONTENT_EMPTY: InvalidRequest,
        r.ERROR_REASON_CONTENT_TOO_LARGE: InvalidRequest,
        r.ERROR_REASON_CONTENT_INVALID: InvalidRequest,
        r.ERROR_REASON_PROTOCOL_ORDER: FailedPrecondition,
        r.ERROR_REASON_PROTOCOL_VERSION: FailedPrecondition,
        r.ERROR_REASON_QUEUE_FULL: ResourceExhausted,
        r.ERROR_REASON_RATE_LIMITED: ResourceExhausted,
        r.ERROR_REASON_BUS_UNAVAILABLE: Unavailable,
        r.ERROR_REASON_STORE_UNAVAILABLE: Unavailable,
        r.ERROR_REASON_SERVICE_UNAVAILABLE: Unavailable,
        r.ERROR_REASON_DRAINING: Unavailable,
        r.ERROR_REASON_DEADLINE_EXCEEDED: DeadlineExceeded,
        r.ERROR_REASON_AGENT_GONE: FailedPrecondition,
        r.ERROR_REASON_SUSPENDED: FailedPrecondition,
        r.ERROR_REASON_SCHEMA_UNKNOWN: FailedPrecondition,
        r.ERROR_REASON_ITEM_CORRUPT: Internal,
        r.ERROR_REASON_MODEL_UNAUTHENTICATED: FailedPrecondition,
        r.ERROR_REASON_MODEL_REJECTED: FailedPrecondition,
        r.ERROR_REASON_MODEL_RATE_LIMITED: ResourceExhausted,
        r.ERROR_REASON_MODEL_UNAVAILABLE: Unavailable,
        r.ERROR_REASON_MODEL_TIMEOUT: DeadlineExceeded,
        r.ERROR_REASON_CONTEXT_TOO_LONG: FailedPrecondition,
        r.ERROR_REASON_STEP_LIMIT: FailedPrecondition,
        r.ERROR_REASON_TURN_TIMEOUT: DeadlineExceeded,
        r.ERROR_REASON_TURN_POISONED: FailedPrecondition,
        r.ERROR_REASON_TOOL_ARGUMENTS_INVALID: InvalidRequest,
        r.ERROR_REASON_TOOL_FAILED: FailedPrecondition,
        r.ERROR_REASON_TOOL_OUTCOME_UNKNOWN: Conflict,
        r.ERROR_REASON_TOOL_CANCELLED: Conflict,
        r.ERROR_REASON_INVALID_TRANSITION: FailedPrecondition,
        r.ERROR_REASON_TURN_RUNNING: FailedPrecondition,
        r.ERROR_REASON_TURN_NOT_RESUMABLE: FailedPrecondition,
        r.ERROR_REASON_WATCH_POSITION_UNKNOWN: FailedPrecondition,
        r.ERROR_REASON_LEASE_LOST: Conflict,
        r.ERROR_REASON_PAGE_TOKEN_INVALID: InvalidRequest,
        r.ERROR_REASON_DELIVERY_EXHAUSTED: FailedPrecondition,
        r.ERROR_REASON_NOT_EMPTY: FailedPrecondition,
        r.ERROR_REASON_UNIMPLEMENTED: Unimplemented,
        r.ERROR_REASON_INTERNAL: Internal,
    }
)

_REASONS_WITHOUT_DETAILS: Mapping[int, Reason] = MappingProxyType(
    {
        code_pb2.INVALID_ARGUMENT: r.ERROR_REASON_INVALID_REQUEST,
        code_pb2.OUT_OF_RANGE: r.ERROR_REASON_INVALID_REQUEST,
        code_pb2.UNAUTHENTICATED: r.ERROR_REASON_UNAUTHENTICATED,
        code_pb2.PERMISSION_DENIED: r.ERROR_REASON_PERMISSION_DENIED,
        code_pb2.ALREADY_EXISTS: r.ERROR_REASON_ALREADY_EXISTS,
        code_pb2.RESOURCE_EXHAUSTED: r.ERROR_REASON_RATE_LIMITED,
        code_pb2.UNAVAILABLE: r.ERROR_REASON_SERVICE_UNAVAILABLE,
        code_pb2.CANCELLED: r.ERROR_REASON_SERVICE_UNAVAILABLE,
        code_pb2.ABORTED: r.ERROR_REASON_SERVICE_UNAVAILABLE,
        code_pb2.DEADLINE_EXCEEDED: r.ERROR_REASON_DEADLINE_EXCEEDED,
        code_pb2.UNIMPLEMENTED: r.ERROR_REASON_UNIMPLEMENTED,
    }
)
"""What a status means that gRPC itself or a proxy made: it has a code and no `ErrorInfo`."""


def reason_name(reason: int) -> str:
    """Return the name as `ErrorInfo.reason` holds it, such as `QUEUE_FULL`; a number this release lacks becomes
    `UNKNOWN_<n>`."""
    try:
        return r.ErrorReason.Name(Reason(reason)).removeprefix(_REASON_PREFIX)
    except ValueError:
        return f"UNKNOWN_{reason}"


def class_of(reason: int) -> type[SomaError]:
    """Return the class, and with it the gRPC code, that `reason` belongs to; `Internal` for a reason this release
    lacks."""
    return _CLASSES.get(Reason(reason), Internal)


def to_status(error: SomaError) -> status_pb2.Status:
    """Return `error` as the `google.rpc.Status` that a server sends."""
    status = status_pb2.Status(code=class_of(error.reason).code, message=error.message)
    _add(
        status,
        error_details_pb2.ErrorInfo(reason=reason_name(error.reason), domain=DOMAIN, metadata=dict(error.metadata)),
    )
    if error.retry_delay_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_delay_s * 1000))
        _add(status, retry)
    if error.field_violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in error.field_violations:
            bad_request.field_violations.add(field=violation.field, description=violation.description)
        _add(status, bad_request)
    return status


def from_status(status: status_pb2.Status) -> SomaError | None:
    """Return the error that `status` carries, or None when it holds no `ErrorInfo` of this system."""
    info, retry, bad_request = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.BadRequest(),
    )
    retry_delay_s: float | None = None
    for detail in status.details:
        if detail.TypeName() == _ERROR_INFO:
            detail.Unpack(info)
        elif detail.TypeName() == _RETRY_INFO:
            detail.Unpack(retry)
            retry_delay_s = retry.retry_delay.ToMilliseconds() / 1000
        elif detail.TypeName() == _BAD_REQUEST:
            detail.Unpack(bad_request)
    if info.domain != DOMAIN:
        return None
    reason = r.ErrorReason.DESCRIPTOR.values_by_name.get(_REASON_PREFIX + info.reason)
    number = r.ErrorReason.ValueType(reason.number) if reason is not None else r.ERROR_REASON_INTERNAL
    violations = [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
    return class_of(number)(number, status.message, dict(info.metadata), retry_delay_s, violations)


def told_by_peer(error: FailedCall) -> SomaError | None:
    """Return the error that the peer of a failed call sent, or None: the status is gRPC's own or a proxy's."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY:
            try:
                known = from_status(status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode()))
            except DecodeError:
                known = None
            if known is not None:
                return known
    return None


def from_rpc_error(error: FailedCall) -> SomaError:
    """Return a failed call's error as whoever made the call should see it: the peer's own if it sent one, else one by
    the gRPC code. In the latter case the text may name addresses: it is not for callers of this process
    (`from_inner_call`).
    """
    return told_by_peer(error) or _by_code(error, error.details() or error.code().name)


def from_inner_call(error: FailedCall, peer: str) -> SomaError:
    """Return the error of a call that was made to serve somebody, for that somebody: like `from_rpc_error`, with a text
    that names no address but only `peer`. What it leaves out belongs in the log.
    """
    return told_by_peer(error) or _by_code(error, f"calling {peer} failed ({error.code().name})")


def to_proto(error: SomaError) -> message_pb2.Error:
    """Return `error` as data, for a frame or a stored outcome. Field violations become part of the message."""
    message = error.message
    if error.field_violations:
        message += " (" + "; ".join(f"{v.field}: {v.description}" for v in error.field_violations) + ")"
    return message_pb2.Error(
        reason=error.reason,
        message=message,
        retry_delay_ms=int((error.retry_delay_s or 0) * 1000),
        metadata=dict(error.metadata),
    )


def from_proto(error: message_pb2.Error) -> SomaError:
    """Return the error that `to_proto` made, of the class its reason belongs to."""
    delay_s = error.retry_delay_ms / 1000 if error.retry_delay_ms else None
    return class_of(error.reason)(error.reason, error.message, dict(error.metadata), delay_s)


def _by_code(error: FailedCall, message: str) -> SomaError:
    reason = _REASONS_WITHOUT_DETAILS.get(error.code().value[0], r.ERROR_REASON_INTERNAL)
    return class_of(reason)(reason, message)


def _add(status: status_pb2.Status, detail: Message) -> None:
    status.details.add().Pack(detail)
