"""What of a lane may be purged: only what every partition of it has, of the stream that is there now."""

from services.router.domain.lane_window import CommittedPlace
from services.router.domain.partition import Cursor
from tests.integration.router.store import Store
from tests.unit.router.builders import STREAM, ingest


async def move(store: Store, number: int, seq: int, stream: str = STREAM) -> None:
    p = await store.take(number)
    await store.commit(ingest(p, seq, stream=stream))
    assert p.cursor == Cursor(stream, seq, f"batch-{seq}")


async def test_the_floor_is_the_lowest_cursor_of_the_lanes_partitions(store: Store) -> None:
    for number in range(8):
        await move(store, number, 100 + number)
    assert await store.history.lane_floors(1) == {0: (STREAM, 100)}
    assert await store.history.lane_floors(2) == {0: (STREAM, 100), 1: (STREAM, 101)}


async def test_a_partition_that_has_read_nothing_keeps_the_whole_lane(store: Store) -> None:
    for number in range(7):
        await move(store, number, 100)
    assert await store.history.lane_floors(1) == {}


async def test_cursors_that_count_different_streams_say_nothing(store: Store) -> None:
    for number in range(7):
        await move(store, number, 100)
    await move(store, 7, 5, "made anew")
    assert await store.history.lane_floors(1) == {}


async def test_the_log_grows_with_what_is_committed_and_nobody_stands_by(store: Store) -> None:
    before = await store.history.committed_place()
    await move(store, 0, 1)
    after = await store.history.committed_place()
    assert after == CommittedPlace(after.written, None)
    assert after.written > before.written
