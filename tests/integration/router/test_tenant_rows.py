"""Row-level security: what is written and read in the name of tenants touches the rows of no other."""

import asyncpg
import pytest

from services.router.application.group import FenceLost, GroupRejected
from services.router.application.items import ControlItem, DeadItem
from services.router.application.outcomes import AckItem
from services.router.domain.partition import Partition
from soma_common import ids
from soma_common.postgres.connect import connect
from tests.integration.router.store import Store, end, start, step
from tests.unit.router.builders import a_session, a_turn, group_of, inbound, ingest

MINE, THEIRS = "mine", "theirs"


async def filled(store: Store) -> Partition:
    """A row of each of two tenants in every table that has tenants."""
    p = await store.take(0)
    for seq, tenant in enumerate((MINE, THEIRS), 1):
        _, turn = await store.started(p, inbound(tenant=tenant), seq, tenant)
        await store.commit(end(turn), DeadItem(p, tenant, b"", 29, "", b""))
    return p


async def tenant_tables(store: Store) -> list[str]:
    """Every table of the schema that has a column `tenant`, found and not listed."""
    rows = await store.eye.fetch(
        "SELECT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid"
        " WHERE c.relnamespace = 'router'::regnamespace AND c.relkind = 'r' AND a.attname = 'tenant'"
        " AND NOT a.attisdropped ORDER BY 1"
    )
    return [row[0] for row in rows]


async def test_no_table_shows_rows_of_a_tenant_that_is_not_named(store: Store) -> None:
    await filled(store)
    tables = await tenant_tables(store)
    assert set(tables) >= {"sessions", "messages", "turns", "steps", "agent_revisions", "deliveries", "dead_letters"}
    router = await connect(store.database.dsn("router"))
    for table in tables:
        assert await store.eye.fetchval(f"SELECT count(DISTINCT tenant) FROM router.{table}") == 2, table
        for named, seen in ((MINE, {MINE}), (f"{MINE},{THEIRS}", {MINE, THEIRS}), ("", set()), ("min", set())):
            async with router.transaction():
                await router.execute("SELECT set_config('soma.tenants', $1, true)", named)
                rows = await router.fetch(f"SELECT tenant FROM router.{table}")
            assert {row[0] for row in rows} == seen, (table, named)
        # Outside of a transaction nothing is named: nothing is seen.
        assert await router.fetch(f"SELECT tenant FROM router.{table}") == [], table
    await router.close()


async def test_the_reader_of_one_tenant_never_sees_another(store: Store) -> None:
    await filled(store)
    history = store.history
    theirs = ids.session_id(THEIRS, "echo", "line", "s")
    turn = ids.turn_id(theirs, inbound(tenant=THEIRS).message_id)
    assert await history.session(THEIRS, theirs) is not None
    assert await history.session(MINE, theirs) is None
    assert await history.turn(MINE, turn) is None
    assert await history.ended_turn(MINE, turn) is None
    message = inbound(tenant=THEIRS)
    assert await history.turn_answering(THEIRS, message.message_id, message.content_hash) == turn
    assert await history.turn_answering(THEIRS, message.message_id, b"other") is None
    assert await history.turn_answering(MINE, message.message_id, message.content_hash) is None
    assert await history.steps(MINE, turn, 0, 10) == []
    assert await history.journal(MINE, turn) == []
    assert await history.messages(MINE, theirs, 0, 10) == []
    assert await history.session_turns(MINE, theirs, None, 0, 10) == []
    assert await history.context(MINE, theirs, 10) == []
    assert await history.contents(MINE, 0, [1, 2]) == {1: b"hi"}
    assert await history.deliveries(THEIRS, 0, "line", 0, 10) != []
    assert [d.position for d in await history.deliveries(MINE, 0, "line", 0, 10)] == [1]
    assert {row.tenant for row in await history.sessions(MINE, None, None, None, ("", "", ""), 10)} == {MINE}
    assert {row.tenant for row in await history.tenant_turns(MINE, None, None, 10)} == {MINE}


async def test_a_group_must_name_the_tenants_whose_rows_it_inserts(store: Store) -> None:
    p = await store.take(0)
    mail = ingest(p, 1, inbound(tenant=MINE), tenant=MINE)
    turn = a_turn(a_session(p, tenant=MINE), mail.entries[0].message)
    for items in ((mail,), (DeadItem(p, MINE, b"", 29, "", b""),), (mail, start(turn))):
        group = group_of(*items)
        group.tenants = {THEIRS}
        with pytest.raises(GroupRejected, match="row-level security"):
            await store.writer.commit(group)
    assert await store.rows("messages") == []


async def test_a_group_changes_no_row_of_a_tenant_it_does_not_name(store: Store) -> None:
    """Deletions and updates are not refused: they find nothing. An end that finds nothing is refused."""
    p = await store.take(0)
    session, turn = await store.started(p, inbound(tenant=MINE), 1, MINE)
    for item in (AckItem(p, 1, MINE), ControlItem(p, session.id, MINE, [1], lambda _: None, turn=turn)):
        group = group_of(item)
        group.tenants = {THEIRS}
        await store.writer.commit(group)
    group = group_of(end(turn))
    group.tenants = {THEIRS}
    with pytest.raises((GroupRejected, FenceLost)):
        await store.writer.commit(group)
    group = group_of(step(turn))
    group.tenants = {THEIRS}
    with pytest.raises(GroupRejected, match="row-level security"):
        await store.writer.commit(group)
    assert await store.rows("turns", "status, outcome") == [(1, 0)]
    assert await store.rows("steps") == []


async def test_two_tenants_in_one_group(store: Store) -> None:
    p = await store.take(0)
    result = await store.commit(
        ingest(p, 1, inbound(tenant=MINE), tenant=MINE), ingest(p, 2, inbound(tenant=THEIRS), tenant=THEIRS)
    )
    assert len(result.inserted) == 2
    assert len(result.sessions) == 2


async def test_the_service_may_not_rewrite_history(store: Store) -> None:
    """Mailbox, journal and dead letters are insert-only for the role that the service runs as."""
    await filled(store)
    router = await connect(store.database.dsn("router"))
    for statement in (
        "UPDATE router.messages SET content = ''",
        "DELETE FROM router.messages",
        "UPDATE router.steps SET body = ''",
        "DELETE FROM router.steps",
        "DELETE FROM router.turns",
        "DELETE FROM router.sessions",
        "UPDATE router.deliveries SET payload = ''",
        "DELETE FROM router.dead_letters",
        "ALTER TABLE router.messages DISABLE ROW LEVEL SECURITY",
        "DELETE FROM router.partitions",
        "UPDATE router.layout SET value = '64'",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await router.execute(statement)
    await router.close()


async def test_other_services_see_nothing_of_this_schema(store: Store) -> None:
    await filled(store)
    stranger = await connect(store.database.dsn("toolgw"))
    for statement in ("SELECT * FROM router.messages", "SELECT * FROM router.load_partition(0, gen_random_uuid(), 0)"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await stranger.fetch(statement)
    await stranger.close()
