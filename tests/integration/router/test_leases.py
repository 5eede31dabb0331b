"""Who may hold a partition, and what a new owner gets to know."""

import asyncio
from contextlib import suppress
from datetime import timedelta
from functools import partial
from uuid import UUID, uuid4

import pytest
from soma.common.v1.turn_pb2 import Delivery

from services.router.adapters.store_postgres import PostgresLeases
from services.router.application.group import FenceLost, StoreLost
from services.router.application.items import ControlItem
from services.router.application.outcomes import AckItem, EndItem
from services.router.application.ports import LeaseRow
from services.router.domain.partition import Partition
from services.router.domain.turn import Outcome
from soma_common.ids import IDS_ANYWHERE
from soma_common.layout import LaneLayout
from soma_common.postgres.connect import connect
from soma_common.testing.eventually import eventually
from tests.integration.router.store import LAYOUT, Store, end, step
from tests.unit.router.builders import cancel, inbound, ingest


async def expire(store: Store, number: int) -> None:
    await store.eye.execute(
        "UPDATE router.leases SET expires_at = clock_timestamp() - interval '1 s' WHERE partition = $1", number
    )


async def lease_of(store: Store, number: int) -> LeaseRow:
    leases, _ = await store.leases.leases()
    return leases[number]


async def acquire(store: Store, router: str, number: int, seen: UUID | None) -> UUID | None:
    leases = PostgresLeases(store.database.dsn("router"), router)
    term = uuid4()
    row = await leases.acquire(number, term, seen)
    await leases.close()
    return term if row is not None else None


async def test_a_free_partition_is_anybodys(store: Store) -> None:
    p = await store.take(4, "router-1")
    assert (p.epoch, p.head, p.mail_head, p.cursor.seq) == (1, 0, 0, 0)
    lease = await lease_of(store, 4)
    assert (lease.owner, lease.term, lease.expired) == ("router-1", p.term, False)


async def test_a_held_partition_is_nobody_elses(store: Store) -> None:
    p = await store.take(4, "router-1")
    assert await acquire(store, "router-2", 4, p.term) is None
    assert (await lease_of(store, 4)).owner == "router-1"


async def test_a_lease_that_ran_out_is_taken_by_whoever_has_seen_its_term(store: Store) -> None:
    p = await store.take(4, "router-1")
    await expire(store, 4)
    assert await acquire(store, "router-2", 4, uuid4()) is None, "it saw another term"
    assert await acquire(store, "router-2", 4, None) is None, "it saw none"
    assert await acquire(store, "router-2", 4, p.term) is not None


async def test_of_two_that_saw_the_lease_run_out_one_gets_it(store: Store) -> None:
    p = await store.take(4, "router-1")
    await expire(store, 4)
    got = await asyncio.gather(*(acquire(store, f"router-{n}", 4, p.term) for n in range(2, 6)))
    assert len([term for term in got if term is not None]) == 1


async def test_a_router_takes_its_own_partition_again_at_once(store: Store) -> None:
    """It was killed and is back under the same name; or it gave its terms up when the database was away."""
    first = await store.take(4, "router-1")
    again = await store.take(4, "router-1")
    assert again.term != first.term
    assert again.epoch == 2


async def test_a_released_partition_is_free_and_had_no_former_owner(store: Store) -> None:
    p = await store.take(4)
    await store.leases.release([p.term])
    other = PostgresLeases(store.database.dsn("router"), "router-1")
    row = await other.acquire(4, uuid4(), None)
    await other.close()
    assert row is not None
    assert row.former is None


async def test_a_take_over_names_the_former_owner(store: Store) -> None:
    p = await store.take(4, "router-1")
    await expire(store, 4)
    row = await store.leases.acquire(4, uuid4(), p.term)
    assert row is not None
    assert row.former == "router-1"


async def test_a_beat_renews_what_is_held_and_says_what_is_not(store: Store) -> None:
    mine, robbed = await store.take(1), await store.take(2)
    await expire(store, 1)
    await expire(store, 2)
    await store.take(2, "router-1", seen=robbed.term)
    assert await store.leases.beat([mine.term, robbed.term]) == {1}
    lease = await lease_of(store, 1)
    assert (lease.owner, lease.expired) == ("router-0", False), "ran out, but nobody had taken it"


async def test_a_beat_is_not_for_the_leases_of_others(store: Store) -> None:
    other = await store.take(1, "router-1")
    assert await store.leases.beat([other.term]) == frozenset()


async def test_routers_that_live_are_counted(store: Store) -> None:
    await store.leases.beat([])
    other = PostgresLeases(store.database.dsn("router"), "router-1")
    await other.beat([])
    assert (await store.leases.leases())[1] == {"router-0", "router-1"}
    await other.leave([])
    await other.close()
    assert (await store.leases.leases())[1] == {"router-0"}
    await store.eye.execute("UPDATE router.routers SET beat_at = beat_at - $1::interval", timedelta(seconds=4))
    assert (await store.leases.leases())[1] == frozenset()


async def test_who_lets_leases_go_tells_the_others(store: Store) -> None:
    """Once for all of them, after they are free; and again on the next connection, when the first was lost."""
    one, two = await store.take(1, "router-1"), await store.take(2, "router-1")
    leaving = PostgresLeases(store.database.dsn("router"), "router-1")
    await leaving.beat([one.term, two.term])
    told: list[str | None] = []
    store.leases.on_freed = lambda: told.append("freed")
    await store.leases.leases()
    await leaving.release([uuid4()])
    await leaving.release([one.term])
    await eventually(lambda: told == ["freed"])
    assert [(await lease_of(store, n)).owner for n in (1, 2)] == [None, "router-1"]
    await store.eye.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'router-0 leases'"
    )
    with suppress(StoreLost):
        await store.leases.leases()
    assert "router-1" in (await store.leases.leases())[1]
    await leaving.leave([two.term])
    await leaving.close()
    await eventually(lambda: told == ["freed"] * 2)
    leases, routers = await store.leases.leases()
    assert "router-1" not in routers
    assert leases[2].owner is None


async def test_a_heartbeat_does_not_wait_for_a_commit(store: Store) -> None:
    """The commit holds the partition's row; the lease is another row."""
    p = await store.take(1)
    holder = await connect(store.database.dsn("router"))
    async with holder.transaction():
        await holder.execute("UPDATE router.partitions SET head = head WHERE id = 1")
        async with asyncio.timeout(5):
            assert await store.leases.beat([p.term]) == {1}
    await holder.close()


async def test_a_take_over_gives_up_waiting_for_a_lock_after_two_seconds(store: Store) -> None:
    holder = await connect(store.database.superuser_dsn)
    async with holder.transaction():
        await holder.execute("UPDATE router.partitions SET head = head WHERE id = 1")
        async with asyncio.timeout(10):
            assert await store.leases.acquire(1, uuid4(), None) is None
    await holder.close()
    assert (await lease_of(store, 1)).owner is None, "a try that failed leaves nothing behind"
    assert await store.leases.acquire(1, uuid4(), None) is not None


async def test_a_beat_that_waits_too_long_for_a_lock_says_that_the_store_is_lost(store: Store) -> None:
    """Two routers that take over wait for each other behind the lease's row, and the owner's beat behind them."""
    p = await store.take(1)
    holder = await connect(store.database.superuser_dsn)
    async with holder.transaction():
        await holder.execute("SELECT FROM router.leases WHERE partition = 1 FOR UPDATE")
        with pytest.raises(StoreLost):
            await store.leases.beat([p.term])
    await holder.close()
    assert await store.leases.beat([p.term]) == {1}


async def test_a_cut_connection_is_a_lost_store_once_and_then_there_is_another(store: Store) -> None:
    p = await store.take(1)
    await store.leases.beat([p.term])
    await store.commit(ingest(p, 1, inbound()))
    await store.eye.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ~ '^router-0 '"
    )
    with pytest.raises(StoreLost):
        await store.leases.beat([p.term])
    with pytest.raises(StoreLost):
        await store.commit(ingest(p, 2, inbound(key="k2")))
    assert await store.leases.beat([p.term]) == {1}
    assert (await store.commit(ingest(p, 2, inbound(key="k2")))).inserted == {(1, 2)}


# ---- the layout


async def test_the_layout_is_that_of_the_first_router(store: Store) -> None:
    assert await store.leases.ensure_layout(LaneLayout(64, 1)) == LAYOUT.metadata()
    assert len(await store.rows("partitions", "id, owner")) == LAYOUT.partitions, "no row of the other layout"


async def test_a_database_keeps_the_form_of_its_ids(store: Store) -> None:
    """Release 0.1 made it: what it kept is not added to, and this release takes its form over."""
    await store.eye.execute("DELETE FROM router.layout")
    await store.eye.execute("DELETE FROM router.leases WHERE partition = 3")
    older = LaneLayout(LAYOUT.partitions, LAYOUT.lanes, IDS_ANYWHERE)
    assert await store.leases.ensure_layout(older) == older.metadata()
    stored = await store.leases.ensure_layout(LAYOUT)
    assert LAYOUT.kept_as(stored) == older
    rows = await store.eye.fetch("SELECT FROM router.leases")
    assert len(rows) == LAYOUT.partitions, "one that fits gets a row per partition"


async def test_of_two_layouts_stored_at_once_one_is_kept_whole(store: Store) -> None:
    older = LaneLayout(LAYOUT.partitions, LAYOUT.lanes, IDS_ANYWHERE)
    await store.eye.execute("DELETE FROM router.layout")
    async with store.eye.transaction():
        await store.eye.executemany("INSERT INTO router.layout VALUES ($1, $2)", list(older.metadata().items()))
        storing = asyncio.create_task(store.leases.ensure_layout(LAYOUT))
        await eventually(lambda: store.eye.fetch("SELECT pid FROM pg_locks WHERE NOT granted"))
    assert await storing == older.metadata()


# ---- what a new owner loads


async def test_a_new_owner_gets_everything_that_has_no_outcome_in_order(store: Store) -> None:
    p = await store.take(0)
    _, done = await store.started(p, inbound("done"), 1)
    await store.commit(end(done))
    _, running = await store.started(p, inbound("runs"), 2)
    await store.commit(step(running), ingest(p, 3, inbound("runs", "k2"), inbound("waits")))
    await store.commit(ingest(p, 4, cancel("runs", target=running.id)))
    await expire(store, 0)
    new = await store.take(0, "router-1", seen=p.term)
    rows = await store.load(new)
    assert [(row.session, row.position, row.kind) for row in rows] == [
        ("runs", 2, 1),
        ("runs", 3, 1),
        ("waits", 4, 1),
        ("runs", 5, 2),
    ]
    first = rows[0]
    assert (first.turn_id, first.status, first.first_position, first.last_position) == (running.id, 1, 2, 2)
    assert rows[3].target_turn == running.id
    assert (rows[2].turn_id, rows[2].turn_count) == (None, 0)


async def test_taking_over_raises_the_dispatch_of_running_turns_only(store: Store) -> None:
    p = await store.take(0)
    _, ended = await store.started(p, inbound("a"), 1)
    await store.commit(end(ended))
    await store.started(p, inbound("b"), 2)
    await store.load(await store.take(0), strike=False)
    await store.load(await store.take(0), strike=True)
    turns = {row[0]: row[1:] for row in await store.rows("turns", "turn_id, dispatch, strikes")}
    assert turns.pop(ended.id) == (1, 0)
    assert list(turns.values()) == [(3, 1)]


async def test_loading_ends_when_the_term_is_not_current(store: Store) -> None:
    former = await store.take(0)
    await store.take(0)
    with pytest.raises(FenceLost) as lost:
        await store.load(former)
    assert lost.value.partitions == {0}


async def test_the_floor_spares_a_new_owner_the_history(store: Store) -> None:
    """It follows the oldest message without an outcome; what is above it is never left out."""
    p = await store.take(0)
    for n in range(1, 6):
        _, turn = await store.started(p, inbound(f"s{n}"), n)
        if n != 3:
            await store.commit(end(turn))
    await store.commit(ingest(p, 6, inbound("last")))
    assert await store.eye.fetchval("SELECT mail_floor FROM router.partitions WHERE id = 0") == 3
    rows = await store.load(await store.take(0))
    assert [row.session for row in rows] == ["s3", "last"]


async def test_an_applied_cancel_is_not_loaded_again(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound(), 1)
    await store.commit(ingest(p, 2, cancel()))
    await store.commit(ControlItem(p, session.id, "demo", [2], lambda _: None, turn=turn))
    [row] = await store.load(await store.take(0))
    assert (row.kind, row.status) == (1, 2), "the turn is converging, durably"


async def test_what_waits_for_delivery_is_known_by_channel(store: Store) -> None:
    p = await store.take(0)
    ends = []
    for n, tenant in enumerate(("demo", "other"), 1):
        _, turn = await store.started(p, inbound(tenant=tenant), n, tenant)
        ends.append(end(turn))
        await store.commit(ends[-1])
    assert sorted(await store.leases.undelivered_channels(0)) == [("demo", "line"), ("other", "line")]
    await store.commit(AckItem(p, ends[0].position, "demo"))
    assert await store.leases.undelivered_channels(0) == [("other", "line")]
    assert await store.leases.undelivered_channels(1) == []


async def test_loading_gives_keys_and_no_content(store: Store) -> None:
    p = await store.take(0)
    await store.commit(ingest(p, 1, inbound(content=b"a secret")))
    rows = await store.eye.fetch("SELECT * FROM router.load_partition(0, $1, 0)", p.term)
    assert "content" not in rows[0]
    assert b"a secret" not in rows[0].values()


async def test_a_new_owner_sees_all_that_the_former_one_committed(store: Store) -> None:
    """A race, many times: the former owner writes as fast as it can until it is fenced off. What it was told is
    written, the new owner loads.
    """
    for round_ in range(12):
        former = await store.take(5, "router-1")
        written: list[str] = []
        writing = asyncio.create_task(write_until_fenced(store, former, f"r{round_}", written))
        await eventually(partial(has, written, round_ + 1), interval_s=0.001)
        await expire(store, 5)
        new = await store.take(5, "router-2", seen=former.term)
        loaded = {row.session for row in await store.load(new)}
        await writing
        assert set(written) <= loaded
        assert new.mail_head == len(await store.rows("messages", "partition, position"))
        await store.eye.execute("UPDATE router.leases SET owner = NULL WHERE partition = 5")


async def write_until_fenced(store: Store, partition: Partition, prefix: str, written: list[str]) -> None:
    with suppress(FenceLost):
        while True:
            name = f"{prefix}-{len(written)}"
            await store.commit(ingest(partition, partition.cursor.seq + 1, inbound(name)))
            written.append(name)


def has(items: list[str], count: int) -> bool:
    return len(items) >= count


async def test_a_turn_cancelled_before_it_began_is_not_loaded_again(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound(), 1)
    await store.commit(EndItem(p, turn, Outcome.CANCELLED, [], Delivery(), lambda _: None))
    assert await store.load(await store.take(0)) == []
    assert session.turn is turn
