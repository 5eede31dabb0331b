"""Every guard can still be taken away: an experiment whose guard has moved proves nothing."""

import asyncio
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from services.router.main import MIGRATIONS
from soma_common.postgres.migrations import apply_migrations
from soma_common.testing.embedded import Database
from tests.chaos.guard_faults import EXPERIMENTS
from tests.chaos.unguarded import IN_CLIENTS, IN_DATABASE, IN_SERVICES, guards, make_commits_slow, unguard_database

ROOT = Path(__file__).resolve().parents[2]
TAKE_AWAY = "import sys; from tests.chaos import unguarded; {}[sys.argv[1]]()"
OF_CODE = [
    *((f"unguarded.IN_SERVICES[{service!r}]", guard) for service, of in IN_SERVICES.items() for guard in of),
    *(("unguarded.IN_CLIENTS", guard) for guard in IN_CLIENTS),
]


@pytest.mark.parametrize(("where", "guard"), OF_CODE, ids=[guard for _, guard in OF_CODE])
async def test_a_guard_in_the_code_is_where_it_is_taken_from(where: str, guard: str) -> None:
    """In a process of its own: what it does to the code stays."""
    command = [sys.executable, "-c", TAKE_AWAY.format(where), guard]
    taken = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert taken.returncode == 0, taken.stderr


async def test_guards_in_the_database_are_where_they_are_taken_from(postgres: Database) -> None:
    await apply_migrations(postgres.owner_dsn("router"), "router", MIGRATIONS)
    connection = await asyncpg.connect(postgres.superuser_dsn)
    try:
        for guard in IN_DATABASE:
            changes = connection.transaction()
            await changes.start()
            await unguard_database([guard], connection)
            await changes.rollback()
        await make_commits_slow(connection)
    finally:
        await connection.close()


async def test_every_guard_that_can_be_taken_away_has_an_experiment() -> None:
    tried = {guard for experiment in EXPERIMENTS for guard in experiment.guards.split()}
    assert tried <= guards()
    assert guards() - tried <= {"resume"}
