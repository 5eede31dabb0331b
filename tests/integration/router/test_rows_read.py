"""What a group reads: the rows it is about, however small the tables were when its statements were planned.

Statements are planned once per connection and again after the tables were analyzed, and then the tables may be nearly
empty: whatever is as good there, such as reading an index from end to end, costs every group dearly an hour later.
"""

from __future__ import annotations

import pytest

from services.router.adapters.store_postgres import PostgresGroupWriter
from services.router.application.items import ControlItem, DispatchItem, InputItem
from services.router.application.outcomes import AckItem
from services.router.domain.partition import Partition
from services.router.domain.session import Turn
from soma_common.testing.eventually import eventually
from tests.integration.router.store import Store, end, start, step
from tests.unit.router.builders import TENANT, a_session, a_turn, inbound, ingest

MANY = 1500
GROUP = 20
MOST_ENTRIES = 10
"""Of an index, for each session: a turn is found for its input, dispatch, stop, step and end, with some of its older
versions. To read the index from end to end once is seven times as much.
"""
MOST_PAGES = 20
"""Of an index, for each session: two levels for each search."""
TABLES = ("sessions", "messages", "turns", "steps", "deliveries")


class Life:
    """Sessions of one partition that live from their message to its acknowledgement, in step."""

    def __init__(self, store: Store, partition: Partition, writer: PostgresGroupWriter) -> None:
        self.store, self.partition, self.writer = store, partition, writer
        self.groups = 0

    async def begin(self, names: list[str]) -> list[Turn]:
        """Their messages come and their turns start."""
        self.groups += 1
        mail = ingest(self.partition, self.groups, *(inbound(name) for name in names))
        turns = [a_turn(a_session(self.partition, entry.inbound.session), entry.message) for entry in mail.entries]
        await self.store.commit(mail, *map(start, turns), writer=self.writer)
        return turns

    async def go_on(self, turns: list[Turn]) -> None:
        """Messages come again, turns take an input, are dispatched again and stopped, a step is journaled."""
        self.groups += 1
        again = ingest(self.partition, self.groups, *(inbound(turn.session.key.session) for turn in turns))
        dispatches = [DispatchItem(self.partition, turn, lambda _: None, turn.dispatch) for turn in turns]
        inputs = [InputItem(self.partition, turn, turn.inputs[0].position + 1, lambda _: None) for turn in turns]
        stops = [ControlItem(self.partition, turn.session.id, TENANT, [], lambda _: None, turn) for turn in turns]
        await self.store.commit(again, *dispatches, *inputs, *stops, *map(step, turns), writer=self.writer)
        for turn in turns:
            turn.journal.append(b"body")

    async def finish(self, turns: list[Turn]) -> list[int]:
        """The turns end; positions of their deliveries."""
        before = self.partition.head
        await self.store.commit(*map(end, turns), writer=self.writer)
        return list(range(before + 1, self.partition.head + 1))

    async def acknowledge(self, positions: list[int]) -> None:
        """The deliveries have arrived."""
        items = [AckItem(self.partition, position, TENANT) for position in positions]
        await self.store.commit(*items, writer=self.writer)


async def indexes_read(store: Store) -> dict[str, tuple[int, int, int]]:
    """Entries and pages of each index that were read so far, and rows that entries led to, by connections that have
    ended. The rows of a bitmap are not counted.
    """
    await store.eye.execute("SELECT pg_stat_clear_snapshot()")
    rows = await store.eye.fetch(
        "SELECT indexrelname, idx_tup_read, idx_blks_hit + idx_blks_read, idx_tup_fetch"
        " FROM pg_stat_user_indexes JOIN pg_statio_user_indexes USING (indexrelid, indexrelname)"
        " WHERE pg_stat_user_indexes.schemaname = 'router' AND pg_stat_user_indexes.relname = ANY ($1)",
        TABLES,
    )
    return {name: (int(entries), int(pages), int(found)) for name, entries, pages, found in rows}


async def gone(store: Store, writer: str) -> bool:
    """Whether a writer's connection has ended: then, and not always before, the statistics hold all that it did."""
    told: bool = await store.eye.fetchval(
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1)", f"{writer} writer"
    )
    return told


@pytest.mark.parametrize("emptied", [False, True], ids=["", "deliveries gone"])
@pytest.mark.parametrize("known", [0, 8, 120, 2400], ids=lambda known: f"{known} turns when planned")
async def test_a_group_looks_up_the_rows_it_is_about(store: Store, known: int, emptied: bool) -> None:
    for table in TABLES:  # or autoanalyze makes plans good again, some time later
        await store.eye.execute(f"ALTER TABLE router.{table} SET (autovacuum_enabled = off)")
    p = await store.take(0)
    crowd = PostgresGroupWriter(store.database.dsn("router"), "crowd")
    life = Life(store, p, crowd)
    if known:
        positions = await life.finish(await life.begin([f"known-{n}" for n in range(known)]))
        if emptied:
            await life.acknowledge(positions)
        for table in TABLES:
            await store.eye.execute(f"VACUUM (ANALYZE) router.{table}")

    life.writer = store.writer  # plans its statements now
    turns = await life.begin(["planner"])
    await life.go_on(turns)
    await life.acknowledge(await life.finish(turns))

    life.writer = crowd
    for first in range(0, MANY, 100):
        await life.finish(await life.begin([f"crowd-{n}" for n in range(first, first + 100)]))
    await crowd.close()
    await eventually(lambda: gone(store, "crowd"))
    before = await indexes_read(store)

    life.writer = store.writer
    turns = await life.begin([f"measured-{n}" for n in range(GROUP)])
    await life.go_on(turns)
    await life.acknowledge(await life.finish(turns))
    await store.writer.close()
    await eventually(lambda: gone(store, "router-0"))
    after = await indexes_read(store)
    entries = {name: after[name][0] - before[name][0] for name in after}
    pages = {name: after[name][1] - before[name][1] for name in after}
    found = {name: after[name][2] - before[name][2] for name in after}
    assert pages["turns_pkey"] >= 10 * GROUP, "the statistics are of this group"
    assert {name: count for name, count in entries.items() if count > MOST_ENTRIES * GROUP} == {}
    assert {name: count for name, count in pages.items() if count > MOST_PAGES * GROUP} == {}
    assert {name for name, count in entries.items() if count and not found[name]} == set(), "no bitmap of a few rows"


async def test_an_ack_is_looked_up_by_its_place_also_in_a_table_that_was_emptied(store: Store) -> None:
    """An index of a table that was large is no larger than another's when the table is empty: all plans cost the same
    then, and the next that is taken may look through every channel.
    """
    await store.eye.execute("ALTER TABLE router.deliveries SET (autovacuum_enabled = off)")
    p = await store.take(0)
    crowd = PostgresGroupWriter(store.database.dsn("router"), "crowd")
    life = Life(store, p, crowd)
    for first in range(0, 2 * MANY, 100):
        await life.acknowledge(await life.finish(await life.begin([f"old-{n}" for n in range(first, first + 100)])))
    await store.eye.execute("VACUUM (ANALYZE) router.deliveries")
    await crowd.close()
    await eventually(lambda: gone(store, "crowd"))

    life.writer = store.writer
    positions = await life.finish(await life.begin([f"new-{n}" for n in range(GROUP)]))
    before = await scans(store)
    await life.acknowledge(positions)
    await store.writer.close()
    await eventually(lambda: gone(store, "router-0"))
    after = await scans(store)
    assert {name: after[name] - before[name] for name in after if after[name] > before[name]} == {
        "deliveries_pkey": GROUP
    }


async def test_a_tenants_turns_are_listed_by_their_index(store: Store) -> None:
    life = Life(store, await store.take(0), store.writer)
    for first in range(0, MANY, 100):
        await life.finish(await life.begin([f"listed-{n}" for n in range(first, first + 100)]))
    await store.eye.execute("VACUUM (ANALYZE) router.turns")
    assert len(await store.history.tenant_turns(TENANT, None, None, 10)) == 10
    await store.history.close()  # sends what it counted

    async def is_told() -> bool:
        return (await indexes_read(store))["turns_of_tenant"][0] == 10

    await eventually(is_told)


async def test_the_planner_knows_little_of_what_grows(store: Store) -> None:
    """The largest number of any column decides how many rows autoanalyze reads."""
    columns = await store.eye.fetch(
        "SELECT attrelid::regclass::text || '.' || attname, attstattarget FROM pg_attribute"
        " WHERE attrelid = ANY (SELECT ('router.' || name)::regclass FROM unnest($1::text[]) AS name)"
        " AND attnum > 0 AND NOT attisdropped",
        TABLES,
    )
    assert len(columns) > 40
    assert [name for name, target in columns if target != 10] == []


async def test_a_channel_is_read_without_the_deliveries_of_others(store: Store) -> None:
    life = Life(store, await store.take(0), store.writer)
    for first in range(0, MANY, 100):
        await life.finish(await life.begin([f"waiting-{n}" for n in range(first, first + 100)]))
    await store.eye.execute("VACUUM (ANALYZE) router.deliveries")
    assert await store.history.deliveries(TENANT, 0, "another-channel", 0, 10) == []
    await store.history.close()  # sends what it counted

    async def is_told() -> bool:
        return (await scans(store))["deliveries_waiting"] == 1

    await eventually(is_told)


async def scans(store: Store) -> dict[str, int]:
    """Searches in each index of the deliveries."""
    await store.eye.execute("SELECT pg_stat_clear_snapshot()")
    rows = await store.eye.fetch(
        "SELECT indexrelname, idx_scan FROM pg_stat_user_indexes WHERE schemaname = 'router' AND relname = 'deliveries'"
    )
    return {name: int(count) for name, count in rows}
