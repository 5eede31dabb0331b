from dataclasses import replace

import pytest
from google.protobuf.struct_pb2 import Struct
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import FileReference, Message, Part, Role
from soma.router.v1.inbound_pb2 import InboundKind

from services.gateway.domain.admission import Submission, admit_cancel, admit_message
from services.gateway.domain.refusal import Refused
from services.gateway.domain.stream_number import StreamNumbers
from soma_common.layout import LaneLayout

LAYOUT = LaneLayout(8, 1)
SUBMISSION = Submission("demo", "echo", "line", "s", "k")


def text(value: str) -> Message:
    return Message(parts=[Part(text=value)])


def reason_of(message: Message, submission: Submission = SUBMISSION) -> str:
    with pytest.raises(Refused) as caught:
        admit_message(submission, message, LAYOUT, max_content_bytes=1000, now_ms=1)
    return ErrorReason.Name(caught.value.error.reason).removeprefix("ERROR_REASON_")


def test_an_unset_role_is_the_users_and_the_retry_hashes_the_same() -> None:
    unset = admit_message(SUBMISSION, text("x"), LAYOUT, max_content_bytes=1000, now_ms=1)
    said = Message(role=Role.ROLE_USER, parts=[Part(text="x")])
    named = admit_message(SUBMISSION, said, LAYOUT, max_content_bytes=1000, now_ms=2)
    assert Message.FromString(unset.content).role == Role.ROLE_USER
    assert unset.content_hash == named.content_hash
    assert unset.message_id == named.message_id
    assert (unset.accept_time_ms, named.accept_time_ms) == (1, 2)


def test_metadata_in_any_order_hashes_the_same() -> None:
    keys = [f"k{n}" for n in range(32)]
    hashes = {
        admit_message(
            SUBMISSION,
            Message(parts=[Part(text="x")], metadata=dict.fromkeys(order, "v")),
            LAYOUT,
            max_content_bytes=10_000,
            now_ms=1,
        ).content_hash
        for order in (keys, keys[::-1])
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "hidden",
    [
        Message(parts=[Part(text="ok"), Part(text="a\0")]),
        Message(parts=[Part(text="ok")], metadata={"k\0": "v"}),
        Message(parts=[Part(text="ok")], metadata={"k": "\0"}),
        Message(parts=[Part(data=Struct(fields={"k\0": {"null_value": None}}))]),  # type: ignore[dict-item]
        Message(parts=[Part(file=FileReference(uri="http://x/\0"))]),
    ],
)
def test_a_zero_character_is_found_wherever_it_hides(hidden: Message) -> None:
    assert reason_of(hidden) == "CONTENT_INVALID"


def test_a_zero_character_deep_in_data_is_found() -> None:
    data = Struct()
    data.update({"list": [1, {"deep": ["fine", "a\0b"]}]})
    assert reason_of(Message(parts=[Part(data=data)])) == "CONTENT_INVALID"


def test_zero_bytes_outside_of_texts_are_fine() -> None:
    data = Struct()
    data.update({"number": 0.0, "flag": False})
    inbound = admit_message(SUBMISSION, Message(parts=[Part(data=data)]), LAYOUT, max_content_bytes=1000, now_ms=1)
    assert b"\0" in inbound.content


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Message(), "CONTENT_EMPTY"),
        (Message(parts=[Part(), Part(text="")]), "CONTENT_EMPTY"),
        (text("x" * 1000), "CONTENT_TOO_LARGE"),
        (Message(parts=[Part(text="x")] * 65), "INVALID_REQUEST"),
        (Message(parts=[Part(text="x"), Part()]), "INVALID_REQUEST"),
        (Message(parts=[Part(file=FileReference(uri=""))]), "INVALID_REQUEST"),
        (Message(parts=[Part(text="x")], metadata={str(n): "" for n in range(33)}), "INVALID_REQUEST"),
        (Message(role=Role.ROLE_SYSTEM, parts=[Part(text="x")]), "INVALID_REQUEST"),
    ],
)
def test_bad_messages_get_their_reason(message: Message, reason: str) -> None:
    assert reason_of(message) == reason


@pytest.mark.parametrize(
    ("submission", "reason"),
    [
        (replace(SUBMISSION, session=""), "INVALID_REQUEST"),
        (replace(SUBMISSION, session="a/b"), "INVALID_REQUEST"),
        (replace(SUBMISSION, agent="Echo"), "INVALID_REQUEST"),
        (replace(SUBMISSION, channel="a" * 64), "INVALID_REQUEST"),
        (replace(SUBMISSION, idempotency_key=""), "IDEMPOTENCY_KEY_MISSING"),
        (replace(SUBMISSION, idempotency_key="k\0"), "CONTENT_INVALID"),
        (replace(SUBMISSION, idempotency_key="k" * 257), "INVALID_REQUEST"),
        (replace(SUBMISSION, policy=99), "INVALID_REQUEST"),  # type: ignore[arg-type]
    ],
)
def test_bad_keys_get_their_reason(submission: Submission, reason: str) -> None:
    assert reason_of(text("x"), submission) == reason


def test_a_trace_context_that_cannot_be_read_is_ignored() -> None:
    good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for given, kept in ((good, good), ("garbage", ""), (good + "\n", "")):
        inbound = admit_message(
            replace(SUBMISSION, traceparent=given), text("x"), LAYOUT, max_content_bytes=1000, now_ms=1
        )
        assert inbound.traceparent == kept


def test_a_cancel_of_another_turn_is_another_content() -> None:
    one = admit_cancel(SUBMISSION, b"1" * 16, LAYOUT, now_ms=1)
    two = admit_cancel(SUBMISSION, b"2" * 16, LAYOUT, now_ms=1)
    assert one.kind == InboundKind.INBOUND_KIND_CANCEL
    assert one.content_hash != two.content_hash
    with pytest.raises(Refused):
        admit_cancel(SUBMISSION, b"short", LAYOUT, now_ms=1)


def test_stream_numbers_grow_even_when_the_clock_goes_back() -> None:
    times = iter([1000, 1000, 5, 2000])
    numbers = StreamNumbers(lambda: next(times), lambda bits: 7)
    made = [numbers.next() for _ in range(4)]
    assert made == sorted(set(made))
    assert made[0] == (1000 << 12) | 7
