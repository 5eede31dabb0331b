"""Tools that are not part of the stack: behind HTTP on a real socket, remembering who called.

Tests use it as an outside witness: every call is recorded with its idempotency key, turn and step, so that a test can
count effects without believing anything the stack says about itself.

    async with ToolServer([book, charge]) as server:
        server.write_tools_file(path)          # for SOMA_TOOLGW_HTTP_TOOLS_FILE
        ...
        assert set(server.calls_by_key().values()) == {1}

An effect happens once per key: a repeated call of a key gets the first one's answer, as a careful endpoint does it. How
often each key was *called* is recorded all the same: for a tool declared `side_effectful`, once is what is allowed.
What a call answers is decided by `rule`; without one it gives the arguments back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias

import orjson

MAX_HEAD_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class WitnessTool:
    """One tool as the tools file describes it."""

    name: str
    side_effect: Literal["read_only", "idempotent", "side_effectful"]
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    timeout_ms: int = 5000
    compensation: str | None = None
    """The tool of the same server that undoes a call of this one."""


@dataclass(frozen=True, slots=True)
class Give:
    """Answers with a JSON value, after `delay_s`."""

    value: Any
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answers with an HTTP status and a text."""

    status: int
    text: str = "scripted failure"


@dataclass(frozen=True, slots=True)
class CutOff:
    """Drops the connection after the effect: the caller cannot know whether it happened."""


ToolAnswer: TypeAlias = Give | Refuse | CutOff


@dataclass(frozen=True, slots=True)
class RecordedToolCall:
    """One POST to a tool, as it came over the wire."""

    number: int
    key: str
    turn: str
    step: int
    tool: str
    arguments: Any
    session: Mapping[str, str]


Rule: TypeAlias = Callable[[RecordedToolCall], ToolAnswer]


def give_back(call: RecordedToolCall) -> ToolAnswer:
    """The default rule: the arguments are the result."""
    return Give(call.arguments)


class ToolServer:
    """Serves on a free port of the loopback between `start` and `stop`, or as an async context manager."""

    def __init__(self, tools: Sequence[WitnessTool], rule: Rule = give_back) -> None:
        self.tools = tuple(tools)
        self.rule = rule
        self.calls: list[RecordedToolCall] = []
        self.effects: dict[str, ToolAnswer] = {}
        """By idempotency key: what happened, once."""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def calls_by_key(self) -> Counter[str]:
        """How often each idempotency key was called."""
        return Counter(call.key for call in self.calls)

    def write_tools_file(self, path: Path) -> None:
        """Describe the tools for the tool gateway; the server must have started."""
        entries = [
            {
                "tool": tool.name,
                "description": f"{tool.name}, as a witness",
                "parameters": tool.parameters,
                "side_effect": tool.side_effect,
                "timeout_ms": tool.timeout_ms,
                "url": f"http://127.0.0.1:{self._port}/tools/{tool.name}",
                # What a tool does not need is not said: an older release refuses what it does not know.
                **({"compensation": tool.compensation} if tool.compensation is not None else {}),
            }
            for tool in self.tools
        ]
        path.write_bytes(orjson.dumps(entries, option=orjson.OPT_INDENT_2))

    async def start(self) -> None:
        """Start to listen; after `stop` a later start takes the same port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, limit=MAX_HEAD_BYTES)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def __aenter__(self) -> ToolServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one call: the tool gateway keeps none open."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the caller died, or the server stops: nobody listens any more
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        headers, body = await _read_request(reader)
        call = RecordedToolCall(
            number=len(self.calls) + 1,
            key=headers.get("idempotency-key", ""),
            turn=headers.get("soma-turn", ""),
            step=int(headers.get("soma-step", "0")),
            tool=body["tool"],
            arguments=body["arguments"],
            session=body["session"],
        )
        self.calls.append(call)
        answer = self.effects.get(call.key)
        if answer is None:
            answer = self.effects[call.key] = self.rule(call)
        await _answer(writer, answer)


async def _read_request(reader: asyncio.StreamReader) -> tuple[dict[str, str], dict[str, Any]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    pairs = (line.partition(":") for line in head.split("\r\n")[1:] if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return headers, orjson.loads(await reader.readexactly(int(headers["content-length"])))


async def _answer(writer: asyncio.StreamWriter, answer: ToolAnswer) -> None:
    if isinstance(answer, CutOff):
        return
    if isinstance(answer, Refuse):
        status, content, kind = answer.status, answer.text.encode(), "text/plain"
    else:
        await asyncio.sleep(answer.delay_s)
        status, content, kind = 200, orjson.dumps(answer.value), "application/json"
    head = f"HTTP/1.1 {status} .\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode("latin-1") + content)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
