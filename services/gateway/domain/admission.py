"""The rules an item must keep to be stored, and the stored form of one that does.

Everything that could stop a partition later is refused here, before the receipt: the router takes what comes from
the bus without looking inside. A message of plain text is checked by hand; one with data or files by the rules of
its contract.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import protovalidate
from google.protobuf.message import EncodeError
from google.protobuf.struct_pb2 import Struct, Value
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Message, Part, Role, SessionKey
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.router.v1.inbound_pb2 import Inbound, InboundKind

from services.gateway.domain.refusal import Refused
from soma_common import ids
from soma_common.layout import LaneLayout

MAX_KEY_CHARS: Final = 256
MAX_PARTS: Final = 64
MAX_METADATA: Final = 32
SERVED_POLICIES: Final = frozenset(ArrivalPolicy.values())
"""What a message may ask for when a turn runs; a policy that no router serves is refused, not taken for another one."""

_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_INVALID: Final = ErrorReason.ERROR_REASON_INVALID_REQUEST
# A look-up in a generated enum costs about as much as a digest, so what each message needs is looked up once.
_USER: Final = Role.ROLE_USER
_NO_ROLE: Final = Role.ROLE_UNSPECIFIED
_CHANNEL_ROLES: Final = frozenset((_NO_ROLE, _USER))
_ONE_TEXT: Final[list[str | None]] = ["text"]
_MESSAGE: Final = InboundKind.INBOUND_KIND_MESSAGE
_CANCEL: Final = InboundKind.INBOUND_KIND_CANCEL


@dataclass(slots=True)  # not frozen: there is one for each message, and that would cost three times as much
class Submission:
    """What a channel asks for, apart from the content."""

    tenant: str
    agent: str
    channel: str
    session: str
    idempotency_key: str
    policy: ArrivalPolicy.ValueType = ArrivalPolicy.ARRIVAL_POLICY_UNSPECIFIED
    deliver: bool = True
    """Whether the outcome goes to the channel's adapters."""
    traceparent: str = ""

    @property
    def key(self) -> SessionKey:
        """The session key as the contracts have it."""
        return SessionKey(tenant=self.tenant, agent=self.agent, channel=self.channel, session=self.session)

    def message_id(self, layout: LaneLayout) -> bytes:
        """The id of the message."""
        return layout.message_id(self.tenant, self.agent, self.channel, self.session, self.idempotency_key)


def admit_message(
    submission: Submission, message: Message, layout: LaneLayout, *, max_content_bytes: int, now_ms: int
) -> Inbound:
    """The stored form of a message. An unset role becomes the user's.

    Raises:
        Refused: the key or the message breaks a rule; nothing is stored.
    """
    _check_key(submission)
    if submission.policy not in SERVED_POLICIES:
        raise Refused(_INVALID, "policy: not one of this release; send one of them or leave it unset")
    content = _content(message, max_content_bytes)
    return _inbound(submission, layout, _MESSAGE, content, ids.content_hash(content), now_ms)


def admit_cancel(submission: Submission, turn_id: bytes, layout: LaneLayout, *, now_ms: int) -> Inbound:
    """The stored form of a cancel, ordered among the messages of its session. `turn_id` is 16 bytes, or empty for
    whatever runs.

    Raises:
        Refused: the key or the turn id breaks a rule; nothing is stored.
    """
    _check_key(submission)
    if turn_id and len(turn_id) != ids.ID_BYTES:
        raise Refused(_INVALID, f"turn_id: {len(turn_id)} bytes; a turn id has {ids.ID_BYTES}, or leave it empty")
    inbound = _inbound(submission, layout, _CANCEL, b"", ids.content_hash(b"cancel" + turn_id), now_ms)
    inbound.cancel_turn_id = turn_id
    return inbound


def stored_content(message: Message) -> bytes:
    """The bytes that are stored of a message: the same for the same message. Sets an unset role.

    Raises:
        Refused: it is nested too deeply.
    """
    if message.role == _NO_ROLE:
        message.role = _USER
    try:
        return message.SerializeToString(deterministic=True)
    except EncodeError as error:
        raise Refused(_INVALID, "message: nested too deeply") from error


def _inbound(
    submission: Submission,
    layout: LaneLayout,
    kind: InboundKind.ValueType,
    content: bytes,
    digest: bytes,
    now_ms: int,
) -> Inbound:
    tenant, agent, channel, session = submission.tenant, submission.agent, submission.channel, submission.session
    traceparent = submission.traceparent
    return Inbound(
        session_id=ids.session_id(tenant, agent, channel, session),
        message_id=layout.message_id(tenant, agent, channel, session, submission.idempotency_key),
        content_hash=digest,
        accept_time_ms=now_ms,
        agent=agent,
        channel=channel,
        session=session,
        content=content,
        policy=submission.policy,
        deliver=submission.deliver,
        # W3C trace context, section 3.2: what cannot be read is ignored.
        traceparent=traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else "",
        kind=kind,
    )


@lru_cache(ids.KNOWN_SESSIONS)
def _check_names(agent: str, channel: str, session: str) -> None:
    """Names that were found good are not looked at again while their session speaks; what is refused is not kept."""
    if not ids.is_session(session):
        raise Refused(_INVALID, "session: must be 1 to 128 letters, digits and `._~:@+=-`")
    for field, value in (("agent", agent), ("channel", channel)):
        if not ids.is_slug(value):
            raise Refused(_INVALID, f"{field}: must be 1 to 63 lower-case letters, digits and inner hyphens")


def _check_key(submission: Submission) -> None:
    _check_names(submission.agent, submission.channel, submission.session)
    key = submission.idempotency_key
    if not key:
        raise Refused(
            ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_MISSING,
            "idempotency_key: missing; send the provider's message id, or a random one that a retry repeats",
        )
    if len(key) > MAX_KEY_CHARS:
        raise Refused(_INVALID, f"idempotency_key: {len(key)} characters; at most {MAX_KEY_CHARS}")
    if "\0" in key:
        raise Refused(ErrorReason.ERROR_REASON_CONTENT_INVALID, "idempotency_key: holds U+0000; remove it")


def _content(message: Message, max_bytes: int) -> bytes:
    """Checks the message and serializes it."""
    if message.role not in _CHANNEL_ROLES:
        raise Refused(_INVALID, "message.role: a channel speaks as ROLE_USER; send that or leave it unset")
    parts = message.parts
    if len(parts) == 1 and parts[0].text:
        kinds: list[str | None] = _ONE_TEXT  # nearly always
    else:
        kinds = [part.WhichOneof("content") for part in parts]
    if not any(map(_says, parts, kinds)):
        raise Refused(ErrorReason.ERROR_REASON_CONTENT_EMPTY, "message.parts: nothing is said; send at least one part")
    content = stored_content(message)
    if len(content) > max_bytes:
        raise Refused(
            ErrorReason.ERROR_REASON_CONTENT_TOO_LARGE,
            f"message: {len(content)} bytes; at most {max_bytes}: send big content as a file reference",
            metadata={"max_content_bytes": str(max_bytes)},
        )
    if kinds.count("text") < len(kinds) or len(kinds) > MAX_PARTS or len(message.metadata) > MAX_METADATA:
        _validate(message)
    # A zero byte is rare and harmless outside a text, so the texts are looked at only when there is one.
    if b"\0" in content and any("\0" in text for text in _texts(message)):
        raise Refused(ErrorReason.ERROR_REASON_CONTENT_INVALID, "message: a text holds U+0000; remove it")
    return content


def _says(part: Part, kind: str | None) -> bool:
    """Whether a part holds anything."""
    return bool(part.text) if kind == "text" else kind is not None


def _validate(message: Message) -> None:
    """The contract's rules, for all but a few parts of plain text."""
    try:
        protovalidate.validate(message)
    except protovalidate.ValidationError as error:
        raise Refused(_INVALID, "; ".join(_describe(violation) for violation in error.violations)) from None


def _describe(violation: protovalidate.Violation) -> str:
    field = violation.proto.field
    path = ".".join(element.field_name for element in field.elements) if field else ""
    return f"message.{path}: {violation.proto.message}"


def _texts(message: Message) -> Iterable[str]:
    """Every text a message holds, keys included."""
    for key, value in message.metadata.items():
        yield key
        yield value
    for part in message.parts:
        match part.WhichOneof("content"):
            case "text":
                yield part.text
            case "data":
                yield from _struct_texts(part.data)
            case "file":
                file = part.file
                yield from (file.uri, file.media_type, file.name, file.sha256)


def _struct_texts(data: Struct) -> Iterable[str]:
    for key, value in data.fields.items():
        yield key
        yield from _value_texts(value)


def _value_texts(value: Value) -> Iterable[str]:
    match value.WhichOneof("kind"):
        case "string_value":
            yield value.string_value
        case "struct_value":
            yield from _struct_texts(value.struct_value)
        case "list_value":
            for element in value.list_value.values:
                yield from _value_texts(element)
