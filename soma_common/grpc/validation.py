"""The rules of the contracts (protovalidate), checked on requests before a handler sees them."""

from google.protobuf.message import Message
from protovalidate import Validator, Violation
from soma.common.v1 import error_reason_pb2

from soma_common.errors import FieldViolation, InvalidRequest

MAX_VIOLATIONS = 16
"""So many violations are named; a caller that breaks more has enough to begin with."""

_validator = Validator()  # Caches the compiled rules of each message type; 5 ms the first time, 6 us from then on.


def validate(message: Message, path: str = "") -> None:
    """Return when `message` keeps all rules of its contract; raises InvalidRequest that names the fields which do
    not. `path` is where the message is in its request: `hello`.
    """
    violations = _validator.collect_violations(message)
    if violations:
        fields = [
            FieldViolation(_path(v, path), v.proto.message or v.proto.rule_id) for v in violations[:MAX_VIOLATIONS]
        ]
        first = fields[0]
        raise InvalidRequest(
            error_reason_pb2.ERROR_REASON_INVALID_REQUEST,
            f"{first.field or message.DESCRIPTOR.name}: {first.description}",
            field_violations=fields,
        )


def _path(violation: Violation, text: str) -> str:
    field = violation.proto.field
    if field is None:
        return text
    for element in field.elements:
        text += ("." if text else "") + element.field_name
        if element.subscript is not None:
            key = element.subscript.value
            text += f'["{key}"]' if isinstance(key, str) else f"[{key}]"
    return text
