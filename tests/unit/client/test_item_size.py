"""What the kit refuses for its size is what the gateway would refuse, in the same words."""

import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Message, Part, Role
from soma.gateway.v1.channel_service_pb2 import Cancel, InboundMessage

from services.gateway.domain.admission import Submission, admit_message
from services.gateway.domain.refusal import Refused
from soma_common.client.channel_client import MAX_NAMES_BYTES, _check_size
from soma_common.errors import InvalidRequest, to_proto
from soma_common.layout import LaneLayout

BOUND = 2000
LAYOUT = LaneLayout(8, 1)


def said(size: int, role: Role.ValueType) -> Message:
    """A message that is stored in so many bytes."""
    message = Message(role=Role.ROLE_USER, parts=[Part(text="x" * (size // 2))], metadata={"k": "v"})
    message.parts[0].text += "x" * (size - message.ByteSize())
    assert message.ByteSize() == size
    message.role = role
    return message


@pytest.mark.parametrize("role", [Role.ROLE_UNSPECIFIED, Role.ROLE_USER])
@pytest.mark.parametrize("size", range(BOUND - 3, BOUND + 4))
def test_the_content_is_counted_as_the_gateway_does(size: int, role: Role.ValueType) -> None:
    item = InboundMessage(
        ref=1,
        agent="a" * 63,
        session="s" * 128,
        idempotency_key="\U0001f511" * 256,
        message=said(size, role),
        traceparent="0" * 55,
    )
    submission = Submission("t", item.agent, "c", item.session, item.idempotency_key)
    if size <= BOUND:
        _check_size(item, item.ByteSize(), BOUND)
        admit_message(submission, item.message, LAYOUT, max_content_bytes=BOUND, now_ms=1)
        return
    with pytest.raises(InvalidRequest) as here:
        _check_size(item, item.ByteSize(), BOUND)
    with pytest.raises(Refused) as there:
        admit_message(submission, item.message, LAYOUT, max_content_bytes=BOUND, now_ms=1)
    assert to_proto(here.value) == there.value.error
    assert here.value.reason == ErrorReason.ERROR_REASON_CONTENT_TOO_LARGE


@pytest.mark.parametrize("field", ["agent", "session", "idempotency_key", "traceparent"])
def test_what_is_beside_the_content_has_a_bound_too(field: str) -> None:
    item = InboundMessage(message=said(100, Role.ROLE_USER))
    setattr(item, field, "x" * (MAX_NAMES_BYTES + 1))
    with pytest.raises(InvalidRequest, match="beside the message") as refused:
        _check_size(item, item.ByteSize(), BOUND)
    assert refused.value.reason == ErrorReason.ERROR_REASON_INVALID_REQUEST


def test_a_cancel_has_no_content() -> None:
    cancel = Cancel(session="x" * BOUND)
    _check_size(cancel, cancel.ByteSize(), BOUND)
    cancel = Cancel(session="x" * MAX_NAMES_BYTES)
    with pytest.raises(InvalidRequest, match="beside the message"):
        _check_size(cancel, cancel.ByteSize(), BOUND)
