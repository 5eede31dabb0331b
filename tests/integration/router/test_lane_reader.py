"""The lane reader on a real NATS server: in order, without gap or loss, whatever happens to the lane."""

from collections.abc import AsyncIterator
from time import monotonic

import pytest

from services.router.domain.partition import Cursor
from soma_common.nats.lanes import ensure_lanes, stream_name
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually
from tests.integration.router.lane import LAYOUT, Lane, partition_of, running_lane
from tests.unit.router.builders import inbound, names_in

A, B = names_in(0, 1)[0], names_in(1, 1)[0]
"""Sessions of partition 0 and 1."""


@pytest.fixture
async def lane(nats_server: FaultyNats) -> AsyncIterator[Lane]:
    async with running_lane(nats_server) as lane:
        yield lane


def numbers(first: int, count: int) -> list[bytes]:
    return [str(n).encode() for n in range(first, first + count)]


async def test_messages_come_in_order(lane: Lane) -> None:
    lane.attach(lane.own(0))
    await lane.send_many(A, 0, 300)
    await eventually(lambda: len(lane.mailbox.got[0]) >= 300)
    assert lane.mailbox.got[0] == numbers(0, 300)


async def test_a_batch_is_split_over_the_partitions_that_are_ours(lane: Lane) -> None:
    for number in (0, 1):
        lane.attach(lane.own(number))
    other = names_in(2, 1)[0]
    place = await lane.send(*(inbound(name, "k", name.encode()) for name in (A, other, B)))
    await eventually(lambda: len(lane.mailbox.all()) >= 2)
    assert dict(lane.mailbox.got) == {0: [A.encode()], 1: [B.encode()]}
    assert lane.state.partitions[0].cursor == lane.state.partitions[1].cursor == place


async def test_reading_begins_behind_the_cursor(lane: Lane) -> None:
    places = await lane.send_many(A, 0, 10)
    lane.attach(lane.own(0, places[3]))
    await eventually(lambda: len(lane.mailbox.got[0]) >= 6)
    assert lane.mailbox.got[0] == numbers(4, 6)


async def test_a_partition_that_comes_later_is_caught_up_and_nothing_is_read_twice(lane: Lane) -> None:
    """Its cursor is far behind where the reader is."""
    lane.attach(lane.own(0))
    for n in range(20):
        await lane.send(inbound(A, f"k{n}", str(n).encode()), inbound(B, f"k{n}", str(n).encode()))
    await eventually(lambda: len(lane.mailbox.got[0]) == 20)
    lane.attach(lane.own(1))
    await lane.send(inbound(A, "new", b"20"), inbound(B, "new", b"20"))
    await eventually(lambda: len(lane.mailbox.got[1]) >= 21 and len(lane.mailbox.got[0]) >= 21)
    assert lane.mailbox.got == {0: numbers(0, 21), 1: numbers(0, 21)}


async def test_nothing_is_skipped_for_a_partition_that_is_ours_and_not_attached_yet(lane: Lane) -> None:
    """Ownership takes several partitions and attaches them together: meanwhile the lane goes on."""
    lane.attach(lane.own(0))
    for n in range(5):
        await lane.send(inbound(A, f"k{n}", str(n).encode()), inbound(B, f"k{n}", str(n).encode()))
    await eventually(lambda: len(lane.mailbox.got[0]) == 5)
    late = lane.own(1)
    await lane.send(inbound(A, "new", b"5"), inbound(B, "new", b"5"))
    await eventually(lambda: len(lane.mailbox.got[0]) == 6)
    await lane.reader.move_idle_cursors()
    lane.attach(late)
    await eventually(lambda: len(lane.mailbox.got[1]) >= 6)
    assert lane.mailbox.got[1] == numbers(0, 6)
