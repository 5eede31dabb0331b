"""Gathering, one batch in flight, retries under one id, giving up together."""

import asyncio

import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.router.v1.inbound_pb2 import Inbound

from services.gateway.adapters.lanes_memory import MemoryLanes
from services.gateway.application import write_lanes
from services.gateway.application.write_lanes import LaneBounds, LaneWriters
from services.gateway.domain.ingest_window import LaneProgress
from services.gateway.domain.refusal import Refused
from soma_common.clock import monotonic
from soma_common.testing.eventually import eventually


class Answers:
    def __init__(self) -> None:
        self.order: list[int] = []
        self.errors: dict[int, Error] = {}

    def accepted(self, ref: int, message_id: bytes, size: int) -> None:
        assert message_id == str(ref).encode()
        self.order.append(ref)

    def refused(self, ref: int, error: Error, size: int) -> None:
        self.order.append(ref)
        self.errors[ref] = error


def writers_for(lanes: MemoryLanes, **bounds: object) -> LaneWriters:
    settings = {"attempt_s": 0.02, "deadline_s": 0.2, **bounds}
    progress = LaneProgress(monotonic)
    return LaneWriters(lanes, LaneBounds(**settings), progress, observe=lambda *_: None)  # type: ignore[arg-type]


def put(writers: LaneWriters, answers: Answers, *refs: int, tenant: str = "demo", size: int = 1) -> None:
    for ref in refs:
        writers.put(tenant, 0, Inbound(message_id=str(ref).encode(), content=b"x" * size), answers, ref)


def sizes(lanes: MemoryLanes) -> list[int]:
    return [len(batch) for batch in lanes.batches["demo", 0]]


async def test_what_gathers_while_one_batch_is_in_flight_goes_in_the_next() -> None:
    lanes, answers = MemoryLanes(), Answers()
    lanes.delay_s = 0.01
    writers = writers_for(lanes)
    put(writers, answers, 0)
    await asyncio.sleep(0.005)
    put(writers, answers, *range(1, 100))
    await eventually(lambda: len(answers.order) == 100)
    assert sizes(lanes) == [1, 99]
    assert lanes.most_in_flight == 1
    assert answers.order == list(range(100))
    assert writers.waiting == 0


async def test_batches_are_cut_by_items_and_bytes() -> None:
    lanes, answers = MemoryLanes(), Answers()
    writers = writers_for(lanes, batch_items=10, batch_bytes=5000)
    put(writers, answers, *range(25))
    put(writers, answers, *range(25, 30), size=2000)
    put(writers, answers, 30, size=100_000)
    await eventually(lambda: len(answers.order) == 31)
    assert answers.order == list(range(31))
    assert max(sizes(lanes)) <= 9
    assert sizes(lanes)[-4:] == [1, 1, 1, 1] or sizes(lanes)[-1] == 1


async def test_a_retry_keeps_the_id_and_nothing_is_stored_twice() -> None:
    lanes, answers = MemoryLanes(), Answers()
    lanes.silent, lanes.stores_silently = 3, True
    writers = writers_for(lanes, deadline_s=2.0)
    put(writers, answers, 0)
    await asyncio.sleep(0.01)
    put(writers, answers, 1)
    await eventually(lambda: len(answers.order) == 2)
    assert not answers.errors
    assert sizes(lanes) == [1, 1]
    assert len(lanes.tries) == 5
    assert len(set(lanes.tries)) == 2


async def test_on_giving_up_everything_gathered_behind_fails_too() -> None:
    lanes, answers, others = MemoryLanes(), Answers(), Answers()
    lanes.silent = 1000
    writers = writers_for(lanes)
    put(writers, answers, 0)
    await asyncio.sleep(0.05)
    put(writers, answers, 1, 2)
    await eventually(lambda: len(answers.order) == 3)
    assert answers.order == [0, 1, 2]
    assert {error.reason for error in answers.errors.values()} == {ErrorReason.ERROR_REASON_BUS_UNAVAILABLE}
    assert all(error.retry_delay_ms for error in answers.errors.values())
    lanes.silent = 0
    put(writers, answers, 3)
    put(writers, others, 0, tenant="other")
    await eventually(lambda: len(answers.order) == 4 and others.order)
    assert sizes(lanes) == [1]


async def test_a_defect_on_the_way_is_told_and_nothing_stays_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes, answers = MemoryLanes(), Answers()
    writers = writers_for(lanes)

    async def broken(*_: object) -> None:
        raise ValueError("nobody thought of this")

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "store", broken)
        put(writers, answers, 0, 1)
        await eventually(lambda: len(answers.order) == 2)
    assert {error.reason for error in answers.errors.values()} == {ErrorReason.ERROR_REASON_BUS_UNAVAILABLE}
    assert writers.waiting == 0
    put(writers, answers, 2)
    await eventually(lambda: len(answers.order) == 3)
    assert sizes(lanes) == [1]


async def test_a_silent_tenant_does_not_hold_up_another() -> None:
    lanes, answers, others = MemoryLanes(), Answers(), Answers()
    lanes.silent = 1
    writers = writers_for(lanes, attempt_s=0.2, deadline_s=1.0)
    put(writers, answers, 0)
    await asyncio.sleep(0)
    put(writers, others, 0, tenant="other")
    await eventually(lambda: others.order)
    assert not answers.order
    await eventually(lambda: answers.order)


async def test_a_full_lane_refuses_with_its_bound_and_the_next_is_tried() -> None:
    lanes, answers = MemoryLanes(tenant_bound=1), Answers()
    writers = writers_for(lanes)
    put(writers, answers, 0)
    await eventually(lambda: answers.order)
    put(writers, answers, 1)
    await eventually(lambda: 1 in answers.errors)
    error = answers.errors[1]
    assert error.reason == ErrorReason.ERROR_REASON_QUEUE_FULL
    assert dict(error.metadata) == {"bound": "lane.tenant_batches", "value": "1"}
    assert error.retry_delay_ms


@pytest.mark.parametrize(
    ("bounds", "taken", "bound"),
    [({"tenant_items": 5}, 5, "gateway.tenant_items"), ({"tenant_bytes": 5 * 1512}, 5, "gateway.tenant_bytes")],
)
async def test_the_queue_of_a_tenant_is_bounded(bounds: dict[str, int], taken: int, bound: str) -> None:
    lanes, answers = MemoryLanes(), Answers()
    lanes.delay_s = 0.05
    writers = writers_for(lanes, **bounds)
    put(writers, answers, *range(taken), size=1000)
    with pytest.raises(Refused) as caught:
        put(writers, answers, taken, size=1000)
    assert caught.value.error.metadata["bound"] == bound
    put(writers, answers, 0, tenant="other", size=1000)
    await eventually(lambda: len(answers.order) == taken + 1)
    put(writers, answers, taken, size=1000)
    await writers.drain(1.0)
    assert len(answers.order) == taken + 2


async def test_what_the_routers_have_not_taken_in_holds_back_the_next_batch_of_the_same_tenant() -> None:
    lanes, answers = MemoryLanes(), Answers()
    writers = writers_for(lanes, ingest_window=10, batch_items=8)
    writers.on_progress(0, "router-0", 0)
    put(writers, answers, *range(100))
    await eventually(lambda: sizes(lanes) == [8, 2], what="no more than the window")
    put(writers, answers, 200, tenant="acme")
    await eventually(lambda: 200 in answers.order, what="another tenant has a window of its own")
    assert sizes(lanes) == [8, 2]
    writers.on_progress(0, "router-1", 1)
    assert sizes(lanes) == [8, 2], "the slower router counts"
    writers.on_progress(0, "router-0", 1)
    await eventually(lambda: sizes(lanes) == [8, 2, 8], what="room for the batch that was taken in")
    writers.on_progress(0, "router-0", 3)
    writers.on_progress(0, "router-1", 3)
    await eventually(lambda: sizes(lanes)[3:] == [8, 2], what="room for all of the window")


async def test_while_no_router_speaks_nothing_is_held_back() -> None:
    lanes, answers = MemoryLanes(), Answers()
    writers = writers_for(lanes, ingest_window=10)
    put(writers, answers, *range(100))
    await eventually(lambda: len(answers.order) == 100)


async def test_a_router_that_takes_nothing_in_slows_a_tenant_down_and_does_not_stop_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(write_lanes, "LONGEST_WINDOW_WAIT_S", 0.02)
    lanes, answers = MemoryLanes(), Answers()
    writers = writers_for(lanes, ingest_window=1)
    writers.on_progress(0, "router-0", 0)
    put(writers, answers, *range(5))
    await eventually(lambda: len(answers.order) == 5)
