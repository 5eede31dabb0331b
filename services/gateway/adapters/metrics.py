"""What the gateway measures."""

from __future__ import annotations

from collections.abc import Callable

from soma_common.telemetry.metrics import SIZE_BUCKETS, counter, gauge, histogram

_items = counter("soma_gateway_stored_total", "Items stored on the lanes.")
_batch = histogram("soma_gateway_batch_items", "Items per stored batch.", buckets=SIZE_BUCKETS)
_seconds = histogram("soma_gateway_store_seconds", "Time from a batch's first try to its receipt.")
_streams = gauge("soma_gateway_streams", "Adapter streams connected.")
_waiting = gauge("soma_gateway_waiting_items", "Items accepted and not yet stored.")


def observe_batch(items: int, seconds: float) -> None:
    """A batch was stored."""
    _items.inc(items)
    _batch.observe(items)
    _seconds.observe(seconds)


def observe_state(streams: Callable[[], int], waiting: Callable[[], int]) -> None:
    """Reads streams and waiting items whenever the metrics are asked for."""
    _streams.set_function(streams)
    _waiting.set_function(waiting)
