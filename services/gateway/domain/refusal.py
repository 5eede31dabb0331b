"""Why an item is not taken, as data: it goes into a frame for an adapter stream and becomes a gRPC status for a
unary call.

QUEUE_FULL and every reason about the item itself mean "not stored". BUS_UNAVAILABLE means "not known": the same key
must be sent again.
"""

from __future__ import annotations

from collections.abc import Mapping

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error


class Refused(Exception):
    """An item, or a whole stream, is not taken. `error` is what the caller is told."""

    def __init__(
        self,
        reason: ErrorReason.ValueType,
        message: str,
        *,
        retry_delay_ms: int = 0,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.error = Error(reason=reason, message=message, retry_delay_ms=retry_delay_ms, metadata=metadata)

    @classmethod
    def of(cls, error: Error) -> Refused:
        """The same refusal, raised for another caller."""
        return cls(error.reason, error.message, retry_delay_ms=error.retry_delay_ms, metadata=error.metadata)


def queue_full(bound: str, value: int, retry_delay_ms: int) -> Refused:
    """The bound named `bound`, whose value is `value`, is reached: nothing was stored."""
    return Refused(
        ErrorReason.ERROR_REASON_QUEUE_FULL,
        f"not stored: {bound} is full ({value}); send again after {retry_delay_ms} ms",
        retry_delay_ms=retry_delay_ms,
        metadata={"bound": bound, "value": str(value)},
    )


def bus_unavailable(waited_s: float, retry_delay_ms: int) -> Refused:
    """The bus gave no answer for `waited_s` seconds: the item may or may not be stored."""
    return Refused(
        ErrorReason.ERROR_REASON_BUS_UNAVAILABLE,
        f"the message bus did not answer for {waited_s:g} s; it is not known whether the message was stored: "
        "send it again with the same idempotency key",
        retry_delay_ms=retry_delay_ms,
    )


def starting(retry_delay_ms: int = 500) -> Refused:
    """The gateway does not know its tenants and agents yet."""
    return Refused(
        ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
        "this gateway is starting and has no configuration yet: send again",
        retry_delay_ms=retry_delay_ms,
    )


def draining(retry_delay_ms: int = 100) -> Refused:
    """The gateway is going away."""
    return Refused(
        ErrorReason.ERROR_REASON_DRAINING,
        "this gateway is shutting down: connect again",
        retry_delay_ms=retry_delay_ms,
    )


def protocol_order(message: str) -> Refused:
    """Frames came in an order the contract does not allow."""
    return Refused(ErrorReason.ERROR_REASON_PROTOCOL_ORDER, message)
