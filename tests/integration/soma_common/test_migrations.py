"""Migrations against the real PostgreSQL: in order, once, and never silently different."""

import asyncio
from pathlib import Path
from typing import Literal

import asyncpg
import pytest

from soma_common.errors import Unavailable, reason_name
from soma_common.postgres.connect import connect, create_pool
from soma_common.postgres.migrations import MigrationError, apply_migrations, read_migrations
from soma_common.testing.embedded import Database

FIRST = "CREATE TABLE toolgw.notes (id bigint PRIMARY KEY, text bytea); GRANT SELECT ON toolgw.notes TO soma_toolgw;"
SECOND = "ALTER TABLE toolgw.notes ADD COLUMN author text;"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "migrations"
    path.mkdir()
    (path / "0001_notes.sql").write_text(FIRST)
    return path


async def test_files_run_in_order_once(postgres: Database, folder: Path) -> None:
    dsn = postgres.owner_dsn("toolgw")
    assert await apply_migrations(dsn, "toolgw", folder) == ["0001_notes"]
    assert await apply_migrations(dsn, "toolgw", folder) == []
    (folder / "0002_author.sql").write_text(SECOND)
    assert await apply_migrations(dsn, "toolgw", folder) == ["0002_author"]
    connection = await connect(postgres.dsn("toolgw"))
    assert await connection.fetch("SELECT author FROM toolgw.notes") == []
    await connection.close()


async def test_verify_changes_nothing_and_says_what_is_missing(postgres: Database, folder: Path) -> None:
    with pytest.raises(MigrationError, match=r"lacks 0001_notes.*SOMA_POSTGRES_MIGRATE=apply"):
        await apply_migrations(postgres.dsn("toolgw"), "toolgw", folder, "verify")
    await apply_migrations(postgres.owner_dsn("toolgw"), "toolgw", folder)
    assert await apply_migrations(postgres.dsn("toolgw"), "toolgw", folder, "verify") == []
    (folder / "0002_author.sql").write_text(SECOND)
    with pytest.raises(MigrationError, match="lacks 0002_author"):
        await apply_migrations(postgres.dsn("toolgw"), "toolgw", folder, "verify")


async def test_many_processes_may_start_at_once(postgres: Database, folder: Path) -> None:
    (folder / "0002_author.sql").write_text(SECOND)
    dsn = postgres.owner_dsn("toolgw")
    applied = await asyncio.gather(*(apply_migrations(dsn, "toolgw", folder) for _ in range(4)))
    assert sorted(map(len, applied)) == [0, 0, 0, 2]


async def test_a_file_that_changed_after_it_ran_is_refused(postgres: Database, folder: Path) -> None:
    dsn = postgres.owner_dsn("toolgw")
    await apply_migrations(dsn, "toolgw", folder)
    (folder / "0001_notes.sql").write_text(FIRST + "-- better")
    for mode in ("apply", "verify"):
        with pytest.raises(MigrationError, match="0001_notes changed"):
            await apply_migrations(dsn, "toolgw", folder, mode)


@pytest.mark.parametrize("mode", ["apply", "verify"])
async def test_what_a_newer_release_has_added_is_no_obstacle(
    postgres: Database, folder: Path, mode: Literal["apply", "verify"]
) -> None:
    dsn = postgres.owner_dsn("toolgw")
    (folder / "0002_author.sql").write_text(SECOND)
    await apply_migrations(dsn, "toolgw", folder)
    (folder / "0002_author.sql").unlink()
    assert await apply_migrations(dsn, "toolgw", folder, mode) == []
    (folder / "0002_author.sql").write_text(SECOND)
    assert await apply_migrations(dsn, "toolgw", folder, mode) == [], "and the newer one finds it as it left it"


@pytest.mark.parametrize("mode", ["apply", "verify"])
async def test_what_a_newer_release_has_broken_is_refused(
    postgres: Database, folder: Path, mode: Literal["apply", "verify"]
) -> None:
    dsn = postgres.owner_dsn("toolgw")
    (folder / "0002_author.sql").write_text("-- soma:breaking\n" + SECOND)
    await apply_migrations(dsn, "toolgw", folder)
    (folder / "0002_author.sql").unlink()
    with pytest.raises(MigrationError, match="run the newer release"):
        await apply_migrations(dsn, "toolgw", folder, mode)


async def test_release_0_1_finds_only_what_it_knows(postgres: Database, folder: Path) -> None:
    """It refuses to start when this table has a number that it does not know."""
    (folder / "0002_author.sql").write_text(SECOND)
    await apply_migrations(postgres.owner_dsn("toolgw"), "toolgw", folder)
    connection = await connect(postgres.dsn("toolgw"))
    assert [row["number"] for row in await connection.fetch("SELECT number FROM toolgw.schema_migrations")] == [1]
    await connection.close()


async def test_a_file_that_fails_leaves_nothing_behind(postgres: Database, folder: Path) -> None:
    (folder / "0002_bad.sql").write_text("CREATE TABLE toolgw.half (id int); SELECT 1/0;")
    dsn = postgres.owner_dsn("toolgw")
    with pytest.raises(MigrationError, match=r"0002_bad.*division by zero"):
        await apply_migrations(dsn, "toolgw", folder)
    connection = await connect(dsn)
    assert await connection.fetchval("SELECT to_regclass('toolgw.half')") is None
    assert await connection.fetchval("SELECT max(number) FROM toolgw.schema_migrations") == 1
    await connection.close()


async def test_a_file_may_ask_to_run_outside_of_a_transaction(postgres: Database, folder: Path) -> None:
    (folder / "0002_index.sql").write_text(
        "-- soma:no-transaction\nCREATE INDEX CONCURRENTLY IF NOT EXISTS notes_text ON toolgw.notes (text);"
    )
    assert len(await apply_migrations(postgres.owner_dsn("toolgw"), "toolgw", folder)) == 2


async def test_an_index_is_made_while_other_processes_wait_for_it(postgres: Database, folder: Path) -> None:
    """CREATE INDEX CONCURRENTLY waits for the snapshots of others: of no process that waits for it to end."""
    dsn = postgres.owner_dsn("toolgw")
    await apply_migrations(dsn, "toolgw", folder)
    (folder / "0002_index.sql").write_text(
        "-- soma:no-transaction\n"
        "DROP INDEX CONCURRENTLY IF EXISTS toolgw.notes_text;\n"
        "SELECT pg_sleep(0.3);\n"
        "CREATE INDEX CONCURRENTLY notes_text ON toolgw.notes (text);\n"
    )
    applied = await asyncio.gather(*(apply_migrations(dsn, "toolgw", folder) for _ in range(4)))
    assert sorted(map(len, applied)) == [0, 0, 0, 1]
    connection = await connect(dsn)
    assert await connection.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'toolgw.notes_text'::regclass")
    await connection.close()


@pytest.mark.parametrize("head", ["", "-- soma:no-transaction\n"])
async def test_a_transaction_that_stays_open_is_waited_for(
    postgres: Database, folder: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """A dump, for example. It is no fault of the file: whoever starts tries again."""
    dsn = postgres.owner_dsn("toolgw")
    await apply_migrations(dsn, "toolgw", folder)
    index = "CREATE INDEX CONCURRENTLY notes_text ON toolgw.notes (text);" if head else SECOND
    (folder / "0002_waits.sql").write_text(f"{head}DROP INDEX IF EXISTS toolgw.notes_text;\n{index}")
    monkeypatch.setattr("soma_common.postgres.migrations.LOCK_TIMEOUT_S", 1)
    other = await connect(dsn)
    async with other.transaction():
        await other.execute("INSERT INTO toolgw.notes VALUES (1, '')")
        with pytest.raises(Unavailable, match="0002_waits of schema toolgw waits for"):
            await apply_migrations(dsn, "toolgw", folder)
    await other.close()
    assert await apply_migrations(dsn, "toolgw", folder) == ["0002_waits"]


@pytest.mark.parametrize("name", ["1_x.sql", "0001-x.sql", "0003_gap.sql", "0001_twice.sql"])
def test_names_that_break_the_order_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("SELECT 1")
    with pytest.raises(MigrationError):
        read_migrations(folder)


async def test_an_absent_database_is_unavailable(tmp_path: Path, folder: Path) -> None:
    dsn = f"postgresql:///soma?host={tmp_path}&port=5432&user=soma_toolgw"
    for attempt in (connect(dsn), create_pool(dsn), apply_migrations(dsn, "toolgw", folder)):
        with pytest.raises(Unavailable) as failed:
            await attempt
        assert reason_name(failed.value.reason) == "STORE_UNAVAILABLE"
        assert str(tmp_path) not in failed.value.message


async def test_session_settings_reach_the_server(postgres: Database) -> None:
    connection = await connect(
        postgres.dsn("router"), application_name="router-0", idle_in_transaction_session_timeout="700"
    )
    assert await connection.fetchval("SHOW application_name") == "router-0"
    assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "700ms"
    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(5)", timeout=0.1)
    await connection.close()
    pool = await create_pool(postgres.dsn("router"), max_size=2)
    assert await pool.fetchval("SELECT 1") == 1
    await pool.close()
    with pytest.raises(asyncpg.InterfaceError):
        await pool.fetchval("SELECT 1")
