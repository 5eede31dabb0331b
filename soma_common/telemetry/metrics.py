"""The process's metrics, in Prometheus' format. docs/metrics.md lists every metric; a test compares.

A module that measures something makes its metrics here at import (`counter`, `gauge`, `histogram`) and keeps the
labelled children it uses often: looking one up costs more than counting.
"""

from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
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
