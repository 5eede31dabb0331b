"""What the gateways are told of the lanes: never more than is in the mailbox."""

import asyncio
from functools import partial

import pytest
from soma.router.v1.outbound_pb2 import LaneProgress

from services.router.application import report_progress
from services.router.application.report_progress import ReportProgress
from services.router.domain.partition import Cursor, Partition
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import STREAM, a_partition


class Lane:
    def __init__(self, *partitions: Partition) -> None:
        self.last_seq = 0
        self._partitions = list(partitions)

    def partitions(self) -> list[Partition]:
        return self._partitions


def at(number: int, cursor: int, read: int, *, attached: bool = True) -> Partition:
    partition = a_partition(number)
    partition.cursor, partition.read_seq, partition.attached = Cursor(STREAM, cursor, "b"), read, attached
    return partition


async def place_of(lane: Lane, *, in_time: bool = True) -> int | None:
    said: list[LaneProgress] = []

    async def send(progress: LaneProgress) -> None:
        said.append(progress)

    await ReportProgress([lane], "router-0", send, lambda: in_time).report()
    return said[0].seq if said else None


async def test_what_is_read_and_not_committed_is_not_taken_in() -> None:
    lane = Lane(at(0, cursor=5, read=9), at(1, cursor=7, read=7))
    lane.last_seq = 9
    assert await place_of(lane) == 5


async def test_a_partition_for_which_nothing_came_is_as_far_as_the_reader() -> None:
    lane = Lane(at(0, cursor=9, read=9), at(1, cursor=2, read=2))
    lane.last_seq = 9
    assert await place_of(lane) == 9


async def test_a_partition_that_its_reader_has_yet_to_go_back_for_is_at_its_cursor() -> None:
    lane = Lane(at(0, cursor=9, read=9), at(1, cursor=2, read=2, attached=False))
    lane.last_seq = 9
    assert await place_of(lane) == 2


async def test_a_lane_of_others_and_an_overdue_lease_are_not_spoken_of() -> None:
    assert await place_of(Lane()) is None
    assert await place_of(Lane(at(0, 1, 1)), in_time=False) is None


async def test_a_lane_that_stands_still_is_not_spoken_of_again_at_once() -> None:
    said: list[LaneProgress] = []

    async def send(progress: LaneProgress) -> None:
        said.append(progress)

    lane = Lane(at(0, 1, 1))
    lane.last_seq = 1
    reports = ReportProgress([lane], "router-0", send, lambda: True)
    await reports.report()
    await reports.report()
    lane.last_seq = 2
    await reports.report()
    assert [progress.seq for progress in said] == [1, 2]


async def test_what_is_taken_in_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who fills the gateway's window waits for it: with a look now and then instead, the window's size by the time
    between two looks is all that a tenant gets.
    """
    monkeypatch.setattr(report_progress, "IDLE_LOOK_S", 60.0)
    said: list[int] = []

    async def send(progress: LaneProgress) -> None:
        said.append(progress.seq)

    lane = Lane(at(0, 1, 1))
    reports = ReportProgress([lane], "router-0", send, lambda: True)
    task = asyncio.create_task(reports.run())
    try:
        for seq in range(2, 6):
            await eventually(partial(said.__contains__, seq - 1))
            lane.partitions()[0].cursor = Cursor(STREAM, seq, "b")
            lane.partitions()[0].read_seq = seq
            reports.taken_in()
        await eventually(partial(said.__contains__, 5))
    finally:
        task.cancel()
