"""The lane reader on a real NATS server: in order, without gap or loss, whatever happens to the lane."""

import asyncio
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any

import pytest

from services.router.adapters.inbound_nats import GAPS
from services.router.application.items import CursorItem
from services.router.domain.partition import Cursor
from soma_common.nats.lanes import ensure_lanes, stream_name
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually
from tests.integration.router.lane import LAYOUT, Lane, running_lane
from tests.stalls import Stalls
from tests.unit.router.builders import inbound, names_in

A, B = names_in(0, 1)[0], names_in(1, 1)[0]
"""Sessions of partition 0 and 1."""


@pytest.fixture
async def lane(nats_server: FaultyNats) -> AsyncIterator[Lane]:
    async with running_lane(nats_server) as lane:
        yield lane


async def settled(value: Callable[[], int], for_s: float = 0.7) -> int:
    """The value once it has not changed for a while."""
    seen, since = value(), monotonic()

    def stands_still() -> bool:
        nonlocal seen, since
        if value() != seen:
            seen, since = value(), monotonic()
        return monotonic() - since >= for_s

    await eventually(stands_still, timeout_s=10)
    return seen


def gaps() -> float:
    """Gaps counted so far in this process."""
    return float(GAPS._value.get())


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


async def test_what_a_former_owner_may_have_read_is_what_the_lane_held_when_the_term_attached(lane: Lane) -> None:
    """And nothing more: a reader that attaches again has read the rest itself."""
    places = await lane.send_many(A, 0, 10)
    partition = lane.own(0, places[3])
    lane.attach(partition)
    await eventually(lambda: len(lane.mailbox.got[0]) >= 6)
    assert partition.known_seq == places[-1].seq
    later = await lane.send_many(A, 10, 3)
    other = lane.own(1)
    lane.attach(other)
    await eventually(lambda: other.known_seq is not None and len(lane.mailbox.got[0]) >= 9)
    assert (partition.known_seq, other.known_seq) == (places[-1].seq, later[-1].seq)


async def test_a_partition_is_not_judged_by_an_answer_that_is_older_than_its_term(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the reader asks for the lane's end, the former owner goes on, and lets the partition go."""
    lane.attach(lane.own(0))
    await lane.send_many(A, 0, 5)
    await eventually(lambda: len(lane.mailbox.got[0]) >= 5)
    asked, answer = asyncio.Event(), asyncio.Event()
    stream_info = lane.js.stream_info

    async def slowly(name: str) -> Any:
        info = await stream_info(name)
        if not asked.is_set():
            asked.set()
            await asyncio.wait_for(answer.wait(), 5)
        return info

    monkeypatch.setattr(lane.js, "stream_info", slowly)
    lane.attach(lane.own(1))
    await asyncio.wait_for(asked.wait(), 5)
    before, last = gaps(), (await lane.send_many(B, 5, 3))[-1]
    partition = lane.own(2, last)
    lane.attach(partition)
    answer.set()
    await eventually(lambda: partition.known_seq is not None)
    assert (partition.known_seq, gaps()) == (last.seq, before)


# ---- the server dies, the stream goes back


async def test_a_killed_server_is_read_on_within_five_seconds(lane: Lane) -> None:
    """Measured from the restart. Without loss, and without reading again what is committed."""
    lane.attach(lane.own(0))
    await lane.send_many(A, 0, 50)
    await eventually(lambda: len(lane.mailbox.got[0]) == 50)
    await lane.server.kill9()
    await lane.server.restart()
    async with Stalls() as stalls:
        began = monotonic()
        await eventually(lambda: lane.client.is_connected, timeout_s=20)
        await lane.send_many(A, 50, 50)
        await eventually(lambda: len(lane.mailbox.got[0]) >= 100, timeout_s=20)
        assert monotonic() - began < 5.0 + stalls.since(began)
    assert lane.mailbox.got[0] == numbers(0, 100)


async def test_what_was_read_and_not_committed_survives_a_restart_of_the_server_once(lane: Lane) -> None:
    lane.attach(lane.own(0))
    lane.mailbox.stalled = True
    await lane.send_many(A, 0, 20)
    await eventually(lambda: len(lane.mailbox.waiting) == 20)
    await lane.server.kill9()
    await lane.server.restart()
    await eventually(lambda: lane.client.is_connected, timeout_s=5)
    await lane.send_many(A, 20, 5)
    lane.mailbox.stalled = False
    await eventually(lambda: len(lane.mailbox.got[0]) >= 25, timeout_s=5)
    assert lane.mailbox.got[0] == numbers(0, 25)


async def test_a_frozen_server_is_noticed_and_nothing_is_lost(lane: Lane) -> None:
    lane.attach(lane.own(0))
    await lane.send_many(A, 0, 10)
    await eventually(lambda: len(lane.mailbox.got[0]) == 10)
    lane.server.sigstop()
    try:
        await eventually(lambda: lane.reader._consumer is None, timeout_s=8, what="the silence is noticed")
    finally:
        lane.server.sigcont()
    await eventually(lambda: lane.client.is_connected, timeout_s=8)
    await lane.send_many(A, 10, 10)
    await eventually(lambda: len(lane.mailbox.got[0]) >= 20, timeout_s=8)
    assert lane.mailbox.got[0] == numbers(0, 20)


async def test_a_stream_made_anew_is_read_from_its_beginning(lane: Lane) -> None:
    """The new stream's sequences are below the cursor: a reader that goes by numbers alone skips them."""
    lane.attach(lane.own(0))
    await lane.send_many(A, 0, 30)
    await eventually(lambda: len(lane.mailbox.got[0]) == 30)
    partition = lane.state.partitions[0]
    partition.known_seq = 30
    await lane.js.delete_stream(stream_name(0))
    await ensure_lanes(lane.js, LAYOUT, 1000)
    last = (await lane.send_many(A, 30, 10))[-1]
    await eventually(lambda: len(lane.mailbox.got[0]) >= 40, timeout_s=10)
    assert lane.mailbox.got[0] == numbers(0, 40)
    assert partition.cursor == last
    assert partition.known_seq in range(last.seq + 1), "of the new stream's numbers"


async def test_a_new_owner_notices_a_stream_made_anew_while_nobody_read(lane: Lane) -> None:
    before = (await lane.send_many(A, 0, 30))[-1]
    await lane.js.delete_stream(stream_name(0))
    await ensure_lanes(lane.js, LAYOUT, 1000)
    await lane.send_many(A, 30, 40)  # beyond the old cursor's sequence
    partition = lane.own(0, before)
    lane.attach(partition)
    await eventually(lambda: len(lane.mailbox.got[0]) >= 40)
    assert lane.mailbox.got[0] == numbers(30, 40)
    assert partition.known_seq == 40, "read again by this very term"


async def test_another_message_at_the_cursors_place_is_noticed(lane: Lane) -> None:
    """The same stream, restored: it has the sequence, but it is not that message."""
    places = await lane.send_many(A, 0, 10)
    lane.attach(lane.own(0, Cursor(places[5].stream, places[5].seq, "a batch that was lost")))
    await eventually(lambda: len(lane.mailbox.got[0]) >= 10)
    assert lane.mailbox.got[0] == numbers(0, 10)


async def test_a_cursor_beyond_the_end_of_the_stream_is_noticed(lane: Lane) -> None:
    places = await lane.send_many(A, 0, 3)
    lane.attach(lane.own(0, Cursor(places[0].stream, 100, "lost with the tail")))
    await eventually(lambda: len(lane.mailbox.got[0]) >= 3)
    await lane.send_many(A, 3, 2)
    await eventually(lambda: len(lane.mailbox.got[0]) >= 5)
    assert lane.mailbox.got[0] == numbers(0, 5)


async def test_a_tail_that_was_read_and_then_lost_hides_nothing_that_takes_its_place(lane: Lane) -> None:
    """The server has ten messages; the reader had five more in hand that it lost. The next five get their sequences."""
    places = await lane.send_many(A, 0, 10)
    partition = lane.own(0, places[7])
    partition.read_seq = places[-1].seq + 5
    lane.attach(partition)
    await eventually(lambda: lane.reader._consumer is not None)
    await lane.send_many(A, 100, 5)
    await eventually(lambda: set(numbers(100, 5)) <= set(lane.mailbox.got[0]))


async def test_only_the_partition_whose_cursor_does_not_fit_is_read_again(lane: Lane) -> None:
    places = [await lane.send(inbound(A, f"k{n}", b"a"), inbound(B, f"k{n}", b"b")) for n in range(10)]
    fits, does_not = lane.own(0, places[7]), lane.own(1, Cursor(places[7].stream, places[7].seq, "other"))
    lane.attach(fits)
    lane.attach(does_not)
    await eventually(lambda: len(lane.mailbox.got[1]) >= 10 and len(lane.mailbox.got[0]) >= 2)
    assert lane.mailbox.got == {0: [b"a"] * 2, 1: [b"b"] * 10}


async def test_a_cursor_that_does_not_fit_is_taken_back_in_the_store_too(lane: Lane) -> None:
    """Else it lets others purge what is not read yet: it counts messages that are gone."""
    places = await lane.send_many(A, 0, 3)
    partition = lane.own(0, Cursor(places[0].stream, 100, "lost with the tail"))
    lane.mailbox.stalled = True
    lane.attach(partition)
    await eventually(lambda: len(lane.mailbox.waiting) == 4)
    first = lane.mailbox.waiting[0]
    assert isinstance(first, CursorItem)
    assert first.cursor == Cursor(places[0].stream, 0, "")


async def test_what_is_removed_before_it_was_read_is_told(lane: Lane) -> None:
    """While the reader waits for the mailbox somebody purges the lane: the reader's consumer goes on with the next."""
    before = gaps()
    lane.attach(lane.own(0))
    await lane.send_many(A, 0, 5)
    await eventually(lambda: len(lane.mailbox.got[0]) == 5)
    lane.ingest.backlog = 1_000_000
    places = await lane.send_many(A, 5, 600)  # more than was asked for before
    unread = 605 - await settled(lambda: len(lane.mailbox.got[0]))
    await lane.js.purge_stream(stream_name(0), seq=places[-10].seq)
    lane.ingest.backlog = 0
    await eventually(lambda: lane.mailbox.got[0][-10:] == numbers(595, 10))
    assert unread > 10
    assert gaps() == before + 1


async def test_a_new_database_under_a_lane_that_was_purged_is_told(lane: Lane) -> None:
    """Its cursors are those of a beginning, and the lane has no beginning."""
    place = (await lane.send_many(A, 0, 10))[-3]
    await lane.js.purge_stream(stream_name(0), seq=place.seq)
    before = gaps()
    lane.attach(lane.own(0))
    await eventually(lambda: lane.mailbox.got[0] == numbers(7, 3))
    assert gaps() == before + 1


async def test_a_lane_that_was_emptied_is_told_once_and_read_on(lane: Lane) -> None:
    """Its sequences go on where they were, and no message of it is there to compare a cursor with."""
    places = await lane.send_many(A, 0, 10)
    await lane.js.purge_stream(stream_name(0))
    before = gaps()
    lane.attach(lane.own(0, places[3]))
    await eventually(lambda: gaps() == before + 1)
    await eventually(lambda: lane.state.partitions[0].cursor == Cursor(places[0].stream, 10, ""))
    lane.attach(lane.own(0, lane.state.partitions[0].cursor))  # a new owner, before anything came
    await eventually(lambda: lane.reader._consumer is not None)
    await lane.send_many(A, 10, 5)
    await eventually(lambda: lane.mailbox.got[0] == numbers(10, 5))
    assert gaps() == before + 1


async def test_a_stream_that_is_gone_is_made_anew_by_its_reader(lane: Lane) -> None:
    lane.attach(lane.own(0))
    await lane.send_many(A, 0, 5)
    await eventually(lambda: len(lane.mailbox.got[0]) == 5)
    before = gaps()
    await lane.js.delete_stream(stream_name(0))
    await eventually(lambda: gaps() == before + 1, timeout_s=10)
    await eventually(lambda: lane.reader._consumer is not None, timeout_s=10)
    await lane.send_many(A, 5, 5)
    await eventually(lambda: lane.mailbox.got[0] == numbers(0, 10), timeout_s=10)


# ---- idle cursors and purge


async def test_idle_cursors_follow_what_was_read_and_no_further(lane: Lane) -> None:
    for number in (0, 1):
        lane.attach(lane.own(number))
    places = await lane.send_many(A, 0, 5)
    await eventually(lambda: len(lane.mailbox.got[0]) == 5)
    await lane.reader.move_idle_cursors()
    assert lane.state.partitions[1].cursor == places[-1]
    place = await lane.send(inbound(B, "k", b"late"))
    await eventually(lambda: lane.mailbox.got[1] == [b"late"])
    assert lane.state.partitions[1].cursor == place


async def test_idle_cursors_do_not_pass_what_is_read_and_not_committed(lane: Lane) -> None:
    """The mailbox stalls with a message of partition 1 in hand, and its router dies there."""
    for number in (0, 1):
        lane.attach(lane.own(number))
    lane.mailbox.stalled = True
    await lane.send(inbound(B, "k", b"in hand"))
    await lane.send_many(A, 0, 5)
    await eventually(lambda: len(lane.mailbox.waiting) == 6)
    await lane.reader.move_idle_cursors()
    in_order = [item.partition.id for item in lane.mailbox.waiting]
    assert in_order[0] == 1, "the message goes first, the cursor behind it"
    assert lane.state.partitions[1].cursor.seq == 0


async def test_idle_cursors_stand_still_while_the_reader_goes_back(lane: Lane) -> None:
    lane.attach(lane.own(0))
    await lane.send_many(B, 0, 5)
    await lane.send_many(A, 0, 5)
    await eventually(lambda: len(lane.mailbox.got[0]) == 5)
    late = lane.own(1)
    lane.attach(late)
    await lane.reader.move_idle_cursors()
    assert late.read_seq == 0
    await eventually(lambda: lane.mailbox.got[1] == numbers(0, 5))


async def test_idle_cursors_come_over_to_a_stream_made_anew(lane: Lane) -> None:
    """Else its lane could not be purged before it has as many messages as the old one had."""
    for number in (0, 1):
        lane.attach(lane.own(number))
    await lane.send_many(A, 0, 10)
    await eventually(lambda: len(lane.mailbox.got[0]) == 10)
    await lane.reader.move_idle_cursors()
    await lane.js.delete_stream(stream_name(0))
    await ensure_lanes(lane.js, LAYOUT, 1000)
    place = (await lane.send_many(A, 10, 3))[-1]
    await eventually(lambda: len(lane.mailbox.got[0]) == 13, timeout_s=10)
    await lane.reader.move_idle_cursors()
    assert lane.state.partitions[1].cursor == place


async def test_purge_keeps_the_message_at_the_cursor(lane: Lane) -> None:
    partition = lane.own(0)
    lane.attach(partition)
    places = await lane.send_many(A, 0, 20)
    await eventually(lambda: len(lane.mailbox.got[0]) == 20)
    await lane.reader.purge(places[9].stream, places[9].seq)
    state = await lane.stream()
    assert (state.first_seq, state.messages) == (places[9].seq, 11)
    again = lane.own(0, places[9])  # a new owner finds the anchor
    lane.attach(again)
    await eventually(lambda: len(lane.mailbox.got[0]) >= 30)
    assert lane.mailbox.got[0] == numbers(0, 20) + numbers(10, 10)


async def test_purge_does_not_go_beyond_the_end_of_the_lane(lane: Lane) -> None:
    """The cursor counts what a restored stream does not have any more: its numbers will be given to other messages."""
    place = (await lane.send_many(A, 0, 10))[-1]
    await lane.reader.purge(place.stream, place.seq + 5)
    assert (await lane.stream()).messages == 10


async def test_a_stream_made_anew_is_not_purged_by_the_cursors_of_the_old_one(lane: Lane) -> None:
    """They stand at sequence 30, and the ten messages of the new stream are in no mailbox yet."""
    old = (await lane.send_many(A, 0, 30))[-1]
    await lane.js.delete_stream(stream_name(0))
    await ensure_lanes(lane.js, LAYOUT, 1000)
    await lane.send_many(A, 30, 10)
    await lane.reader.purge(old.stream, old.seq)
    assert (await lane.stream()).messages == 10


async def test_nothing_is_purged_before_every_partition_has_a_cursor(lane: Lane) -> None:
    places = await lane.send_many(A, 0, 3)
    await lane.reader.purge(places[0].stream, 0)
    assert (await lane.stream()).messages == 3


# ---- bounds


async def test_a_stalled_mailbox_bounds_what_is_read(nats_server: FaultyNats) -> None:
    """PostgreSQL stands still while 3000 messages wait: the router holds its bound and two pulls at most."""
    async with running_lane(nats_server, backlog=100) as lane:
        lane.mailbox.stalled = True
        for first in range(0, 3000, 500):
            await lane.send_many(A, first, 500)
        lane.attach(lane.own(0))
        await eventually(lambda: len(lane.mailbox.waiting) >= 100)
        held = await settled(lambda: len(lane.mailbox.waiting))
        assert held <= 100 + 2 * 256
        lane.mailbox.stalled = False
        lane.mailbox.commit()
        await eventually(lambda: len(lane.mailbox.got[0]) >= 3000, timeout_s=10)
        assert lane.mailbox.got[0] == numbers(0, 3000)
