"""Frames out: everything once, each kind in order, none larger than it may be."""

import asyncio
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from soma.cognition.v1 import cognition_service_pb2 as cognition

from services.cognition.adapters.turns_grpc import FRAME_BYTES, frames_of, gathered
from services.cognition.application.ports import Outgoing
from soma_common.gather import Gather

items = st.one_of(
    st.builds(cognition.Proposal, step=st.integers(1, 99), body=st.sampled_from([b"", b"x" * (FRAME_BYTES // 3)])),
    st.builds(cognition.TurnText, offset=st.integers(0, 99), text=st.sampled_from(["", "y" * 10])),
    st.builds(cognition.StopTurn, dispatch=st.integers(1, 99)),
    st.sampled_from([cognition.RunTurnsResponse(heartbeat=True), cognition.RunTurnsResponse(draining=True)]),
)


@given(st.lists(items, max_size=30))
def test_frames_hold_what_was_gathered(gathered: list[Outgoing]) -> None:
    frames = list(frames_of(gathered))
    assert [p for f in frames for p in f.proposals] == [i for i in gathered if isinstance(i, cognition.Proposal)]
    assert [t for f in frames for t in f.texts] == [i for i in gathered if isinstance(i, cognition.TurnText)]
    assert [d for f in frames for d in f.declined] == [i for i in gathered if isinstance(i, cognition.StopTurn)]
    controls = [i for i in gathered if isinstance(i, cognition.RunTurnsResponse)]
    assert any(f.heartbeat for f in frames) == any(c.heartbeat for c in controls)
    assert any(f.draining for f in frames) == any(c.draining for c in controls)
    assert all(frame.ByteSize() < 2 * FRAME_BYTES for frame in frames)


@dataclass
class Load:
    running: int


async def _taken(first: Outgoing, running: int) -> list[Outgoing]:
    """What a frame holds if one item comes at first, and another while the frame may be waiting."""
    outbox: Gather[Outgoing] = Gather(10)
    outbox.put(first)
    taking = asyncio.create_task(gathered(outbox, Load(running)))
    await asyncio.sleep(0)
    outbox.put(cognition.Proposal(step=2))
    return await taking


async def test_steps_wait_for_company_only_among_many_turns_and_text_never() -> None:
    step, text = cognition.Proposal(step=1), cognition.TurnText(text="now")
    assert await _taken(step, running=64) == [step, cognition.Proposal(step=2)]
    assert await _taken(step, running=15) == [step]
    assert await _taken(text, running=64) == [text]


async def test_a_frame_that_speaks_of_many_turns_goes_at_once() -> None:
    outbox: Gather[Outgoing] = Gather(100)
    outbox.put_many(cognition.Proposal(step=number) for number in range(1, 17))
    taking = asyncio.create_task(gathered(outbox, Load(64)))
    await asyncio.sleep(0)
    assert taking.done()
    assert len(taking.result()) == 16
