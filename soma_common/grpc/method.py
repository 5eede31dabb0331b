"""A served method as its contract describes it: who may call it, which tenant it touches, how long it may take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from re import DOTALL
from re import compile as pattern

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from soma.common.v1 import authz_pb2, error_reason_pb2

from soma_common.errors import FailedPrecondition, FieldViolation, InvalidRequest
from soma_common.grpc.service_config import DEFAULT_UNARY_TIMEOUT_S, timeout_of

_TENANT = pattern(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_TENANT_NAME = pattern(r"tenants/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)(?:/.*)?", DOTALL)

PUBLIC_SERVICES = frozenset(
    {
        "grpc.channelz.v1.Channelz",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)
"""gRPC's own services: their contracts cannot carry our option, and they ask for no identity."""


class MissingAuthzRule(ValueError):
    """A server has a method whose contract does not say who may call it; it must not start."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a served service."""

    path: str
    """`/soma.router.v1.TurnService/GetTurn`."""
    public: bool
    """True: no identity is asked for."""
    permission: str
    """What the caller needs."""
    tenant_of: Callable[[Message], str]
    """Returns the tenant a request touches ("" for none in particular); raises InvalidRequest naming the field, or
    FailedPrecondition when a stream does not open with the message that holds it."""
    opening: str | None
    """The field of a stream's first message that opens it: `hello`. What else that message holds are items, and for the
    handler to judge, since a refused item must not end the stream. None: the whole first message opens it."""
    default_timeout_s: float | None
    """For calls without a deadline; None for streams: they may last."""


def describe_service(full_name: str) -> dict[str, Method]:
    """Return the methods of a service by name.

    Raises MissingAuthzRule when a method states no rule, or one that does not fit its request.
    """
    try:
        service: ServiceDescriptor = descriptor_pool.Default().FindServiceByName(full_name)
    except KeyError:
        raise ValueError(f"no generated code of a service {full_name!r} is imported") from None
    return {method.name: _describe(method) for method in service.methods}


def _describe(method: MethodDescriptor) -> Method:
    options = method.GetOptions()
    path = f"/{method.containing_service.full_name}/{method.name}"
    rule = options.Extensions[authz_pb2.authz] if options.HasExtension(authz_pb2.authz) else None
    if rule is None or not (rule.public or rule.permission):
        raise MissingAuthzRule(
            f"{path} does not say who may call it: "
            "add `option (soma.common.v1.authz) = {permission: ...}` to its contract"
        )
    unary = not (method.client_streaming or method.server_streaming)
    return Method(
        path=path,
        public=rule.public,
        permission=rule.permission,
        tenant_of=_tenant_reader(path, method, rule.tenant_field),
        opening=_opening(method, rule.tenant_field),
        default_timeout_s=timeout_of(method.containing_service.full_name, method.name)
        or (DEFAULT_UNARY_TIMEOUT_S if unary else None),
    )


def _opening(method: MethodDescriptor, tenant_field: str) -> str | None:
    opening, _, inside = tenant_field.partition(".")
    return opening if method.client_streaming and inside else None


def _tenant_reader(path: str, method: MethodDescriptor, tenant_field: str) -> Callable[[Message], str]:
    """Return a function that reads the tenant at `tenant_field`, checked here, once, against the request's type."""
    if not tenant_field:
        return lambda _request: ""
    *parents, leaf = steps = tenant_field.split(".")
    _check_path(path, method.input_type, steps)
    opening = _opening(method, tenant_field)

    def read(message: Message) -> str:
        if opening is not None and not message.HasField(opening):
            raise FailedPrecondition(
                error_reason_pb2.ERROR_REASON_PROTOCOL_ORDER, f"the first message of the stream must carry `{opening}`"
            )
        for parent in parents:
            message = getattr(message, parent)
        value: str = getattr(message, leaf)
        found = _TENANT_NAME.fullmatch(value)
        if found is not None:
            return found[1]
        if _TENANT.fullmatch(value) is not None:
            return value
        raise InvalidRequest(
            error_reason_pb2.ERROR_REASON_INVALID_REQUEST,
            f"{tenant_field} does not name a tenant",
            field_violations=[
                FieldViolation(tenant_field, "must be a tenant id or a resource name that starts with tenants/{tenant}")
            ],
        )

    return read


def _check_path(path: str, request: Descriptor, steps: Sequence[str]) -> None:
    at: Descriptor | None = request
    for number, step in enumerate(steps, 1):
        field = at.fields_by_name.get(step) if at is not None else None
        is_last = number == len(steps)
        if field is None or field.is_repeated or (is_last and field.type != FieldDescriptor.TYPE_STRING):
            raise MissingAuthzRule(f"{path}: tenant_field {'.'.join(steps)!r} is no text field of {request.full_name}")
        at = field.message_type
