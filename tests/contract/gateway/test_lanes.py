"""The port `Lanes`: JetStream and the fake in memory keep the same promises."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nats.js.errors import NotFoundError
from soma.router.v1.inbound_pb2 import InBatch, Inbound

from services.gateway.adapters.lanes_memory import MemoryLanes
from services.gateway.adapters.lanes_nats import NatsLanes
from services.gateway.application.ports import BatchUnacceptable, BusSilent, LaneFull, Lanes
from soma_common.layout import LaneLayout
from soma_common.nats.connection import connect_nats
from soma_common.nats.lanes import stream_name
from soma_common.testing.embedded import running_nats

BOUND = 3


@dataclass
class Subject:
    lanes: Lanes
    stored: Callable[[], Awaitable[list[bytes]]]
    """The message ids in lane 0, in order."""
    fall_silent: Callable[[], Awaitable[None]]


@pytest.fixture(params=["nats", "memory"])
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    if request.param == "memory":
        memory = MemoryLanes(BOUND)

        async def kept() -> list[bytes]:
            return [
                item.message_id
                for (_, lane), batches in memory.batches.items()
                if lane == 0
                for batch in batches
                for item in batch
            ]

        async def mute() -> None:
            memory.silent = 1000

        yield Subject(memory, kept, mute)
        return
    async with running_nats(tmp_path) as server:
        nc = await connect_nats(server.url, server.token_file, "test")
        lanes = NatsLanes(nc, LaneLayout(8, 2), BOUND)
        await lanes.ensure()
        js = nc.jetstream()

        async def stored() -> list[bytes]:
            found: list[bytes] = []
            for sequence in range(1, 100):
                try:
                    raw = await js.get_msg(stream_name(0), sequence)
                except NotFoundError:
                    return found
                found += [item.message_id for item in InBatch.FromString(raw.data or b"").items]
            return found

        yield Subject(lanes, stored, server.kill9)
        await nc.close()


def items(*names: str, size: int = 1) -> list[Inbound]:
    return [Inbound(message_id=name.encode(), content=b"x" * size) for name in names]


async def test_a_batch_is_stored_whole_and_in_order(subject: Subject) -> None:
    await subject.lanes.store("demo", 0, "b1", items("1", "2"), 1.0)
    await subject.lanes.store("demo", 0, "b2", items("3"), 1.0)
    await subject.lanes.store("demo", 1, "b3", items("other lane"), 1.0)
    assert await subject.stored() == [b"1", b"2", b"3"]


async def test_the_same_id_is_stored_once_even_when_the_lane_is_full(subject: Subject) -> None:
    for number in range(BOUND):
        await subject.lanes.store("demo", 0, f"b{number}", items(str(number)), 1.0)
    await subject.lanes.store("demo", 0, "b0", items("0"), 1.0)
    assert await subject.stored() == [b"0", b"1", b"2"]


async def test_the_bound_is_per_tenant_and_a_refused_id_may_come_again(subject: Subject) -> None:
    for number in range(BOUND):
        await subject.lanes.store("demo", 0, f"b{number}", items(str(number)), 1.0)
    for _ in range(2):
        with pytest.raises(LaneFull) as caught:
            await subject.lanes.store("demo", 0, "b9", items("9"), 1.0)
        assert (caught.value.bound, caught.value.value) == ("lane.tenant_batches", BOUND)
    await subject.lanes.store("other", 0, "b9", items("other"), 1.0)
    assert await subject.stored() == [b"0", b"1", b"2", b"other"]


async def test_what_is_too_large_is_never_taken(subject: Subject) -> None:
    with pytest.raises(BatchUnacceptable):
        await subject.lanes.store("demo", 0, "b", items("1", size=2 * 1024 * 1024), 1.0)


async def test_no_answer_is_said_in_time(subject: Subject) -> None:
    await subject.fall_silent()
    with pytest.raises(BusSilent):
        await subject.lanes.store("demo", 0, "b", items("1"), 0.2)
