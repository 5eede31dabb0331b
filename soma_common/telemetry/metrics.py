"""The process's metrics, in Prometheus' format. docs/metrics.md lists every metric; a test compares.

A module that measures something makes its metrics here at import (`counter`, `gauge`, `histogram`) and keeps the
labelled children it uses often: looking one up costs more than counting.

Counters and histograms count without a lock: one is as dear as the rest of the counting together. Between reading a
number and writing it back there is no call and no jump, and only there does the interpreter change threads (without a
global lock of its own it would be another matter).
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import prometheus_client
from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Bounds in seconds for latencies, from a local hop to a long turn."""
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Bounds for items in a batch."""

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""HTTP content type of `render()`."""

REGISTRY = CollectorRegistry()
"""Every metric of this process."""

ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)


class _Number:
    """A number that is shown."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def get(self) -> float:
        return self.value

    def set(self, value: float) -> None:
        self.value = value

    def get_exemplar(self) -> None:
        """There is none."""


class Counter(prometheus_client.Counter):
    """Counts up. With labels, only its children count."""

    _value: Any

    def _metric_init(self) -> None:
        super()._metric_init()
        self._value = _Number()

    def inc(self, amount: float = 1) -> None:  # type: ignore[override] # exemplars are not kept
        """Count `amount`, which is not negative."""
        if amount < 0:
            raise ValueError("counters count up")
        self._value.value += amount


class Histogram(prometheus_client.Histogram):
    """Counts what it is shown by size. With labels, only its children do."""

    _sum: Any
    _buckets: list[Any]

    def _metric_init(self) -> None:
        super()._metric_init()
        self._sum = _Number()
        self._buckets = [_Number() for _ in self._upper_bounds]

    def observe(self, amount: float) -> None:  # type: ignore[override] # exemplars are not kept
        """Count one of size `amount`: in the first bucket whose bound is not below it."""
        self._sum.value += amount
        self._buckets[bisect_left(self._upper_bounds, amount)].value += 1


def counter(name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
    """Make a counter; `name` starts with `soma_` and ends in `_total`."""
    return Counter(name, documentation, labels, registry=REGISTRY)


def gauge(name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
    """Make a gauge; `name` starts with `soma_`, units at its end."""
    return Gauge(name, documentation, labels, registry=REGISTRY)


def histogram(
    name: str, documentation: str, labels: Sequence[str] = (), buckets: Sequence[float] = LATENCY_BUCKETS_S
) -> Histogram:
    """Make a histogram; `name` starts with `soma_` and ends in its unit (`_seconds`, `_items`, `_bytes`)."""
    return Histogram(name, documentation, labels, registry=REGISTRY, buckets=buckets)


def render() -> bytes:
    """Return all metrics as the text that Prometheus scrapes."""
    return generate_latest(REGISTRY)
