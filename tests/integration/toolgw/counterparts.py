"""What a tool gateway talks to: a control plane that says which tools agents have, and an endpoint that counts."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec
from soma.controlplane.v1.config_service_pb2 import WatchConfigRequest, WatchConfigResponse
from soma.controlplane.v1.config_service_pb2_grpc import ConfigServiceServicer, add_ConfigServiceServicer_to_server
from soma.controlplane.v1.tenant_service_pb2 import Tenant

BUILTINS = ("calculate", "current_time", "recall_notes", "remember_note")
HTTP_TOOLS = ("look", "put", "pay")


class ConfigWitness(ConfigServiceServicer):
    """A control plane with the tenants `demo` and `acme`, whose agent `helper` has every tool, and `bare` none."""

    def __init__(self) -> None:
        self.target = ""
        self._version = 1
        self._changed = asyncio.Condition()
        every = AgentSpec(model="echo/echo", tools=[*BUILTINS, *HTTP_TOOLS])
        self._frame = WatchConfigResponse(
            snapshot=True,
            complete=True,
            version=1,
            tenants=[Tenant(name="tenants/demo"), Tenant(name="tenants/acme")],
            agents=[
                *(Agent(name=f"tenants/{tenant}/agents/helper", spec=every) for tenant in ("demo", "acme")),
                Agent(name="tenants/demo/agents/bare", spec=AgentSpec(model="echo/echo")),
            ],
        )
        self._change = WatchConfigResponse()

    async def give(self, agent: str, *tools: str) -> None:
        """Set the tools of an agent of `demo`."""
        async with self._changed:
            self._version += 1
            spec = AgentSpec(model="echo/echo", tools=tools)
            changed = Agent(name=f"tenants/demo/agents/{agent}", spec=spec)
            self._change = WatchConfigResponse(version=self._version, agents=[changed])
            self._changed.notify_all()

    async def WatchConfig(
        self, request: WatchConfigRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[WatchConfigResponse]:
        """Sends the copy, then each change."""
        yield self._frame
        while True:
            async with self._changed:
                await self._changed.wait()
            yield self._change


@asynccontextmanager
async def running_config() -> AsyncIterator[ConfigWitness]:
    """A control plane on a free port."""
    witness = ConfigWitness()
    server = grpc.aio.server()
    add_ConfigServiceServicer_to_server(witness, server)
    witness.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield witness
    finally:
        await server.stop(0)


class HttpWitness:
    """An endpoint whose answer the path chooses; counts the requests it has read, by idempotency key."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.requests: list[tuple[dict[str, str], Any]] = []
        """Headers in lower case, and the body."""
        self.release = asyncio.Event()
        """Requests to `/hold` are answered when this is set."""
        self.awake = asyncio.Event()
        """While this is not set, requests to `/slow` get no answer."""
        self.awake.set()
        self.asleep = asyncio.Semaphore(0)
        """Released for each request to `/slow` that finds the endpoint not awake."""
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        try:
            path, headers = await _head(reader)
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            self.calls[headers["idempotency-key"]] += 1
            self.requests.append((headers, body))
            await self._answer(path, body, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: Any, writer: asyncio.StreamWriter) -> None:
        match path:
            case "/cut":
                return
            case "/hold":
                await self.release.wait()
                _respond(writer, 200, b'{"held": true}')
            case "/slow":
                await self._take_time()
                _respond(writer, 200, b'{"slow": true}')
            case "/error":
                _respond(writer, 503, b"no more today")
            case "/text":
                _respond(writer, 200, "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n".encode(), "text/plain")
            case "/broken":
                _respond(writer, 200, b"{nonsense")
            case "/empty":
                _respond(writer, 200, b"")
            case "/moved":
                _respond(writer, 302, b"elsewhere")
            case "/big":
                _respond(writer, 200, json.dumps("x" * 70_000).encode())
            case "/endless":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
                while True:
                    writer.write(b"[" * 65_536)
                    await writer.drain()
            case _:
                _respond(writer, 200, json.dumps({"echo": body["arguments"]}).encode())
        await writer.drain()

    async def _take_time(self) -> None:
        await asyncio.sleep(0.3)
        if not self.awake.is_set():
            self.asleep.release()
            await self.awake.wait()


@asynccontextmanager
async def running_http() -> AsyncIterator[HttpWitness]:
    """An endpoint on a free port."""
    witness = HttpWitness()
    server = await asyncio.start_server(witness.serve, "127.0.0.1", 0)
    witness.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield witness
    finally:
        witness.release.set()
        server.close()


async def _head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    request_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return request_line.split(" ")[1], {name.lower(): value for name, value in headers.items()}


def _respond(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "application/json") -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
