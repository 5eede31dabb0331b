"""What a turn costs in Python calls, hop by hop: every call of our own code is counted while a crowd goes through it.
The number says nothing about seconds, but it is the same on every machine, and work that is done once more for each
item shows in it.

The bounds are about a tenth above what was counted when they were set (on Python 3.11; newer ones inline comprehensions
and count less). Lower them after an improvement; to raise one, say in the commit what the turn got for it.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, cast

import pytest
from soma.cognition.v1 import cognition_service_pb2 as cognition

from services.cognition.adapters.turns_grpc import frames_of
from services.gateway.adapters.lanes_memory import MemoryLanes
from services.gateway.application.write_lanes import LaneBounds, LaneWriters
from services.gateway.domain.ingest_window import LaneProgress
from soma_common.clock import monotonic
from soma_common.testing.eventually import eventually
from tests.unit.cognition import stories
from tests.unit.cognition.test_serve_routers import connect, make_brain
from tests.unit.gateway.test_adapter_stream import a_frame, a_stream
from tests.unit.router.builders import inbound
from tests.unit.router.engine import running_engine

CROWD: Final = 64
OURS: Final = ("/services/", "/soma_common/", "<string>")
"""Parts of the file names of our code; `<string>` is what dataclasses make."""
NOT_OURS: Final = ("/soma_common/testing/", "lanes_memory")

Counted = Callable[[], int]


@contextmanager
def calls_counted() -> Iterator[Counted]:
    """Counts the calls of our code inside the block, this thread's only."""
    count = 0

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event == "call":
            name = frame.f_code.co_filename
            count += any(part in name for part in OURS) and not any(part in name for part in NOT_OURS)

    sys.setprofile(on_event)
    try:
        yield lambda: count
    finally:
        sys.setprofile(None)


async def calls_per_item(crowd: Callable[[int], Awaitable[int]]) -> float:
    """Of two crowds, so that what is done once for all of them counts for none."""
    small, large = await crowd(CROWD), await crowd(2 * CROWD)
    return (large - small) / CROWD


async def gateway(items: int) -> int:
    """Accepts a frame of messages, up to their receipts."""
    lanes = MemoryLanes()
    stream = a_stream(1, "demo", LaneWriters(lanes, LaneBounds(), LaneProgress(monotonic), observe=lambda *_: None))
    frame = a_frame(items)
    answered = 0
    with calls_counted() as counted:
        await stream.receive(frame)
        while answered < items:
            answer = await stream.next_frame()
            assert answer is not None, "the stream stays"
            answered += len(answer.receipts)
        return counted()


async def router(items: int) -> int:
    """Takes a lane message in, starts its turns, takes their finals, up to their outcomes."""
    async with running_engine() as engine:
        engine.brain.credit = 10 * items
        messages = [inbound(f"s{number}") for number in range(items)]
        with calls_counted() as counted:
            for at in range(0, items, CROWD):  # as many as one group starts
                engine.accept(*messages[at : at + CROWD])
                for start in (await engine.started(min(at + CROWD, items)))[at:]:
                    engine.answer(start, "hi")
                await engine.outcomes(min(at + CROWD, items))
            return counted()


async def brain(items: int) -> int:
    """Runs the turns of a frame of starts, up to the confirmations of their finals."""
    service = make_brain(max_turns=items)
    session, outbox = connect(service, "router-0", bound=10 * items)
    starts = [stories.start(turn_id=number.to_bytes(16, "big"), model="echo/echo") for number in range(items)]
    frame = cognition.RunTurnsRequest(starts=starts)
    proposals: list[cognition.Proposal] = []
    with calls_counted() as counted:
        session.take(frame)
        while len(proposals) < items:
            for answer in frames_of(await outbox.take()):
                proposals += answer.proposals
        confirms = [cognition.Confirm(turn_id=p.turn_id, dispatch=p.dispatch, step=p.step) for p in proposals]
        session.take(cognition.RunTurnsRequest(confirms=confirms))
        await eventually(lambda: not service.turns)
        return counted()


MOST: Final[dict[Callable[[int], Awaitable[int]], float]] = {gateway: 32, router: 168, brain: 58}
"""Calls for each message or turn."""


@pytest.mark.parametrize("hop", MOST, ids=lambda hop: cast(Any, hop).__name__)
async def test_python_calls_of_a_turn(hop: Callable[[int], Awaitable[int]]) -> None:
    await hop(2 * CROWD)  # what is done once for all, or for each session: tests before may have had some of them
    calls = await calls_per_item(hop)
    assert 5 < calls <= MOST[hop], f"{hop.__name__}: {calls:.1f} calls for each item, at most {MOST[hop]}"
