"""Frames to a brain stay within what the transport takes, whatever starts at once."""

import asyncio
from typing import Any, cast

import pytest
from soma.cognition.v1.cognition_service_pb2 import AddInputs, Confirm, RunTurnsRequest, StartTurn, StopTurn

from services.router.adapters.brain_grpc import GrpcBrainLink
from soma_common.testing.eventually import eventually

MEGABYTE = 1024 * 1024


class Call:
    """Takes frames."""

    def __init__(self) -> None:
        self.frames: list[RunTurnsRequest] = []

    async def write(self, frame: bytes) -> None:
        self.frames.append(RunTurnsRequest.FromString(frame))


def start(number: int, size: int = 700_000, dispatch: int = 1) -> StartTurn:
    return StartTurn(turn_id=number.to_bytes(16, "big"), dispatch=dispatch, context=[bytes(size)])


async def frames_of(link: GrpcBrainLink, call: Call, starts: int) -> list[RunTurnsRequest]:
    writing = asyncio.create_task(link.write(heartbeat_s=60))
    await eventually(lambda: sum(len(frame.starts) for frame in call.frames) == starts)
    writing.cancel()
    return call.frames


async def test_many_large_turns_go_in_many_frames_in_order() -> None:
    call = Call()
    link = GrpcBrainLink(cast(Any, call), "brain-0", 100, lambda: True)
    for number in range(40):
        link.start(start(number))
    link.start(start(40, 5 * MEGABYTE))
    link.confirm(b"c" * 16, 1, 1)
    frames = await frames_of(link, call, 41)
    assert frames[0].confirms
    assert [s.turn_id[-1] for frame in frames for s in frame.starts] == list(range(41))
    assert all(frame.ByteSize() <= MEGABYTE or len(frame.starts) == 1 for frame in frames)


async def test_a_start_that_was_stopped_in_the_same_moment_does_not_run() -> None:
    call = Call()
    link = GrpcBrainLink(cast(Any, call), "brain-0", 100, lambda: True)
    for number in range(4):
        link.start(start(number))
    link.stop(start(2).turn_id, 1)
    link.start(start(3, dispatch=2))
    frames = await frames_of(link, call, 4)
    assert [stop.turn_id for stop in frames[0].stops] == [start(2).turn_id]
    assert [(s.turn_id[-1], s.dispatch) for f in frames for s in f.starts] == [(0, 1), (1, 1), (3, 1), (3, 2)]


async def test_small_turns_share_a_frame() -> None:
    call = Call()
    link = GrpcBrainLink(cast(Any, call), "brain-0", 100, lambda: True)
    for number in range(64):
        link.start(start(number, 1000))
    assert len(await frames_of(link, call, 64)) == 1


async def test_ends_are_confirmed_with_what_goes_next() -> None:
    call = Call()
    link = GrpcBrainLink(cast(Any, call), "brain-0", 100, lambda: True)
    writing = asyncio.create_task(link.write(heartbeat_s=60))
    link.confirm_end(b"c" * 16, 1, 1)
    await asyncio.sleep(0)
    link.start(start(1, 100))
    await eventually(lambda: call.frames)
    [frame] = call.frames
    assert (len(frame.starts), list(frame.confirms)) == (1, [Confirm(turn_id=b"c" * 16, dispatch=1, step=1)])
    writing.cancel()


async def test_ends_are_confirmed_when_nothing_else_goes() -> None:
    call = Call()
    link = GrpcBrainLink(cast(Any, call), "brain-0", 100, lambda: True)
    writing = asyncio.create_task(link.write(heartbeat_s=60))
    link.confirm_end(bytes(16), 1, 1)
    await eventually(lambda: len(call.frames) == 1)
    link.confirm_end(b"\1" * 16, 1, 1)
    await eventually(lambda: len(call.frames) == 2)
    assert [[confirm.turn_id[0] for confirm in frame.confirms] for frame in call.frames] == [[0], [1]]
    writing.cancel()


async def test_further_inputs_stay_behind_the_start_of_their_turn_and_large_ones_are_split_too() -> None:
    call = Call()
    link = GrpcBrainLink(cast(Any, call), "brain-0", 100, lambda: True)
    for number in range(3):
        link.add_inputs(start(number).turn_id, 1, 1, [bytes(700_000)])
        link.start(start(number))
    frames = await frames_of(link, call, 3)
    await eventually(lambda: sum(len(frame.add_inputs) for frame in frames) == 3)
    assert all(frame.ByteSize() <= MEGABYTE for frame in frames)
    order = [(kind, item.turn_id[-1]) for frame in frames for kind, item in _items(frame)]
    for number in range(3):
        assert order.index(("start", number)) < order.index(("inputs", number))


async def test_an_idle_stream_says_at_every_interval_that_it_lives() -> None:
    call = Call()
    link = GrpcBrainLink(cast(Any, call), "brain-0", 100, lambda: True)
    writing = asyncio.create_task(link.write(heartbeat_s=0.01))
    await eventually(lambda: len(call.frames) >= 3)
    writing.cancel()
    assert call.frames == [RunTurnsRequest(heartbeat=True)] * len(call.frames)
    await asyncio.gather(writing, return_exceptions=True)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("heartbeat")]


@pytest.mark.parametrize("size", [0, 90, 110, 16_000, 16_400, 500_000])
async def test_a_frame_holds_whole_what_was_handed_in(size: int) -> None:
    call = Call()
    link = GrpcBrainLink(cast(Any, call), "brain-0", 100, lambda: True)
    first, second = start(1, size), start(2, 0)
    link.start(first)
    link.start(second)
    link.confirm(b"c" * 16, 300, 2)
    link.stop(b"s" * 16, 1)
    link.add_inputs(first.turn_id, 1, 1, [b"in", b"puts"])
    (frame,) = await frames_of(link, call, 2)
    assert frame == RunTurnsRequest(
        starts=[first, second],
        confirms=[Confirm(turn_id=b"c" * 16, dispatch=300, step=2)],
        stops=[StopTurn(turn_id=b"s" * 16, dispatch=1)],
        add_inputs=[AddInputs(turn_id=first.turn_id, dispatch=1, first=1, inputs=[b"in", b"puts"])],
    )


async def test_who_may_not_speak_stops_what_it_does_not_confirm() -> None:
    """A brain keeps a turn until its final is confirmed; a turn that is over here would be kept for ever."""
    call = Call()
    link = GrpcBrainLink(cast(Any, call), "brain-0", 100, lambda: False)
    link.confirm(b"c" * 16, 2, 1)
    link.start(start(1))
    link.add_inputs(b"c" * 16, 2, 1, [b""])
    writing = asyncio.create_task(link.write(heartbeat_s=60))
    await eventually(lambda: bool(call.frames))
    writing.cancel()
    (frame,) = call.frames
    assert frame == RunTurnsRequest(stops=[StopTurn(turn_id=b"c" * 16, dispatch=2)])


def _items(frame: RunTurnsRequest) -> list[tuple[str, StartTurn | AddInputs]]:
    return [*(("start", item) for item in frame.starts), *(("inputs", item) for item in frame.add_inputs)]
