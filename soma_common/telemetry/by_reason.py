"""Counting how something ended: `OK`, or the reason of its error. The values are those of an enum of the contracts, so
the label does not grow with use.
"""

from __future__ import annotations

from typing import Final

from soma.common.v1.error_reason_pb2 import ErrorReason

from soma_common.errors import reason_name
from soma_common.telemetry.metrics import Counter

OK: Final = "OK"
CANCELLED: Final = "CANCELLED"
"""The caller did not wait for the end."""
UNKNOWN: Final = "UNKNOWN"
"""A reason that this release does not know."""


class EndCounter:
    """Counts ends on the last label of `counter`; the labels before it are `labels`. Keeps the children."""

    __slots__ = ("_children", "_counter", "_labels")

    def __init__(self, counter: Counter, *labels: str) -> None:
        self._counter = counter
        self._labels = labels
        self._children: dict[str, Counter] = {}

    def ok(self) -> None:
        """It ended well."""
        self._count(OK)

    def failed(self, reason: int) -> None:
        """It ended with an error of this reason."""
        self._count(reason_name(reason) if reason in ErrorReason.values() else UNKNOWN)

    def cancelled(self) -> None:
        """Nobody waited for its end."""
        self._count(CANCELLED)

    def _count(self, end: str) -> None:
        child = self._children.get(end)
        if child is None:
            child = self._children[end] = self._counter.labels(*self._labels, end)
        child.inc()
