"""W3C trace context: which request a piece of work belongs to, carried over gRPC and NATS in the header
`traceparent`."""

import os
from contextvars import ContextVar
from dataclasses import dataclass

TRACEPARENT = "traceparent"
"""Header and metadata key (https://www.w3.org/TR/trace-context/)."""

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Place in a trace: 32 hex digits of the trace, 16 of the span, and whether the trace is recorded."""

    trace_id: str
    span_id: str
    sampled: bool = False

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    def child(self) -> "TraceContext":
        """Return a new span of the same trace."""
        return TraceContext(self.trace_id, os.urandom(8).hex(), self.sampled)


_current: ContextVar[TraceContext | None] = ContextVar("soma_trace", default=None)


def new_trace(*, sampled: bool = False) -> TraceContext:
    """Return the first span of a new trace."""
    return TraceContext(os.urandom(16).hex(), os.urandom(8).hex(), sampled)


def parse_traceparent(header: str | None) -> TraceContext | None:
    """Return what `header` says, or None when it is missing or not a version this code can read."""
    if not header or len(header) < 55:
        return None
    version, trace_id, span_id, flags = (*header.split("-", 4), "", "", "", "")[:4]
    well_formed = len(version) == 2 and len(trace_id) == 32 and len(span_id) == 16 and len(flags) >= 2
    if not well_formed or version == "ff" or not _HEX.issuperset(trace_id + span_id) or not trace_id.strip("0"):
        return None
    return TraceContext(trace_id, span_id, flags[1] in "13579bdf")


def current_trace() -> TraceContext | None:
    """Return the trace context of the running task, or None."""
    return _current.get()


def set_trace(context: TraceContext | None) -> None:
    """Make `context` the running task's; tasks it starts inherit it, its parent does not see it."""
    _current.set(context)
