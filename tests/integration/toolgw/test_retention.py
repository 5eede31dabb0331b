"""What is cleared away, and what stays."""

from __future__ import annotations

import asyncpg

from services.toolgw.adapters.store_postgres import PostgresToolStore
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
        " SELECT 'demo', '', turn, 'undoing', '{}', '{}', clock_timestamp() - age"
        " FROM (VALUES ('old', interval '49 h'), ('new', interval '47 h')) AS given (turn, age)"
    )
    pool = await create_pool(surroundings.database.dsn("toolgw"))
    await PostgresToolStore(pool, "toolgw-8").forget()
    await pool.close()
    assert {row["key"] for row in await connection.fetch("SELECT key FROM toolgw.invocations")} == {"new", "running"}
    assert [row["instance"] for row in await connection.fetch("SELECT instance FROM toolgw.runners")] == ["toolgw-0"]
    assert [row["turn_id"] for row in await connection.fetch("SELECT turn_id FROM toolgw.reversals")] == ["new"]
    await connection.close()
    notes = result_of(await gateway.invoke("recall_notes", "recall"))["notes"]
    assert set(notes) == {"old", "new", "running"}
