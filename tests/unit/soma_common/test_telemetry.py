"""Logs hold no secrets and hold nobody up; trace headers are read as the standard says."""

import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from soma_common.telemetry import metrics
from soma_common.telemetry.logging import LogWriter
from soma_common.telemetry.metrics import REGISTRY
from soma_common.telemetry.redaction import MAX_VALUE_CHARS, REDACTED, TRUNCATED, clean_event
from soma_common.telemetry.trace import TraceContext, new_trace, parse_traceparent

JWT = "eyJhbGciOiJFZDI1NTE5In0.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"


def clean(**event: Any) -> dict[str, Any]:
    return dict(clean_event(None, "info", event))


@pytest.mark.parametrize("key", ["authorization", "token", "admin_token", "password", "api_key", "apikey", "secret"])
def test_values_of_telling_keys_are_redacted(key: str) -> None:
    assert clean(**{key: "hunter2"}) == {key: REDACTED}
    assert clean(headers={key: "hunter2"}) == {"headers": {key: REDACTED}}


def test_counts_and_paths_under_telling_keys_stay() -> None:
    event = {"input_tokens": 12, "token_file": "/etc/soma/admin.token", "tenant": "demo"}
    assert clean(**event) == event


@pytest.mark.parametrize(
    "text",
    [
        "sent Authorization: Bearer abcdefgh1234",
        "postgresql://soma:hunter2@host/db",
        "host=x password=hunter2 user=y",
        f"token was {JWT}",
        "key sk-abcdefghijklmn",
    ],
)
def test_secrets_inside_text_are_redacted(text: str) -> None:
    cleaned = clean(event=text)["event"]
    assert REDACTED in cleaned
    for secret in ("abcdefgh", "hunter2", JWT[:20]):
        assert secret not in cleaned


def test_payloads_are_cut() -> None:
    event = clean(text="x" * 5000, data=b"\x01" * 5000, deep={"a": {"b": {"c": {"d": {"e": 1}}}}})
    assert event["text"] == "x" * MAX_VALUE_CHARS + TRUNCATED
    assert event["data"].endswith(TRUNCATED)
    assert len(event["data"]) <= MAX_VALUE_CHARS + len(TRUNCATED)
    assert TRUNCATED in json.dumps(event["deep"])


def test_the_writer_writes_in_order_and_rotates(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "svc.log"
    writer = LogWriter(path, max_bytes=1000, kept=2)
    lines = [f"{n:04}{'.' * 95}\n".encode() for n in range(40)]
    for line in lines:
        writer.offer(line)
    writer.close()
    kept = b"".join((tmp_path / "logs" / name).read_bytes() for name in ("svc.log.2", "svc.log.1", "svc.log"))
    assert kept == b"".join(lines[-len(kept) // 100 :])
    assert 20 * 100 <= len(kept) <= 30 * 100
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["svc.log", "svc.log.1", "svc.log.2"]


def test_a_writer_that_cannot_keep_up_drops_counts_and_tells(tmp_path: Path) -> None:
    slow_disk = tmp_path / "svc.log"
    os.mkfifo(slow_disk)
    reader = os.open(slow_disk, os.O_RDONLY | os.O_NONBLOCK)
    writer = LogWriter(slow_disk, queue_lines=10)
    before = dropped()
    line = b"x" * 16_000 + b"\n"
    for _ in range(100):  # Far more than pipe, buffer and queue hold.
        writer.offer(line)
    lost = dropped() - before
    assert 50 < lost < 100
    os.set_blocking(reader, True)
    received = b""
    while received.count(b"\n") < 100 - lost:
        received += os.read(reader, 65536)
    writer.offer(b"next\n")
    writer.close()
    rest = os.read(reader, 65536).splitlines()
    os.close(reader)
    assert json.loads(rest[0]) == {"level": "warning", "event": "log.lines_dropped", "count": lost}
    assert rest[1] == b"next"


def dropped() -> int:
    return int(REGISTRY.get_sample_value("soma_log_lines_dropped_total") or 0)


def test_trace_context_goes_round() -> None:
    context = new_trace()
    assert parse_traceparent(str(context)) == context
    child = context.child()
    assert child.trace_id == context.trace_id
    assert child.span_id != context.span_id
    sampled = parse_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    assert sampled == TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", sampled=True)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00-x-y-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
    ],
)
def test_headers_that_say_nothing_are_ignored(header: str | None) -> None:
    assert parse_traceparent(header) is None


def test_counting_shows_what_prometheus_own_classes_show() -> None:
    """Ours count without locks; the text must be the same, bounds included."""
    bounds = (0.5, 1, 2.5)
    texts = []
    for made in (metrics, prometheus_client):
        counted = made.Counter("soma_probe_total", "Counts.", ["kind"], registry=None)
        sizes = made.Histogram("soma_probe_seconds", "Sizes.", ["kind"], buckets=bounds, registry=None)
        plain = made.Histogram("soma_plain_items", "Sizes.", buckets=bounds, registry=None)
        for amount in (0, 0.25, 0.5, 0.75, 1, 2.5, 2.6, 1000):
            counted.labels("a").inc(amount)
            sizes.labels("b").observe(amount)
            plain.observe(amount)
        counted.labels("b").inc()
        shown = prometheus_client.CollectorRegistry()
        for metric in (counted, sizes, plain):
            shown.register(metric)
        texts.append(re.sub(r"(_created\S*) .*", r"\1", prometheus_client.generate_latest(shown).decode()))
    assert texts[0] == texts[1]


def test_a_counter_does_not_count_down_and_a_family_does_not_count() -> None:
    counted = metrics.Counter("soma_probe_total", "Counts.", registry=None)
    with pytest.raises(ValueError, match="up"):
        counted.inc(-1)
    family = metrics.Counter("soma_probe_total", "Counts.", ["kind"], registry=None)
    with pytest.raises(AttributeError):
        family.inc()


def test_threads_lose_no_counts() -> None:
    counted = metrics.Counter("soma_probe_total", "Counts.", registry=None)
    each, before = 100_000, sys.getswitchinterval()

    def count() -> None:
        for _ in range(each):
            counted.inc()

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert next(sample.value for family in counted.collect() for sample in family.samples) == 4 * each
