"""The embedded PostgreSQL server: roles, recovery, orphans, and running as root or not."""

import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import asyncpg
import pytest

from soma_common.embedded import postgres as embedded
from soma_common.embedded.identity import first_closed_directory
from soma_common.embedded.postgres import PORT, PostgresConfig, PostgresServer, socket_directory
from soma_common.embedded.process import ChildProcess, PartFailed, ProcessIdentity, descendants
from soma_common.testing.embedded import Database, FaultyPostgres, soma_database

ORDINARY_USER = """
import asyncio, os, sys
from pathlib import Path
from soma_common.embedded.nats import NatsConfig, NatsServer
from soma_common.embedded.postgres import PostgresConfig, PostgresServer

async def main(home: Path) -> None:
    postgres, nats = PostgresServer(PostgresConfig(home / "p", durable=False)), NatsServer(NatsConfig(home / "n"))
    for server in (postgres, nats):
        await server.start()
        await server.check()
        await server.stop()
    print("uid", os.geteuid())

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_commits_survive_kill_9(own_postgres: FaultyPostgres) -> None:
    owner_dsn = soma_database(own_postgres).owner_dsn("router")
    connection = await asyncpg.connect(owner_dsn)
    await connection.execute("CREATE TABLE kept (number int)")
    await connection.executemany("INSERT INTO kept VALUES ($1)", [(number,) for number in range(100)])

    await own_postgres.kill9()
    connection.terminate()
    await own_postgres.start()

    connection = await asyncpg.connect(owner_dsn)
    assert await connection.fetchval("SELECT count(*) FROM router.kept") == 100
    await connection.close()


async def test_no_commit_waits_for_a_new_wal_file_to_be_written(own_postgres: FaultyPostgres) -> None:
    written = "SELECT sum(write_bytes) FROM pg_stat_io WHERE object = 'wal' AND context = 'init'"
    current = "SELECT pg_walfile_name(pg_current_wal_insert_lsn())"
    connection = await asyncpg.connect(own_postgres.dsn())
    before, first = await connection.fetchval(written), await connection.fetchval(current)
    for _ in range(3):
        await connection.execute("SELECT pg_logical_emit_message(true, 'test', 'a commit')")
        await connection.execute("SELECT pg_switch_wal()")
    await connection.execute("SELECT pg_stat_force_next_flush()")
    assert int(await connection.fetchval(current), 16) >= int(first, 16) + 2, "there are new files"
    assert await connection.fetchval(written) - before < 3 * 2**20
    await connection.close()


async def test_a_start_waits_for_the_sessions_of_a_killed_postmaster(own_postgres: FaultyPostgres) -> None:
    """Killing only the postmaster leaves sessions that hold its shared memory for a moment."""
    connections = [await asyncpg.connect(soma_database(own_postgres).dsn("router")) for _ in range(5)]
    own_postgres.process.send(signal.SIGKILL)
    await own_postgres.process.ended()
    await own_postgres.start()
    await own_postgres.check()
    for connection in connections:
        connection.terminate()


async def test_a_stop_that_takes_too_long_leaves_no_process_behind(own_postgres: FaultyPostgres) -> None:
    """Its directory may be copied or replaced then: whatever still ran would write into what is put there."""
    processes = descendants(own_postgres.process.pid)
    assert processes
    for each in processes:
        each.send(signal.SIGSTOP)
    await own_postgres.stop(timeout_s=0.2)
    assert not [each for each in processes if each.alive() and not is_dead(each.pid)]
    await own_postgres.start()


def is_dead(pid: int) -> bool:
    """Whether it has ended and nobody has waited for it yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


async def test_an_orphaned_postmaster_is_replaced(own_postgres: FaultyPostgres) -> None:
    """What a supervisor that was killed may leave behind: the next one ends it and takes over."""
    orphan = own_postgres.process
    successor = FaultyPostgres(PostgresConfig(own_postgres.data_directory.parent, durable=False))
    await successor.start()
    assert orphan.exit_code == 0
    await successor.check()
    await successor.stop()


async def test_a_pid_file_that_names_a_stranger_is_no_obstacle(own_postgres: FaultyPostgres) -> None:
    await own_postgres.kill9()
    pid_file = own_postgres.data_directory / "postmaster.pid"
    pid_file.write_text(pid_file.read_text().replace(str(own_postgres.process.pid), str(os.getppid()), 1))
    await own_postgres.start()
    assert ProcessIdentity.of(os.getppid()) is not None
    await own_postgres.check()


async def test_a_service_owns_nothing_and_enters_only_its_schema(postgres: Database) -> None:
    owner = await asyncpg.connect(postgres.owner_dsn("router"))
    await owner.execute("CREATE TABLE secret (text text); INSERT INTO secret VALUES ('x')")
    router = await asyncpg.connect(postgres.dsn("router"))
    toolgw = await asyncpg.connect(postgres.dsn("toolgw"))

    for connection in (router, toolgw):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch("SELECT * FROM router.secret")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE TABLE router.mine ()")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE TABLE public.mine ()")
    rights = await router.fetchrow("SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user")
    assert rights is not None
    assert list(rights) == [False, False]
    assert await router.fetchval("SHOW idle_in_transaction_session_timeout") == "1s"
    for connection in (owner, router, toolgw):
        await connection.close()


@pytest.mark.parametrize("service", ["gateway", "cognition"])
async def test_a_service_without_a_schema_may_not_even_connect(postgres: Database, service: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await asyncpg.connect(postgres.dsn(service))


async def test_nothing_is_open_to_other_users(own_postgres: FaultyPostgres) -> None:
    directory = own_postgres.data_directory.parent
    for path in (directory, own_postgres.data_directory, own_postgres.socket_directory):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
        assert path.stat().st_uid == os.geteuid(), path


async def test_a_frozen_server_fails_its_check_and_wakes(
    own_postgres: FaultyPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "CHECK_TIMEOUT_S", 0.3)
    own_postgres.sigstop()
    with pytest.raises(TimeoutError):
        await own_postgres.check()
    own_postgres.sigcont()
    await own_postgres.check()


async def test_a_long_home_gets_a_short_private_socket_directory(tmp_path: Path) -> None:
    home = tmp_path / ("deep" * 25)
    server = PostgresServer(PostgresConfig(home, durable=False))
    try:
        await server.start()
        assert len(os.fsencode(server.socket_directory)) + len(f"/.s.PGSQL.{PORT}") < 100
        assert stat.S_IMODE(server.socket_directory.stat().st_mode) == 0o700
        await server.check()
    finally:
        await server.stop()
        socket_directory(home).rmdir()


async def test_somebody_elses_socket_directory_is_refused(tmp_path: Path) -> None:
    home = tmp_path / ("deep" * 25)
    planted = socket_directory(home)
    planted.symlink_to(tmp_path)
    try:
        with pytest.raises(PartFailed, match="belongs to somebody else"):
            await PostgresServer(PostgresConfig(home, durable=False)).start()
    finally:
        planted.unlink()


def test_a_closed_parent_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "below").mkdir(mode=0o755)
    assert first_closed_directory(closed / "below", closed.stat().st_uid + 1, closed.stat().st_gid + 1) is not None
    assert first_closed_directory(Path("/"), 12345, 12345) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can choose to be somebody else")
class TestAsRoot:
    """PostgreSQL itself refuses to run as root: both ways around it."""

    async def test_the_user_namespace_leaves_every_file_to_root(self, own_postgres: FaultyPostgres) -> None:
        owners = {path.stat().st_uid for path in own_postgres.data_directory.rglob("*")}
        assert owners == {0}

    async def test_without_user_namespaces_it_runs_as_nobody_and_returns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same cluster, first as nobody (namespaces refused), then in a namespace again."""
        home = Path("/tmp") / f"soma-nobody-{os.getpid()}"  # pytest's own directories are closed to nobody
        home.mkdir(mode=0o755)
        server = FaultyPostgres(PostgresConfig(home / "postgres", durable=False))
        try:
            with monkeypatch.context() as refused:
                refused.setattr("soma_common.embedded.identity.user_namespace", lambda _: None)
                try:
                    await server.start()
                except PartFailed as failure:
                    pytest.skip(f"this checkout is closed to nobody: {failure}")
                assert Path(f"/proc/{server.process.pid}").stat().st_uid == 65534
                await server.provision()
                await server.stop()
            await server.start()
            assert server.data_directory.stat().st_uid == 0
            await server.check()
        finally:
            await server.stop()
            shutil.rmtree(home)

    async def test_an_ordinary_user_needs_no_tricks(self, tmp_path: Path) -> None:
        """Both servers started by an ordinary user (inside a namespace, so that it can read this tree)."""
        home = tmp_path / "home"
        home.mkdir(mode=0o700)
        program = tmp_path / "program.py"
        program.write_text(ORDINARY_USER)
        process = ChildProcess.start(
            [sys.executable, program, home],
            output=tmp_path / "output",
            identity="userns:1",
            environment={**os.environ, "PYTHONPATH": str(Path(embedded.__file__).parents[2])},
        )
        code = await process.ended()
        assert (code, process.output_tail()) == (0, "uid 1")
