"""What the gateway measures."""

from __future__ import annotations

from collections.abc import Callable

from soma.common.v1.message_pb2 import Error

from soma_common.telemetry.by_reason import EndCounter
from soma_common.telemetry.metrics import SIZE_BUCKETS, counter, gauge, histogram

_items = counter("soma_gateway_stored_total", "Items stored on the lanes.")
_batch = histogram("soma_gateway_batch_items", "Items per stored batch.", buckets=SIZE_BUCKETS)
_seconds = histogram("soma_gateway_store_seconds", "Time from a batch's first try to its receipt.")
_refusals = EndCounter(
    counter("soma_gateway_refusals_total", "Items, calls and streams refused, by reason.", ["reason"])
)
_streams = gauge("soma_gateway_streams", "Adapter streams connected.")
_waiting = gauge("soma_gateway_waiting_items", "Items accepted and not yet stored.")


def observe_batch(items: int, seconds: float) -> None:
    """A batch was stored."""
    _items.inc(items)
    _batch.observe(items)
    _seconds.observe(seconds)


def observe_refusal(error: Error) -> None:
    """Somebody was told that an item, a call or a stream is not taken."""
    _refusals.failed(error.reason)


def observe_state(streams: Callable[[], int], waiting: Callable[[], int]) -> None:
    """Reads streams and waiting items whenever the metrics are asked for."""
    _streams.set_function(streams)
    _waiting.set_function(waiting)
