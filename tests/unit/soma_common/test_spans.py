"""Spans of sampled items: stages follow on each other, what is not sampled leaves no trace, memory is bounded."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from soma_common.telemetry import spans
from soma_common.telemetry.trace import new_trace


@pytest.fixture(autouse=True)
def nothing_watched() -> Iterator[None]:
    spans.watched.clear()
    yield
    spans.watched.clear()


def shown(trace_id: str) -> list[dict[str, Any]]:
    body = json.loads(spans.render("gateway", "gateway-0"))
    return [span for span in body["spans"] if span["trace_id"] == trace_id]


def test_stages_follow_on_each_other_without_a_gap() -> None:
    trace = new_trace(sampled=True)
    spans.follow(str(trace), b"message", b"turn")
    spans.stage("gather", [b"other", b"message"])
    (followed,) = spans.stage("store", [b"turn"])
    spans.end_stage("frame", [followed], last=True)
    first, second, third = shown(trace.trace_id)
    assert [span["name"] for span in (first, second, third)] == ["gather", "store", "frame"]
    assert first["start_ns"] + first["duration_ns"] == second["start_ns"]
    assert second["start_ns"] + second["duration_ns"] == third["start_ns"]
    assert not spans.watched, "after the last stage nothing is looked up any more"


def test_a_stage_under_two_keys_is_one_span() -> None:
    trace = new_trace(sampled=True)
    spans.follow(str(trace), b"message", b"turn")
    spans.stage("commit", [b"message", b"turn"])
    assert [span["name"] for span in shown(trace.trace_id)] == ["commit"]


def test_what_was_elsewhere_counts_for_no_stage() -> None:
    trace = new_trace(sampled=True)
    spans.follow(str(trace), b"turn")
    began = spans.watched[b"turn"].since_ns
    spans.begin([b"turn", b"other"])
    spans.stage("deliver", [b"turn"])
    assert shown(trace.trace_id)[0]["start_ns"] > began


@pytest.mark.parametrize("traceparent", ["", "01", str(new_trace()), str(new_trace())[:-2] + "02"])
def test_what_is_not_sampled_is_not_watched(traceparent: str) -> None:
    spans.follow(traceparent, b"turn")
    assert not spans.watched


def test_items_that_never_leave_make_room_for_new_ones() -> None:
    for number in range(3000):
        spans.follow(str(new_trace(sampled=True)), b"%d" % number)
    assert len(spans.watched) <= 1024
    assert b"2999" in spans.watched
    assert b"0" not in spans.watched


def test_an_item_that_is_tried_again_is_followed_anew() -> None:
    first, second = new_trace(sampled=True), new_trace(sampled=True)
    spans.follow(str(first), b"message", b"turn")
    spans.follow(str(second), b"message", b"turn")
    spans.stage("gather", [b"message"])
    assert not shown(first.trace_id)
    assert [span["name"] for span in shown(second.trace_id)] == ["gather"]
