"""How each peer is started and stopped: fresh data each time, on free ports, as children that die with us."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from soma_common.embedded.postgres import PostgresConfig, PostgresServer
from soma_common.embedded.process import ChildProcess
from tests.peers import install

READY_S = 30.0
STOP_S = 10.0
UVICORN = (
    *("--host=127.0.0.1", "--loop=uvloop", "--http=httptools", "--no-access-log", "--log-level=warning"),
    *("--backlog=1024", "--timeout-keep-alive=600"),
)


@dataclass(frozen=True, slots=True)
class Server:
    """A running peer: the ports that take turns, which clients are spread over, and its processes by name."""

    ports: tuple[int, ...]
    pids: dict[str, int]


@asynccontextmanager
async def on_postgres(application: str, settings: Mapping[str, str], processes: int = 1) -> AsyncIterator[Server]:
    """An application of `apps` beside a PostgreSQL of its own: the product's, with the product's settings.

    Each of its processes has a port. Behind one port the system may give nearly all connections to one of them.
    """
    async with AsyncExitStack() as stack:
        home = _home(stack)
        postgres = PostgresServer(PostgresConfig(home / "postgres"))
        await postgres.start()
        stack.push_async_callback(postgres.stop)
        connection = await asyncpg.connect(postgres.dsn(database="postgres"))
        await connection.execute("CREATE DATABASE peer TEMPLATE template0")
        await connection.close()
        environment = {"PEER_DSN": postgres.dsn(database="peer"), **settings}
        ports: list[int] = []
        pids: dict[str, int] = {}
        # One after the other: the first makes the tables.
        for number in range(processes):
            ports.append(_free_port())
            child = await _application(stack, home, application, ports[-1], environment)
            await _until_answers(f"http://127.0.0.1:{ports[-1]}/openapi.json", child)
            pids["application" if processes == 1 else f"application-{number}"] = child.pid
        yield Server(tuple(ports), {**pids, "postgres": postgres.process.pid})


@asynccontextmanager
async def restate(program: Path, partitions: int | None) -> AsyncIterator[Server]:
    """Restate's server beside one process with the handlers; `partitions` None is its default."""
    async with AsyncExitStack() as stack:
        home = _home(stack)
        handlers, ingress, admin, node = (_free_port() for _ in range(4))
        application = await _application(stack, home, "restate_app", handlers, {})
        environment = {
            "RESTATE_BASE_DIR": str(home / "data"),
            "RESTATE_LISTEN_MODE": "tcp",
            "RESTATE_BIND_ADDRESS": f"127.0.0.1:{node}",
            "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ingress}",
            "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}",
            "RESTATE_DISABLE_TELEMETRY": "true",
            "RESTATE_LOG_FILTER": "warn",
        }
        if partitions is not None:
            environment["RESTATE_DEFAULT_NUM_PARTITIONS"] = str(partitions)
        server = await _child(stack, [program, "--no-logo"], home / "restate.out", environment)
        await _until_answers(f"http://127.0.0.1:{admin}/health", server)
        await _until_answers(f"http://127.0.0.1:{ingress}/restate/health", server)
        await _until_answers(f"http://127.0.0.1:{handlers}/health", application)
        # uvicorn speaks HTTP/1.1 only; hypercorn, which speaks HTTP/2, is slower by more than that costs.
        deployment = {"uri": f"http://127.0.0.1:{handlers}", "use_http_11": True}
        await _until_answers(f"http://127.0.0.1:{admin}/deployments", server, deployment)
        yield Server((ingress,), {"restate-server": server.pid, "application": application.pid})


async def _application(
    stack: AsyncExitStack, home: Path, name: str, port: int, settings: Mapping[str, str]
) -> ChildProcess:
    command: list[str | Path] = [install.PYTHON, "-m", "uvicorn", f"tests.peers.apps.{name}:app", f"--port={port}"]
    command += UVICORN
    environment = {"PYTHONPATH": str(install.ROOT), **settings}
    return await _child(stack, command, home / f"{name}-{port}.out", environment)


async def _child(
    stack: AsyncExitStack, command: list[str | Path], output: Path, settings: Mapping[str, str]
) -> ChildProcess:
    child = ChildProcess.start(command, output=output, environment={**os.environ, **settings}, directory=output.parent)
    stack.push_async_callback(child.stop, signal.SIGTERM, STOP_S)
    return child


def _home(stack: AsyncExitStack) -> Path:
    home = Path(tempfile.mkdtemp(prefix="soma-peer-"))
    stack.callback(shutil.rmtree, home, ignore_errors=True)
    return home


async def _until_answers(url: str, child: ChildProcess, body: object = None) -> None:
    """Ask until the answer is a success, or the process has ended, or the time is up."""
    seen = ""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + READY_S
    while loop.time() < deadline and child.exit_code is None:
        seen = await asyncio.to_thread(_ask, url, body)
        if not seen:
            return
        await asyncio.sleep(0.05)
    raise RuntimeError(f"{url} does not answer: {seen}\n{child.output_tail()}")


def _ask(url: str, body: object) -> str:
    """What is wrong with the answer; empty when nothing is."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5):
            return ""
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read()[:500]!r}"
    except OSError as error:
        return str(error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
