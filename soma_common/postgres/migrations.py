"""Numbered SQL migrations, applied in order, each once, each in its own transaction.

Files are `services/<svc>/adapters/migrations/NNNN_name.sql`, from 0001 without gaps; one never changes after its
release. An advisory lock lets several processes start at once. The files run as the owner of the schema and grant to
the service's role `soma_<svc>` what it needs.

A file from 0002 on only adds: the release before goes on working with the schema that it makes, and starts with it
too, because in a rolling upgrade and when an upgrade is taken back both run beside each other. A file that cannot keep
to that says so in its first line, and then older releases refuse to start.

    -- soma:breaking         older releases cannot work with what this file makes
    -- soma:no-transaction   runs outside of a transaction (CREATE INDEX CONCURRENTLY), statement by statement, each of
                             them up to a `;` that ends a line; must be safe to run again from the first one

What was applied stands with a checksum in two tables, because release 0.1 refuses every number in the first one that it
does not know: `<schema>.schema_migrations` has the first file and the breaking ones, `<schema>.schema_additions` the
others.
"""

import asyncio
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import asyncpg
import structlog

from soma_common.clock import monotonic
from soma_common.postgres.connect import Connection, connect, unavailable
from soma_common.postgres.errors import store_errors
from soma_common.settings import StartRefused

LOCK_TIMEOUT_S = 30
"""How long to wait for another process that migrates."""
STATEMENT_TIMEOUT_S = 600.0
"""How long one file may take."""
_LOCK_PAUSE_S = 0.05

NO_TRANSACTION = "-- soma:no-transaction"
BREAKING = "-- soma:breaking"
BASE, ADDITIONS = "schema_migrations", "schema_additions"

_FILE_NAME = re.compile(r"(?P<number>\d{4})_(?P<name>[a-z0-9_]+)\.sql")
_END_OF_STATEMENT = re.compile(r";\s*(?:\n|$)")
_IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]*")
_log = structlog.get_logger(__name__)


class MigrationError(StartRefused):
    """The schema cannot be brought, or is not, where the code needs it; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One migration file."""

    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the content, in hex."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def table(self) -> str:
        """Where it is recorded: as something that older releases can live with, or not."""
        return BASE if self.number == 1 or self.sql.startswith(BREAKING) else ADDITIONS


def read_migrations(folder: Path) -> list[Migration]:
    """Return the migrations in `folder` in order; raises MigrationError for a bad name, a gap or a number used
    twice.
    """
    found: list[Migration] = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise MigrationError(f"{path.name} in {folder} is not named NNNN_name.sql")
        found.append(Migration(int(match["number"]), match["name"], path.read_text(encoding="utf-8")))
    if not found:
        raise MigrationError(f"there are no migrations in {folder}")
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        raise MigrationError(f"the migrations in {folder} are not numbered 0001, 0002, ... without gaps")
    return found


async def apply_migrations(
    dsn: str, schema: str, folder: Path, mode: Literal["apply", "verify"] = "apply"
) -> list[str]:
    """Bring `schema` to the state of the files in `folder` and return the names of those applied now.

    With mode `verify` nothing is changed. `dsn` connects as the schema's owner (any role that may read is enough to
    verify). What a newer release has only added is no obstacle. Raises MigrationError when files and database do not
    agree (an applied file changed, a newer release has changed what this one relies on, or the database is behind and
    only `verify` was asked for), and Unavailable when the database does not answer or others hold the tables for too
    long.
    """
    if not _IDENTIFIER.fullmatch(schema):
        raise ValueError(f"{schema!r} is not a plain schema name")
    migrations = read_migrations(folder)
    connection = await connect(dsn, application_name=f"migrate {schema}", command_timeout_s=STATEMENT_TIMEOUT_S)
    try:
        async with store_errors():
            if mode == "apply":
                return await _apply(connection, schema, migrations)
            pending = await _pending(connection, schema, migrations)
        if pending:
            raise MigrationError(
                f"schema {schema} lacks {', '.join(_label(m) for m in pending)}: "
                "start once with SOMA_POSTGRES_MIGRATE=apply, or apply the files in order"
            )
        return []
    finally:
        await connection.close()


async def _apply(connection: Connection, schema: str, migrations: list[Migration]) -> list[str]:
    key = int.from_bytes(hashlib.blake2b(f"migrate {schema}".encode(), digest_size=8).digest(), "big", signed=True)
    await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
    await _lock(connection, schema, key)
    if await connection.fetchval("SELECT to_regnamespace($1)", schema) is None:
        # Not `IF NOT EXISTS`: that asks for the right to create schemas even when there is nothing to create.
        await connection.execute(f"CREATE SCHEMA {schema}")
    for table in (BASE, ADDITIONS):
        await connection.execute(
            f"""CREATE TABLE IF NOT EXISTS {schema}.{table} (
                number integer PRIMARY KEY,
                name text NOT NULL,
                checksum text NOT NULL,
                applied_at timestamptz NOT NULL DEFAULT now()
            );
            DO $$ BEGIN
                IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'soma_{schema}') THEN
                    GRANT USAGE ON SCHEMA {schema} TO soma_{schema};
                    GRANT SELECT ON {schema}.{table} TO soma_{schema};
                END IF;
            END $$"""  # So that the service itself can verify.
        )
    pending = await _pending(connection, schema, migrations)
    for migration in pending:
        await _apply_one(connection, schema, migration)
        _log.info("migrations.applied", schema=schema, migration=_label(migration))
    return [_label(migration) for migration in pending]


async def _lock(connection: Connection, schema: str, key: int) -> None:
    """Wait until no other process migrates.

    By asking again and again: a statement that waits for the lock holds a snapshot, and CREATE INDEX CONCURRENTLY of
    the process that has the lock would wait for that.
    """
    give_up_at = monotonic() + LOCK_TIMEOUT_S
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", key):
        if monotonic() > give_up_at:
            error = TimeoutError(f"the lock {key} is held")
            raise unavailable(error, f"another process has been migrating schema {schema} for {LOCK_TIMEOUT_S} s")
        await asyncio.sleep(_LOCK_PAUSE_S)


async def _apply_one(connection: Connection, schema: str, migration: Migration) -> None:
    record = f"INSERT INTO {schema}.{migration.table} (number, name, checksum) VALUES ($1, $2, $3)"
    values = (migration.number, migration.name, migration.checksum)
    try:
        if migration.sql.startswith(NO_TRANSACTION):
            for statement in _END_OF_STATEMENT.split(migration.sql.strip()):
                if statement:
                    await connection.execute(statement)
            await connection.execute(record, *values)
        else:
            async with connection.transaction():
                await connection.execute(migration.sql)
                await connection.execute(record, *values)
    except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
        what = f"migration {_label(migration)} of schema {schema} waits for what others do with its tables"
        raise unavailable(error, what) from error
    except asyncpg.PostgresError as error:
        raise MigrationError(f"migration {_label(migration)} of schema {schema} failed: {error}") from error


async def _applied(connection: Connection, schema: str, table: str) -> dict[int, tuple[str, str]]:
    if await connection.fetchval("SELECT to_regclass($1)", f"{schema}.{table}") is None:
        return {}
    rows = await connection.fetch(f"SELECT number, name, checksum FROM {schema}.{table} ORDER BY number")
    return {row["number"]: (row["name"], row["checksum"]) for row in rows}


async def _pending(connection: Connection, schema: str, migrations: list[Migration]) -> list[Migration]:
    base, additions = [await _applied(connection, schema, table) for table in (BASE, ADDITIONS)]
    known = {migration.number: migration for migration in migrations}
    for number, (name, checksum) in (base | additions).items():
        migration = known.get(number)
        if migration is None and number in additions:
            _log.info("migrations.newer_schema", schema=schema, migration=f"{number:04}_{name}")
        elif migration is None:
            raise MigrationError(
                f"schema {schema} has migration {number:04}_{name} "
                "that this release does not know and cannot work with: run the newer release"
            )
        elif migration.checksum != checksum:
            raise MigrationError(
                f"migration {_label(migration)} changed after it was applied to schema {schema}: "
                "restore the file and put the change into a new one"
            )
    return [migration for migration in migrations if migration.number not in base | additions]


def _label(migration: Migration) -> str:
    return f"{migration.number:04}_{migration.name}"
