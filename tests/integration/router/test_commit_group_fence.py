"""The fence: a group is written by the owner of all its partitions at the places it believes in, or not at all."""

import asyncio
from uuid import uuid4

import pytest

from services.router.adapters.store_postgres import PostgresGroupWriter
from services.router.application.group import FenceLost
from services.router.domain.partition import Cursor, Partition
from tests.integration.router.store import Store
from tests.unit.router.builders import STREAM, inbound, ingest, names_in

WRITTEN = ("messages", "sessions", "turns", "steps", "deliveries", "dead_letters")


async def assert_nothing_is_written(store: Store) -> None:
    for table in WRITTEN:
        assert await store.rows(table) == [], table


async def test_a_group_moves_the_rows_of_its_partitions(store: Store) -> None:
    zero, three = await store.take(0), await store.take(3)
    a, b = names_in(0, 1)[0], names_in(3, 1)[0]
    result = await store.commit(ingest(three, 7, inbound(b)), ingest(zero, 7, inbound(a), inbound(a, "k2")))
    assert result.inserted == {(0, 1), (0, 2), (3, 1)}
    assert await store.partition_row(0) == (0, 2, STREAM, 7, "batch-7")
    assert await store.partition_row(3) == (0, 1, STREAM, 7, "batch-7")
    assert zero.mail_head == 2
    assert three.cursor == Cursor(STREAM, 7, "batch-7")


@pytest.mark.parametrize("stale", ["term", "head", "mail_head", "cursor"])
async def test_a_stale_belief_writes_nothing_and_names_the_partition(store: Store, stale: str) -> None:
    good, bad = await store.take(0), await store.take(3)
    match stale:
        case "term":
            bad.term = uuid4()
        case "head":
            bad.head = 5
        case "mail_head":
            bad.mail_head = 5
        case "cursor":
            bad.cursor = Cursor(STREAM, 5, "batch-5")
    with pytest.raises(FenceLost) as lost:
        await store.commit(ingest(good, 1, inbound("a")), ingest(bad, 6, inbound("b")))
    assert lost.value.partitions == {3}
    await assert_nothing_is_written(store)
    assert await store.partition_row(0) == (0, 0, "", 0, "")
    assert (await store.commit(ingest(good, 1, inbound("a")))).inserted == {(0, 1)}  # the connection is fine


async def test_all_lost_partitions_are_named(store: Store) -> None:
    partitions = [await store.take(number) for number in range(4)]
    for lost in partitions[1:3]:
        lost.term = uuid4()
    with pytest.raises(FenceLost) as caught:
        await store.commit(*(ingest(p, 1, inbound(f"s{p.id}")) for p in partitions))
    assert caught.value.partitions == {1, 2}


async def test_an_owner_that_was_robbed_writes_nothing_any_more(store: Store) -> None:
    former = await store.take(2)
    await store.commit(ingest(former, 1, inbound("a")))
    await store.eye.execute("UPDATE router.leases SET expires_at = clock_timestamp() - interval '1 s'")
    owner = await store.take(2, "router-1", seen=former.term)
    assert (owner.mail_head, owner.cursor.seq) == (1, 1)
    with pytest.raises(FenceLost):
        await store.commit(ingest(former, 2, inbound("a", "k2")))
    assert (await store.commit(ingest(owner, 2, inbound("a", "k2")))).inserted == {(2, 2)}


async def test_of_two_writers_with_one_belief_exactly_one_wins(store: Store) -> None:
    """Both believe they own the partition under one term (a bug, or a database that went back): the row decides."""
    other = PostgresGroupWriter(store.database.dsn("router"), "router-0")
    mine = await store.take(1)
    for round_ in range(1, 11):
        twin = Partition(mine.id, mine.term, mine.epoch, mine.head, mine.mail_head, mine.cursor, mine.read_seq)
        results = await asyncio.gather(
            store.commit(ingest(mine, round_, inbound("a", f"mine {round_}"))),
            store.commit(ingest(twin, round_, inbound("a", f"twin {round_}")), writer=other),
            return_exceptions=True,
        )
        assert sorted(isinstance(result, FenceLost) for result in results) == [False, True], results
        if isinstance(results[0], FenceLost):
            mine.mail_head, mine.cursor = twin.mail_head, twin.cursor
    assert [row[:2] for row in await store.rows("messages", "partition, position")] == [(1, n) for n in range(1, 11)]
    await other.close()


async def test_groups_over_the_same_partitions_wait_for_each_other_and_never_deadlock(store: Store) -> None:
    """Partitions are moved in order of id, whatever order the items came in; here one side holds 0 and 1, the other 1
    and 0.
    """
    other = PostgresGroupWriter(store.database.dsn("router"), "router-0")
    zero, one = await store.take(0), await store.take(1)
    for round_ in range(1, 21):
        twins = [Partition(p.id, p.term, p.epoch, p.head, p.mail_head, p.cursor, p.read_seq) for p in (one, zero)]
        results = await asyncio.gather(
            store.commit(
                ingest(zero, round_, inbound("a", f"m{round_}")), ingest(one, round_, inbound("b", f"m{round_}"))
            ),
            store.commit(*(ingest(p, round_, inbound("c", f"t{round_}-{p.id}")) for p in twins), writer=other),
            return_exceptions=True,
        )
        lost = [result for result in results if isinstance(result, BaseException)]
        assert len(lost) == 1
        assert isinstance(lost[0], FenceLost), lost
        for p, twin in ((one, twins[0]), (zero, twins[1])):
            p.mail_head, p.cursor = max(p.mail_head, twin.mail_head), Cursor(STREAM, round_, f"batch-{round_}")
    await other.close()
