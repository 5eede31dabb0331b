"""The real NATS and PostgreSQL for tests, as pytest fixtures and as async context managers.

The fixtures are there for every test (tests/conftest.py names this module as a plugin):

    async def test_receipt_follows_the_publish(nats_server: FaultyNats, postgres: Database) -> None:
        client = await nats.connect(nats_server.url, token=nats_server.token)
        owner = await asyncpg.connect(postgres.owner_dsn("router"))      # runs migrations
        router = await asyncpg.connect(postgres.dsn("router"))           # what the service itself may do

| fixture           | what it is                                                        | cost    |
|-------------------|-------------------------------------------------------------------|---------|
| `nats_server`     | a NATS server of this test alone, empty                           | 50 ms   |
| `postgres_server` | the PostgreSQL server of the whole run; never hurt it             | 0.7 s once |
| `postgres`        | a database of this test alone in it: roles and empty schemas      | 50 ms   |
| `own_postgres`    | a PostgreSQL server of this test alone, to be killed and frozen   | 0.7 s   |

`nats_server` and `own_postgres` can be hurt: `kill9()`, `sigstop()`, `sigcont()`, `restart()`. Ports, sockets, data
and the token survive a restart, so clients come back by themselves. Scripts and benchmarks without pytest use
`running_nats(directory)` and `running_postgres(directory)`.
"""

import asyncio
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Final

import asyncpg
import pytest

from soma_common.embedded.nats import NatsConfig, NatsServer
from soma_common.embedded.postgres import DATABASE, PostgresConfig, PostgresServer, ServiceRole
from soma_common.embedded.process import ChildProcess, descendants

_STANDSTILL_S: Final = 1.0
"""How long a server gets to stand still. A thread that waits for the disk does not before it is done."""


class FaultyNats(NatsServer):
    """A NATS server that a test can hurt."""

    async def kill9(self) -> None:
        """Kill the server; returns when it is dead."""
        await _kill9(self.process)

    def sigstop(self) -> None:
        """Freeze the server: connections stay open, nothing is answered."""
        _freeze_all(self.process)

    def sigcont(self) -> None:
        """Wake the frozen server."""
        _signal_all(self.process, signal.SIGCONT)

    async def restart(self) -> None:
        """Start again on the same port and data, after stopping cleanly if it still runs."""
        await self.stop()
        await self.start()


class FaultyPostgres(PostgresServer):
    """A PostgreSQL server that a test can hurt, postmaster and sessions alike."""

    async def kill9(self) -> None:
        """Kill the postmaster and every session; returns when the postmaster is dead."""
        await _kill9(self.process)

    def sigstop(self) -> None:
        """Freeze the postmaster and every session: connections stay open, nothing is answered."""
        _freeze_all(self.process)

    def sigcont(self) -> None:
        """Wake the frozen server."""
        _signal_all(self.process, signal.SIGCONT)

    async def restart(self) -> None:
        """Start again on the same socket and data, after stopping cleanly if it still runs."""
        await self.stop()
        await self.start()


@dataclass(frozen=True)
class Database:
    """One provisioned database: the service roles may connect, every service has its empty schema."""

    server: PostgresServer
    name: str

    def dsn(self, service: str) -> str:
        """Connection string of the running service, for example `dsn("router")`."""
        return self.server.dsn(ServiceRole(service, schema=None).user, self.name)

    def owner_dsn(self, service: str) -> str:
        """Connection string of the owner of the service's schema, who runs its migrations."""
        return self.server.dsn(ServiceRole(service, schema=None).owner, self.name)

    @property
    def superuser_dsn(self) -> str:
        """Connection string of the superuser, whom row-level security does not bind: for looking in from outside."""
        return self.server.dsn(database=self.name)


@asynccontextmanager
async def running_nats(directory: Path, *, port: int = 0) -> AsyncIterator[FaultyNats]:
    """A NATS server that keeps everything in `directory`; stopped at the end."""
    server = FaultyNats(NatsConfig(directory, port=port))
    try:
        await server.start()
        yield server
    finally:
        await _end(server.process)


@asynccontextmanager
async def running_postgres(directory: Path, *, durable: bool = False) -> AsyncIterator[FaultyPostgres]:
    """A provisioned PostgreSQL server that keeps everything in `directory`; stopped at the end.

    Without `durable` it does not fsync: commits survive `kill9`, not a killed machine; measurements want it on.
    """
    server = FaultyPostgres(PostgresConfig(directory, durable=durable, shared_buffers_mb=32))
    try:
        await server.start()
        await server.provision()
        yield server
    finally:
        await _end(server.process)


@asynccontextmanager
async def fresh_database(server: PostgresServer) -> AsyncIterator[Database]:
    """A provisioned database of its own in `server`; dropped at the end, whoever is still connected."""
    database = Database(server, f"test_{uuid.uuid4().hex[:12]}")
    await server.provision(database.name)
    try:
        yield database
    finally:
        connection = await asyncpg.connect(server.dsn(database="postgres"))
        try:
            await connection.execute(f'DROP DATABASE "{database.name}" WITH (FORCE)')
        finally:
            await connection.close()


@pytest.fixture
async def nats_server() -> AsyncIterator[FaultyNats]:
    """A NATS server of this test alone."""
    with _short_directory("nats") as directory:
        async with running_nats(directory) as server:
            yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The PostgreSQL server that the tests of this run share; a test that wants to hurt one takes `own_postgres`."""
    with _short_directory("postgres") as directory:
        # Not an async fixture: it outlives the event loop of each single test.
        server = PostgresServer(PostgresConfig(directory, durable=False, shared_buffers_mb=64))
        asyncio.run(server.start())
        try:
            yield server
        finally:
            asyncio.run(server.stop())


@pytest.fixture
async def postgres(postgres_server: PostgresServer) -> AsyncIterator[Database]:
    """A provisioned, empty database of this test alone, in the shared server."""
    async with fresh_database(postgres_server) as database:
        yield database


@pytest.fixture
async def own_postgres() -> AsyncIterator[FaultyPostgres]:
    """A PostgreSQL server of this test alone; its database `soma` is provisioned."""
    with _short_directory("postgres") as directory:
        async with running_postgres(directory) as server:
            yield server


def soma_database(server: PostgresServer) -> Database:
    """The database `soma` of `server`, for tests with `own_postgres`."""
    return Database(server, DATABASE)


@contextmanager
def _short_directory(name: str) -> Iterator[Path]:
    """A directory for one server. Not `tmp_path`: pytest keeps those, and a cluster has 40 MB."""
    with tempfile.TemporaryDirectory(prefix=f"soma-{name}-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _signal_all(process: ChildProcess, number: signal.Signals) -> None:
    for identity in descendants(process.pid):
        identity.send(number)
    process.send(number)


def _freeze_all(process: ChildProcess) -> None:
    """Returns when all of them stand still: on a busy machine a thread that is told to stop may first answer what has
    come meanwhile.
    """
    frozen = [process.pid, *(identity.pid for identity in descendants(process.pid))]
    _signal_all(process, signal.SIGSTOP)
    until = monotonic() + _STANDSTILL_S
    while any(map(_moves, frozen)) and monotonic() < until:
        sleep(0.001)


def _moves(pid: int) -> bool:
    """Whether a thread of the process is neither stopped nor over. False where the system does not tell."""
    try:
        states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return False
    return any(state not in "TtZX" for state in states)


async def _kill9(process: ChildProcess) -> None:
    sessions = descendants(process.pid)
    process.send(signal.SIGKILL)
    for identity in sessions:
        identity.send(signal.SIGKILL)
    await process.ended()


async def _end(process: ChildProcess) -> None:
    """End what a test may have left frozen, half dead or dead, without caring for its data."""
    _signal_all(process, signal.SIGCONT)
    await process.stop(signal.SIGTERM, timeout_s=3.0)
