"""The error tree survives the wire, and every reason has its place in it."""

from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyProto
from google.rpc import code_pb2, error_details_pb2, status_pb2
from soma.common.v1 import error_reason_pb2, message_pb2

from soma_common.errors import (
    DOMAIN,
    FieldViolation,
    Internal,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    SomaError,
    Unavailable,
    class_of,
    from_inner_call,
    from_proto,
    from_rpc_error,
    from_status,
    reason_name,
    to_proto,
    to_status,
    told_by_peer,
)

REASONS = [value for value in error_reason_pb2.ErrorReason.values() if value]


@dataclass
class CallFailure:
    """What gRPC gives a client for a failed call."""

    status_code: grpc.StatusCode
    text: str = ""
    metadata: Any = None

    def code(self) -> grpc.StatusCode:
        return self.status_code

    def details(self) -> str:
        return self.text

    def trailing_metadata(self) -> Any:
        return self.metadata


@pytest.mark.parametrize("reason", REASONS, ids=[reason_name(r) for r in REASONS])
def test_every_reason_has_a_class_and_comes_back_from_the_wire_as_it_was(reason: Any) -> None:
    error = class_of(reason)(reason, "what to change", {"bound": "10"}, 1.5)
    again = from_status(to_status(error))
    assert again is not None
    assert type(again) is type(error)
    assert (again.reason, again.message, again.metadata, again.retry_delay_s) == (
        reason,
        "what to change",
        {"bound": "10"},
        1.5,
    )
    assert (type(again) is Internal) == (reason_name(reason) in {"INTERNAL", "ITEM_CORRUPT"})


def test_a_status_holds_exactly_one_error_info_and_what_else_applies() -> None:
    error = ResourceExhausted(error_reason_pb2.ERROR_REASON_QUEUE_FULL, "wait", retry_delay_s=0.25)
    status = to_status(error)
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    first, second = status.details
    assert first.Unpack(info)
    assert second.Unpack(retry)
    assert (info.reason, info.domain) == ("QUEUE_FULL", DOMAIN)
    assert retry.retry_delay.ToMilliseconds() == 250


def test_field_violations_survive_as_status_and_become_text_as_data() -> None:
    violation = FieldViolation("session.tenant", "must be a tenant id")
    error = InvalidRequest(error_reason_pb2.ERROR_REASON_INVALID_REQUEST, "bad", field_violations=[violation])
    again = from_status(to_status(error))
    assert again is not None
    assert again.field_violations == (violation,)
    assert to_proto(error).message == "bad (session.tenant: must be a tenant id)"


def test_an_error_as_data_comes_back_in_its_class() -> None:
    error = NotFound(error_reason_pb2.ERROR_REASON_TOOL_NOT_FOUND, "no such tool", {"tool": "x"})
    again = from_proto(to_proto(error))
    assert type(again) is NotFound
    assert again.retry_delay_s is None
    assert str(again) == "TOOL_NOT_FOUND: no such tool"


def test_a_failed_call_with_details_is_the_peers_own_error() -> None:
    status = to_status(Unavailable(error_reason_pb2.ERROR_REASON_BUS_UNAVAILABLE, "retry", retry_delay_s=1))
    failure = CallFailure(
        grpc.StatusCode.UNAVAILABLE, "retry", (("grpc-status-details-bin", status.SerializeToString()),)
    )
    error = from_rpc_error(failure)
    assert (type(error), error.reason, error.retry_delay_s) == (
        Unavailable,
        error_reason_pb2.ERROR_REASON_BUS_UNAVAILABLE,
        1,
    )


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (grpc.StatusCode.UNAVAILABLE, "SERVICE_UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED"),
        (grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED"),
        (grpc.StatusCode.UNKNOWN, "INTERNAL"),
        (grpc.StatusCode.DATA_LOSS, "INTERNAL"),
    ],
)
def test_a_failed_call_without_details_is_told_by_its_code(code: grpc.StatusCode, name: str) -> None:
    error = from_rpc_error(CallFailure(code, "proxy says no"))
    assert (reason_name(error.reason), error.message) == (name, "proxy says no")


def test_who_asked_is_told_what_the_peer_says_and_nothing_of_where_it_is() -> None:
    address = "ipv4:127.0.0.1:7440"
    lost = CallFailure(grpc.StatusCode.UNAVAILABLE, f"connections to all backends failing; last error: {address}")
    error = from_inner_call(lost, "the tool gateway")
    assert (reason_name(error.reason), error.message) == (
        "SERVICE_UNAVAILABLE",
        "calling the tool gateway failed (UNAVAILABLE)",
    )
    assert told_by_peer(lost) is None
    assert address in from_rpc_error(lost).message

    own = NotFound(error_reason_pb2.ERROR_REASON_TOOL_NOT_FOUND, "no such tool", {"tool": "x"})
    packed = (("grpc-status-details-bin", to_status(own).SerializeToString()),)
    error = from_inner_call(CallFailure(grpc.StatusCode.NOT_FOUND, "no such tool", packed), "the tool gateway")
    assert (type(error), error.message, error.metadata) == (NotFound, own.message, own.metadata)


@pytest.mark.parametrize(
    "details",
    [
        b"\xff\xff\xff",
        status_pb2.Status(code=14).SerializeToString(),
        status_pb2.Status(details=[AnyProto(type_url="type.googleapis.com/x.Y", value=b"?")]).SerializeToString(),
    ],
)
def test_details_that_say_nothing_of_ours_do_not_hide_the_failure(details: bytes) -> None:
    error = from_rpc_error(CallFailure(grpc.StatusCode.UNAVAILABLE, "gone", (("grpc-status-details-bin", details),)))
    assert error.reason == error_reason_pb2.ERROR_REASON_SERVICE_UNAVAILABLE


def test_reasons_of_a_newer_release_are_kept_apart_but_do_not_break_this_one() -> None:
    status = to_status(SomaError(error_reason_pb2.ERROR_REASON_INTERNAL, "x"))
    info = error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain=DOMAIN)
    status.details[0].Pack(info)
    error = from_status(status)
    assert type(error) is Internal
    unknown = from_proto(message_pb2.Error(reason=error_reason_pb2.ErrorReason.ValueType(9999), message="x"))
    assert reason_name(unknown.reason) == "UNKNOWN_9999"
