"""Ingest: every message is in the mailbox once, in order, whatever it holds and however often it comes."""

import asyncio
import random
from time import monotonic

import pytest

from services.router.adapters.store_postgres import PostgresGroupWriter
from services.router.application.commit_group import GroupCommitter
from services.router.application.group import FenceLost, StoreLost
from services.router.domain.partition import Cursor
from services.router.domain.turn import Outcome
from soma_common import ids
from soma_common.failpoints import arm_failpoints
from soma_common.testing.eventually import eventually
from tests.integration.router.store import Store, end, start
from tests.stalls import Stalls
from tests.unit.router.builders import STREAM, a_session, a_turn, cancel, inbound, ingest

KEY_REUSED = 12


async def test_a_retry_is_dropped_and_the_cursor_goes_on(store: Store) -> None:
    p = await store.take(0)
    assert (await store.commit(ingest(p, 1, inbound()))).inserted == {(0, 1)}
    again = await store.commit(ingest(p, 2, inbound(), inbound(key="k2")))
    assert again.inserted == {(0, 3)}
    assert await store.partition_row(0) == (0, 3, STREAM, 2, "batch-2")
    assert [row[0] for row in await store.rows("messages", "position, content")] == [1, 3]
    assert await store.rows("sessions", "session, message_count, last_position") == [("s", 2, 3)]


async def test_a_lane_that_is_read_again_changes_nothing(store: Store) -> None:
    """The lane went back: the same messages come with lower sequences of another incarnation."""
    p = await store.take(0)
    first = [inbound(key=f"k{n}") for n in range(5)]
    await store.commit(*(ingest(p, n + 1, item) for n, item in enumerate(first)))
    before = await store.rows("messages")
    overlap = [*first[2:], inbound(key="new")]
    result = await store.commit(*(ingest(p, n + 1, item, stream="2027") for n, item in enumerate(overlap)))
    assert len(result.inserted) == 1
    assert (await store.rows("messages"))[:5] == before
    assert p.cursor == Cursor("2027", 4, "batch-4")


async def test_the_same_message_twice_in_one_group_is_one(store: Store) -> None:
    p = await store.take(0)
    result = await store.commit(ingest(p, 1, inbound(), inbound()), ingest(p, 2, inbound()))
    assert result.inserted == {(0, 1)}


async def test_a_group_whose_answer_was_lost_is_not_written_twice(store: Store) -> None:
    """The connection is cut after the call was sent: the router ends its terms, and reads the lane from the cursor
    that is in the database.
    """
    p = await store.take(0)
    arm_failpoints("router.commit_cut=raise@1")
    try:
        with pytest.raises(StoreLost):
            await store.commit(ingest(p, 1, inbound()))
    finally:
        arm_failpoints("")
    with pytest.raises(FenceLost):  # the blind retry that must not be: its beliefs are those from before
        await store.commit(ingest(p, 1, inbound()))
    p = await store.take(0)
    assert p.cursor.seq == 1
    assert (await store.commit(ingest(p, 2, inbound(), inbound(key="k2")))).inserted == {(0, 3)}
    assert len(await store.rows("messages")) == 2


async def test_a_key_with_other_content_is_marked(store: Store) -> None:
    p = await store.take(0)
    await store.commit(ingest(p, 1, inbound(content=b"one")))
    result = await store.commit(ingest(p, 2, inbound(content=b"other")))
    assert result.inserted == result.reused == {(0, 2)}
    assert await store.rows("messages", "position, fault") == [(1, 0), (2, KEY_REUSED)]
    retry = await store.commit(ingest(p, 3, inbound(content=b"other"), inbound(content=b"one")))
    assert retry.inserted == frozenset()


async def test_a_key_with_other_content_in_the_same_group_is_marked(store: Store) -> None:
    p = await store.take(0)
    result = await store.commit(ingest(p, 1, inbound(content=b"one")), ingest(p, 2, inbound(content=b"other")))
    assert result.inserted == {(0, 1), (0, 2)}
    assert result.reused == {(0, 2)}
    assert await store.rows("messages", "position, fault") == [(1, 0), (2, KEY_REUSED)]


async def test_a_key_belongs_to_its_session(store: Store) -> None:
    p = await store.take(0)
    result = await store.commit(ingest(p, 1, inbound("a", "k", b"one"), inbound("b", "k", b"other")))
    assert result.reused == frozenset()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"a\0b", b"\xff\xfe\xed\xa0\x80", bytes(range(256)) * 16, b"{\"a\": \"\\u0000\"}", b"x" * 2_000_000],
    ids=["empty", "zero", "zero inside", "no utf-8", "every byte", "json zero", "two megabytes"],
)  # fmt: skip
async def test_any_content_is_taken_as_it_is(store: Store, content: bytes) -> None:
    p = await store.take(0)
    await store.commit(ingest(p, 1, inbound(content=content)))
    assert await store.history.contents("demo", 0, [1]) == {1: content}


async def test_sessions_count_messages_and_not_cancels(store: Store) -> None:
    p = await store.take(0)
    result = await store.commit(ingest(p, 1, inbound(), cancel(), inbound(key="k2")))
    session_id = ids.session_id("demo", "echo", "line", "s")
    assert set(result.sessions) == {session_id}
    assert await store.rows("sessions", "session, message_count, last_position") == [("s", 2, 3)]


async def test_what_is_known_of_a_session_comes_with_its_first_new_message(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound(), 1)
    await store.commit(end(turn))
    facts = (await store.commit(ingest(p, 2, inbound(key="k2")))).sessions[session.id]
    assert (facts.turn_count, facts.delivery_count, facts.done_position) == (1, 1, 1)


# ---- a turn that starts in the group of its message


async def test_a_turn_starts_with_its_message(store: Store) -> None:
    p = await store.take(0)
    _, turn = await store.started(p, inbound(), 1)
    assert await store.rows("turns", "turn_id, number, first_position, last_position, status, dispatch") == [
        (turn.id, 1, 1, 1, 1, 1)
    ]
    assert await store.rows("agent_revisions", "tenant, agent, revision, spec") == [("demo", "echo", "r1", b"spec")]


async def test_no_turn_starts_for_a_retry(store: Store) -> None:
    """Of a session that is idle and in memory: the router starts the turn in the group that finds the duplicate."""
    p = await store.take(0)
    session, turn = await store.started(p, inbound(), 1)
    await store.commit(end(turn))
    session.turn_count = 1
    mail = ingest(p, 2, inbound(), inbound(key="k2"))
    second = a_turn(session, mail.entries[0].message)
    result = await store.commit(mail, start(second))
    assert result.started == frozenset()
    assert result.inserted == {(0, 3)}
    assert len(await store.rows("turns")) == 1


async def test_no_turn_starts_for_a_key_that_was_used_for_something_else(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound(content=b"one"), 1)
    await store.commit(end(turn))
    session.turn_count = 1
    mail = ingest(p, 2, inbound(content=b"other"))
    result = await store.commit(mail, start(a_turn(session, mail.entries[0].message)))
    assert result.started == frozenset()
    assert result.reused == {(0, 2)}
    assert len(await store.rows("turns")) == 1


async def test_a_start_does_not_mistake_another_partitions_position_for_its_own(store: Store) -> None:
    """Positions repeat over partitions: the retry in partition 0 and the new message in 3 both stand at 2."""
    zero, three = await store.take(0), await store.take(3)
    await store.commit(ingest(zero, 1, inbound("a")), ingest(three, 1, inbound("b")))
    retry, fresh = ingest(zero, 2, inbound("a")), ingest(three, 2, inbound("c"))
    turns = [
        a_turn(a_session(zero, "a"), retry.entries[0].message),
        a_turn(a_session(three, "c"), fresh.entries[0].message),
    ]
    result = await store.commit(retry, fresh, *map(start, turns))
    assert result.started == {turns[1].id}


async def test_a_message_with_a_fault_ends_as_a_turn_without_a_brain(store: Store) -> None:
    p = await store.take(0)
    mail = ingest(p, 1, inbound())
    mail.entries[0].message.fault = 28
    await store.commit(mail)
    session = a_session(p)
    refusal = end(a_turn(session, mail.entries[0].message, ""), Outcome.ERROR)
    refusal.is_new = True
    await store.commit(refusal)
    assert await store.rows("turns", "number, status, outcome") == [(1, 3, 2)]
    assert len(await store.rows("deliveries")) == 1


async def test_many_groups_at_once_on_many_partitions_keep_each_mailbox_dense(store: Store) -> None:
    writers = [PostgresGroupWriter(store.database.dsn("router"), f"writer-{n}") for n in range(3)]
    partitions = [await store.take(number) for number in range(3)]

    async def fill(number: int) -> None:
        for seq in range(1, 16):
            items = [inbound(f"s{number}-{n}", f"k{seq}") for n in range(4)]
            await store.commit(ingest(partitions[number], seq, *items), writer=writers[number])

    await asyncio.gather(*map(fill, range(3)))
    places = [row[:2] for row in await store.rows("messages", "partition, position")]
    assert places == [(number, position) for number in range(3) for position in range(1, 61)]
    for writer in writers:
        await writer.close()


async def test_the_group_after_an_outage_is_written_in_time(store: Store) -> None:
    """What gathered while PostgreSQL was away comes in groups of thousands: if their cost were not linear, the call
    would run into its timeout, the terms would end, and the same group would come again.
    """
    p = await store.take(0)
    group = ingest(p, 1, *(inbound(f"s{n}") for n in range(8000)))
    async with Stalls() as stalls:
        began = monotonic()
        result = await store.commit(group)
        took_s = monotonic() - began
        assert took_s < 5.0 + stalls.since(began)
    assert len(result.inserted) == len(result.sessions) == 8000


async def test_one_item_of_64_that_the_database_refuses_is_a_dead_letter_and_63_are_written(store: Store) -> None:
    """Past every check of the router: a hash that no index takes. Written by the real committer, which finds it."""
    p = await store.take(0)
    items = [inbound(f"s{n}") for n in range(64)]
    items[17].content_hash = random.Random(1).randbytes(20_000)
    fenced: list[frozenset[int]] = []
    committer = GroupCommitter(store.writer, lambda _: None, fenced.append, lambda: None)
    committer.put(ingest(p, 7, *items))
    committing = asyncio.create_task(committer.run())
    await eventually(lambda: p.cursor.seq == 7)
    committing.cancel()
    await asyncio.gather(committing, return_exceptions=True)
    assert len(await store.rows("messages", "partition, position")) == 63
    [(ref, payload)] = await store.rows("dead_letters", "ref, payload")
    assert (ref, payload) == (items[17].message_id, items[17].SerializeToString())
    assert fenced == []
