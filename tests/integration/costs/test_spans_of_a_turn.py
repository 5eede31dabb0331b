"""A sampled message is followed through every process it passes; their spans are in order and add up to its way."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

from soma_common.telemetry.trace import new_trace
from soma_common.testing.eventually import eventually
from tests.chaos.stack import ECHO
from tests.integration.costs.counted import CountedStack

WAY = [
    "gateway.gather",
    # Its start is committed beside: it is given to the brain ahead.
    *("router.gather", "router.compose", "router.columns", "router.callbacks", "router.frame"),
    *("cognition.wait", "cognition.step", "cognition.frame"),
    *("router.gather", "router.compose", "router.columns", "router.commit", "router.callbacks", "router.outbox"),
    "gateway.deliver",
]
BESIDE = {"gateway.store", "router.brain", "router.commit_ahead", "router.acked", "cognition.confirm"}
MAYBE = {"router.hold"}
"""If the brain answers before the start is durable."""


async def test_a_sampled_message_is_followed_through_every_process(counted: CountedStack) -> None:
    sampled, other = new_trace(sampled=True), new_trace()
    async with counted.adapter() as adapter:
        await counted.burst(adapter, 1)  # a turn starts in the group of its message only if its session is known
        counted.answers.clear()
        await adapter.send(ECHO, "s0", "hello", traceparent=str(sampled))
        await adapter.send(ECHO, "s1", "hello", traceparent=str(other))
        await eventually(lambda: len(counted.answers) == 2, 10, "both are answered")

        async def acknowledged() -> bool:
            return any(span["name"] == "router.acked" for span in await _spans(counted, sampled.trace_id))

        await eventually(acknowledged, 10, "the router has the acknowledgement")
    spans = await _spans(counted, sampled.trace_id)
    on_the_way = [span for span in spans if span["name"] not in BESIDE]
    assert [span["name"] for span in on_the_way if span["name"] not in MAYBE] == WAY
    assert {span["name"] for span in spans} - MAYBE == {*WAY, *BESIDE}
    ends = [span["start_ns"] + span["duration_ns"] for span in on_the_way]
    assert all(end <= later["start_ns"] for end, later in zip(ends, on_the_way[1:], strict=False))
    assert not await _spans(counted, other.trace_id)


async def _spans(counted: CountedStack, trace_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in ("gateway-0", "router-0", "cognition-0"):
        body = await asyncio.to_thread(_tracez, counted.stack.parts[part].addresses["admin"])
        assert body["instance"] == part
        found += [span for span in body["spans"] if span["trace_id"] == trace_id]
    return sorted(found, key=lambda span: int(span["start_ns"]))


def _tracez(admin: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{admin}/tracez", timeout=5) as answer:
        return dict(json.loads(answer.read()))
