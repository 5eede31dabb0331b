"""What is cleared away, and what stays."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from services.toolgw.adapters import store_postgres
from services.toolgw.adapters.store_postgres import PostgresToolStore
from services.toolgw.adapters.tools_builtin import RecallNotes
from services.toolgw.domain.invocation import Call, Runner
from soma_common.errors import Unavailable
from soma_common.postgres.connect import create_pool
from tests.integration.toolgw.conftest import Gateway, Surroundings, result_of


async def test_only_what_ended_long_ago_goes(gateway: Gateway, surroundings: Surroundings) -> None:
    for key in ("old", "new", "running"):
        await gateway.invoke("remember_note", key, {"note": key})
    connection = await asyncpg.connect(surroundings.database.superuser_dsn)
    await connection.execute("UPDATE toolgw.invocations SET end_time = end_time - interval '49 h' WHERE key = 'old'")
    await connection.execute(
        "UPDATE toolgw.invocations SET state = 'running', end_time = NULL, create_time = create_time - interval '99 h'"
        " WHERE key = 'running'"
    )
    await connection.execute(
        "INSERT INTO toolgw.runners VALUES (gen_random_uuid(), 'toolgw-9', clock_timestamp() - interval '2 h')"
    )
    await connection.execute(
        "INSERT INTO toolgw.reversals (tenant, session_id, turn_id, state, effects, kept, create_time)"
        " SELECT 'demo', '', turn, state, '{}', '{}', clock_timestamp() - age"
        " FROM (VALUES ('old', 'reverted', interval '49 h'), ('new', 'reverted', interval '47 h'),"
        "              ('under way', 'undoing', interval '49 h')) AS given (turn, state, age)"
    )
    pool = await create_pool(surroundings.database.dsn("toolgw"))
    await PostgresToolStore(pool, "toolgw-8").forget()
    await pool.close()
    assert {row["key"] for row in await connection.fetch("SELECT key FROM toolgw.invocations")} == {"new", "running"}
    assert [row["instance"] for row in await connection.fetch("SELECT instance FROM toolgw.runners")] == ["toolgw-0"]
    turns = {row["turn_id"] for row in await connection.fetch("SELECT turn_id FROM toolgw.reversals")}
    assert turns == {"new", "under way"}
    await connection.close()
    notes = result_of(await gateway.invoke("recall_notes", "recall"))["notes"]
    assert set(notes) == {"old", "new", "running"}


async def test_a_backlog_goes_in_batches(
    gateway: Gateway, surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch removed stays removed when a later one takes too long; the next clearing goes on there."""
    connection = await asyncpg.connect(surroundings.database.superuser_dsn)
    await connection.execute(
        "INSERT INTO toolgw.invocations"
        " (tenant, key, session_id, tool, effect, state, attempt, turn_id, step, end_time)"
        " SELECT 'demo', 'k' || n, '', '', 'none', 'cancelled', 0, '', 0, clock_timestamp() - interval '49 h'"
        " FROM generate_series(1, 250) AS n"
    )
    monkeypatch.setattr(store_postgres, "FORGET_BATCH", 100)
    await connection.execute(
        "CREATE TABLE toolgw.gone (key text);"
        " CREATE FUNCTION toolgw.note_gone() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS"
        " $$ BEGIN INSERT INTO toolgw.gone VALUES (OLD.key);"
        " IF (SELECT count(*) FROM toolgw.gone) = 150 THEN RAISE query_canceled; END IF; RETURN OLD; END $$;"
        " CREATE TRIGGER gone BEFORE DELETE ON toolgw.invocations FOR EACH ROW EXECUTE FUNCTION toolgw.note_gone()"
    )
    pool = await create_pool(surroundings.database.dsn("toolgw"))
    store = PostgresToolStore(pool, "toolgw-8")
    with pytest.raises(Unavailable):
        await store.forget()
    assert await connection.fetchval("SELECT count(*) FROM toolgw.invocations") == 150
    await connection.execute("DROP TRIGGER gone ON toolgw.invocations")
    monkeypatch.setattr(store_postgres, "FORGET_FOR_S", 0.0)
    await store.forget()
    assert await connection.fetchval("SELECT count(*) FROM toolgw.invocations") == 150, "its time was over"
    monkeypatch.setattr(store_postgres, "FORGET_FOR_S", 60.0)
    async with connection.transaction():  # Another instance is about to remove one.
        await connection.fetch("SELECT FROM toolgw.invocations LIMIT 1 FOR UPDATE")
        await store.forget()
    assert await connection.fetchval("SELECT count(*) FROM toolgw.invocations") == 1
    await pool.close()
    await connection.close()


async def test_transactions_that_hold_their_connections_leave_one_to_the_lease(
    gateway: Gateway, surroundings: Surroundings
) -> None:
    await gateway.invoke("remember_note", "k1", {"note": "n"})
    connection = await asyncpg.connect(surroundings.database.superuser_dsn)
    pool = await create_pool(surroundings.database.dsn("toolgw"), max_size=2)
    store = PostgresToolStore(pool, "toolgw-8")
    async with connection.transaction():
        await connection.execute("LOCK TABLE toolgw.invocations IN ACCESS EXCLUSIVE MODE")
        held = [asyncio.create_task(store.find("demo", "k1")) for _ in range(4)]
        await asyncio.sleep(0.2)
        await asyncio.wait_for(store.renew(5.0), 2.0)
        assert not any(look.done() for look in held)
    assert all(await asyncio.gather(*held))
    await pool.close()
    await connection.close()


async def test_an_attempt_that_does_not_count_is_given_back_once(gateway: Gateway, surroundings: Surroundings) -> None:
    pool = await create_pool(surroundings.database.dsn("toolgw"))
    store = PostgresToolStore(pool, "toolgw-8")
    call = Call("demo", "helper", "chat", "s-1", "recall_notes", {}, "k1", "", 0)
    claim, later = "1" * 32, "2" * 32
    first = await store.claim(call, RecallNotes.definition, claim, None)
    for _ in range(2):  # The answer to the first was not heard.
        await store.abandon("demo", "k1", claim, counts=False)
    left = await store.find("demo", "k1")
    assert left is not None
    assert (left.attempt, left.runner) == (0, Runner.GONE)
    assert (await store.claim(call, RecallNotes.definition, later, first)).attempt == 1
    await store.abandon("demo", "k1", later)
    assert (await store.claim(call, RecallNotes.definition, "3" * 32, await store.find("demo", "k1"))).attempt == 2
    await pool.close()
