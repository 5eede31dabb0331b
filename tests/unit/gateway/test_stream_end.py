"""How a stream ends: what still leaves, what does not, and how long its writer waits for a peer that takes nothing."""

import asyncio
from collections.abc import Callable
from itertools import product
from typing import Any, cast

import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import Delivery, LiveEvent
from soma.gateway.v1.channel_service_pb2 import ConnectRequest, ConnectResponse, Hello

from services.gateway.application import adapter_stream
from services.gateway.application.adapter_stream import AdapterStream, StreamBounds
from services.gateway.domain.refusal import Refused, draining

PATIENCE_S = 10.0
NEVER_S = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Returned:
    """Stands for ReturnAcks."""

    def __init__(self) -> None:
        self.unsent: list[bytes] = []
        self.sent: list[bytes] = []

    def give_back(self, tenant: str, router: str, delivery_id: bytes, *, delay_ms: int, **_: object) -> None:
        (self.sent if delay_ms == adapter_stream.GONE_DELAY_MS else self.unsent).append(delivery_id)


class Accepting:
    """Stands for AcceptMessage: the test says when an item is stored."""

    def message(self, submission: object, message: Message, sink: AdapterStream, ref: int) -> int:
        return 1


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.acks = Returned()
        self.stream = AdapterStream(
            1,
            Hello(tenant="demo", channel="line", instance="line-1", credit=4, live=True),
            accept=cast(Any, Accepting()),
            acks=cast(Any, self.acks),
            bounds=StreamBounds(heartbeat_s=5.0),
            clock=self.clock,
            changed=lambda _: None,
        )

    async def say(self, ref: int) -> None:
        frame = ConnectRequest()
        frame.messages.add(ref=ref, agent="echo", session="s", idempotency_key="k", message=Message(parts=[Part()]))
        await self.stream.receive(frame)

    async def until_waiting(self) -> "Seen":
        """What the writer gets before it waits or the stream ends."""
        seen = Seen()
        task = asyncio.create_task(self._write(seen))
        for _ in range(10):
            await asyncio.sleep(0)
        if task.done():
            await task
        else:
            task.cancel()
            await asyncio.wait({task})
            seen.end = "waits"
        return seen

    async def _write(self, seen: "Seen") -> None:
        try:
            while (frame := await self.stream.next_frame()) is not None:
                assert frame.ByteSize(), "an empty frame"
                seen.frames.append(frame)
        except Refused:
            seen.end = "error"
        else:
            seen.end = "well"


class Seen:
    def __init__(self) -> None:
        self.frames: list[ConnectResponse] = []
        self.end = ""

    @property
    def deliveries(self) -> int:
        return sum(len(frame.deliveries) for frame in self.frames)


ENDS: dict[str, Callable[[AdapterStream], None]] = {
    "half-closed": AdapterStream.half_close,
    "well": AdapterStream.end,
    "error": lambda stream: stream.end(draining()),
}


@pytest.mark.parametrize("end", ENDS)
async def test_a_delivery_and_the_end_in_one_round_of_the_loop(end: str) -> None:
    world = World()
    waiting = asyncio.create_task(world.until_waiting())
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the writer waits
    world.stream.offer("router-1", Delivery(delivery_id=b"d" * 16))
    ENDS[end](world.stream)
    seen = await waiting
    assert not seen.frames
    assert seen.end == ("error" if end == "error" else "well")
    world.stream.leave()
    assert world.acks.unsent == [b"d" * 16]


@pytest.mark.parametrize("end", ENDS)
async def test_the_end_finds_the_writer_busy_with_a_delivery_behind_it(end: str) -> None:
    world = World()
    world.stream.offer("router-1", Delivery(delivery_id=b"1" * 16))
    assert await world.stream.next_frame() is not None  # it is being written when the next delivery and the end come
    world.stream.offer("router-1", Delivery(delivery_id=b"2" * 16))
    ENDS[end](world.stream)
    seen = await world.until_waiting()
    assert (len(seen.frames), seen.end) == (0, "error" if end == "error" else "well")
    world.stream.leave()
    assert (world.acks.sent, world.acks.unsent) == ([b"1" * 16], [b"2" * 16])


async def test_a_half_closed_stream_with_a_delivery_waits_for_its_receipt() -> None:
    world = World()
    await world.say(1)
    world.stream.offer("router-1", Delivery(delivery_id=b"d" * 16))
    world.stream.half_close()
    assert (await world.until_waiting()).end == "waits"
    world.stream.accepted(1, b"m" * 16, 1)
    seen = await world.until_waiting()
    assert [[receipt.ref for receipt in frame.receipts] for frame in seen.frames] == [[1]]
    assert (seen.deliveries, seen.end) == (0, "well")


@pytest.mark.parametrize(
    ("filled", "ready", "end", "half_closed", "unanswered"),
    list(product((False, True), (False, True), ("", "well", "error"), (False, True), (False, True))),
)
async def test_every_state_sends_what_is_gathered_and_then_ends_or_waits(
    filled: bool, ready: bool, end: str, half_closed: bool, unanswered: bool
) -> None:
    world = World()
    stream = world.stream
    if unanswered:
        await world.say(1)
    if ready:
        stream.offer("router-1", Delivery(delivery_id=b"d" * 16))
    if filled:
        await world.say(2)
        stream.accepted(2, b"m" * 16, 1)
    if half_closed:
        stream.half_close()
    if end:
        ENDS[end](stream)
    seen = await world.until_waiting()
    delivers = ready and not half_closed and not end
    assert len(seen.frames) == (filled or delivers)
    assert seen.deliveries == delivers
    assert sum(len(frame.receipts) for frame in seen.frames) == filled
    well = half_closed and not unanswered
    assert seen.end == (end or ("well" if well else "waits"))


@pytest.mark.parametrize("end", ENDS)
async def test_nothing_that_comes_after_the_end_keeps_a_stream_alive(end: str) -> None:
    world = World()
    ENDS[end](world.stream)
    world.stream.offer_live(LiveEvent(turn_id=b"t" * 16, dispatch=1))
    if end != "half-closed":
        world.clock.now += 6.0
        world.stream.tick()
        world.stream.drain(0)
    seen = await world.until_waiting()
    assert (seen.frames, seen.end) == ([], "error" if end == "error" else "well")


async def test_a_drain_without_grace_is_no_empty_frame() -> None:
    world = World()
    world.stream.drain(0)
    [frame] = (await world.until_waiting()).frames
    assert frame.HasField("drain")


async def test_a_half_closed_peer_that_takes_nothing_is_dead_after_three_heartbeats() -> None:
    world = World()
    await world.say(1)
    world.stream.half_close()
    for _ in range(10):  # it takes its heartbeats
        world.clock.now += 5.0
        world.stream.tick()
        assert [frame.heartbeat for frame in (await world.until_waiting()).frames] == [True]
    world.clock.now += 15.5
    world.stream.tick()
    with pytest.raises(Refused) as refused:
        await world.stream.next_frame()
    assert refused.value.error.reason == ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED


# The writer that waits for a peer without room.


class Writer:
    """Waits for a peer that takes nothing, as `Connect` does."""

    def __init__(self, stream: AdapterStream) -> None:
        self.stream = stream
        self.room = asyncio.Event()
        self.frames: list[ConnectResponse] = []
        self.task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        async with self.stream.writing():
            await self.room.wait()
            while (frame := await self.stream.next_frame()) is not None:
                self.frames.append(frame)

    async def over(self) -> BaseException | None:
        """What it ended with."""
        done, _ = await asyncio.wait({self.task}, timeout=PATIENCE_S)
        assert done, "the writer waits for a peer that has no room"
        assert not self.task.cancelled(), "cancelled"
        return self.task.exception()


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_stream, "LAST_FRAMES_S", 0.01)


@pytest.fixture
def all_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_stream, "LAST_FRAMES_S", NEVER_S)


async def started(stream: AdapterStream) -> Writer:
    writer = Writer(stream)
    await asyncio.sleep(0)
    return writer


@pytest.mark.usefixtures("no_patience")
async def test_the_end_reaches_a_writer_whose_peer_has_no_room() -> None:
    writer = await started(World().stream)
    reason = draining()
    writer.stream.end(reason)
    assert await writer.over() is reason


@pytest.mark.usefixtures("no_patience")
async def test_a_stream_that_ends_well_does_so_without_its_peer() -> None:
    writer = await started(World().stream)
    writer.stream.end()
    assert await writer.over() is None


@pytest.mark.usefixtures("no_patience")
async def test_a_stream_that_was_ended_before_its_writer_came_ends_too() -> None:
    stream = World().stream
    reason = draining()
    stream.end(reason)
    assert await (await started(stream)).over() is reason


@pytest.mark.usefixtures("all_patience")
async def test_a_peer_that_makes_room_gets_what_was_gathered_and_then_the_end() -> None:
    world = World()
    await world.say(1)
    writer = await started(world.stream)
    world.stream.accepted(1, b"m" * 16, 1)
    reason = draining()
    world.stream.end(reason)
    writer.room.set()
    assert await writer.over() is reason
    assert [receipt.ref for frame in writer.frames for receipt in frame.receipts] == [1]


@pytest.mark.usefixtures("all_patience")
async def test_a_stream_that_is_cut_waits_for_nobody() -> None:
    writer = await started(World().stream)
    reason = draining()
    writer.stream.end(reason)
    writer.stream.cut()
    writer.stream.cut()
    await asyncio.sleep(0)
    writer.stream.cut()  # the writer is being cancelled
    assert await writer.over() is reason
    writer.stream.cut()


@pytest.mark.usefixtures("all_patience")
@pytest.mark.parametrize(
    ("order", "rounds_between"), [("cut, cancel", 0), ("cut, cancel", 1), ("cancel, cut", 0), ("cancel, cut", 1)]
)
async def test_a_cancellation_from_outside_stays_one(order: str, rounds_between: int) -> None:
    writer = await started(World().stream)
    writer.stream.end(draining())
    acts: dict[str, Callable[[], object]] = {"cut": writer.stream.cut, "cancel": writer.task.cancel}
    first, second = order.split(", ")
    acts[first]()
    for _ in range(rounds_between):
        await asyncio.sleep(0)
    acts[second]()
    await asyncio.wait({writer.task}, timeout=PATIENCE_S)
    assert writer.task.cancelled()


async def test_a_timeout_that_is_not_the_streams_stays_one() -> None:
    stream = World().stream
    with pytest.raises(TimeoutError):
        async with stream.writing():
            raise TimeoutError


async def test_a_stream_that_is_not_ended_waits_for_its_peer() -> None:
    writer = await started(World().stream)
    limit = writer.stream._limit
    assert limit is not None
    assert limit.when() is None
    writer.room.set()
    writer.stream.end()
    assert await writer.over() is None
