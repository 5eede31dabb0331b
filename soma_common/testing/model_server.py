"""A model endpoint that is not part of the stack: speaks the OpenAI protocol over a real socket, and remembers who
called.

Tests use it in two ways. As a counterpart: `script(...)` says how the next calls are answered, failures included (a
status, a hang, a connection cut in the middle of a stream, garbage). As an outside witness: every call is recorded
with its headers, so that a test can count calls by (turn, step, dispatch) without believing anything the stack says
about itself.

    async with ModelServer() as server:
        server.script(CallTools(ToolRequest("calculate", {"expression": "17*23"})), Say("It is 391."))
        ...                                                   # the brain runs with SOMA_OPENAI_BASE_URL=server.base_url
        assert set(server.calls_by_step().values()) == {1}

What is not scripted is answered by `rule`. The protocol is the part of `POST /v1/chat/completions` (plain and
streamed) and `GET /v1/models` that clients use; `GET /witness/calls` tells another process what was recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, TypeAlias

import orjson

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
_ARITHMETIC: Final = re.compile(r"\d[\d\s.]*(?:[-+*/][\s(]*\d[\d\s.)]*)+")


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """One tool call the model asks for; `arguments` as text is sent as it is, readable or not."""

    tool: str
    arguments: Mapping[str, Any] | str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Say:
    """Answers with text, word by word if the client streams, `delay_s` before each word."""

    text: str
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True, init=False)
class CallTools:
    """Asks for tools, with `text` beside the calls."""

    requests: tuple[ToolRequest, ...]
    text: str

    def __init__(self, *requests: ToolRequest, text: str = "") -> None:
        object.__setattr__(self, "requests", requests)
        object.__setattr__(self, "text", text)


@dataclass(frozen=True, slots=True)
class Fail:
    """Answers with an HTTP status and an error body as the protocol has it."""

    status: int
    message: str = "scripted failure"
    code: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """Streams the first `words` words of `text`, then drops the connection; with 0 it drops it before anything is
    said."""

    text: str = "these words are never completed"
    words: int = 3


@dataclass(frozen=True, slots=True)
class Hang:
    """Accepts the call and says nothing for so long, then drops the connection."""

    seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class Garbage:
    """Answers 200 with bytes that are not the protocol."""

    body: bytes = b"data: {not json\n\n"
    content_type: str = "text/event-stream"


Reply: TypeAlias = Say | CallTools | Fail | Cut | Hang | Garbage


@dataclass(slots=True)
class RecordedCall:
    """One call of `POST /v1/chat/completions`."""

    number: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    completed: bool = field(default=False)  # the reply was written to its end

    @property
    def turn(self) -> str:
        """The turn, in hex, as the caller named it; empty if it did not."""
        return self.headers.get("soma-turn", "")

    @property
    def step(self) -> int:
        """The step the answer is for, 0 if the caller did not say."""
        return int(self.headers.get("soma-step", "0"))

    @property
    def dispatch(self) -> int:
        """Which try of the turn called, 0 if the caller did not say."""
        return int(self.headers.get("soma-dispatch", "0"))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as it was sent."""
        return list(self.body.get("messages", []))

    @property
    def last_text(self) -> str:
        """The text of the last message."""
        content = self.messages[-1].get("content") if self.messages else ""
        return content if isinstance(content, str) else ""

    def offers(self, tool: str) -> bool:
        """Whether the caller offered a tool of this name."""
        return any(t.get("function", {}).get("name") == tool for t in self.body.get("tools", []))


Rule: TypeAlias = Callable[[RecordedCall], Reply]


def obliging(call: RecordedCall) -> Reply:
    """The default rule: computes with the offered tool `calculate`, tells what a tool answered, and says back
    everything else."""
    last = call.messages[-1] if call.messages else {}
    if last.get("role") == "tool":
        return Say(f"The tool says {last.get('content')}")
    arithmetic = _ARITHMETIC.search(call.last_text)
    if arithmetic and call.offers("calculate"):
        return CallTools(ToolRequest("calculate", {"expression": arithmetic.group().strip()}))
    return Say(f"You said: {call.last_text}")


class ModelServer:
    """Serves on a free port of the loopback between `start` and `stop`, or as an async context manager."""

    def __init__(
        self,
        rule: Rule = obliging,
        *,
        api_key: str | None = None,
        models: tuple[str, ...] = ("witness-1",),
        port: int = 0,
    ) -> None:
        self.rule = rule
        self.calls: list[RecordedCall] = []
        self._api_key = api_key
        self._models = models
        self._port = port
        self._scripted: list[Reply] = []
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def base_url(self) -> str:
        """What a client is configured with."""
        return f"http://127.0.0.1:{self._port}/v1"

    def script(self, *replies: Reply) -> None:
        """Says how the next calls are answered, in order, before the rule is asked again."""
        self._scripted.extend(replies)

    def calls_by_step(self) -> Counter[tuple[str, int, int]]:
        """How many calls each (turn, step, dispatch) made."""
        return Counter((call.turn, call.step, call.dispatch) for call in self.calls)

    async def start(self) -> None:
        """Starts to listen; the port is free again after `stop`, and a later `start` takes the same one."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, limit=2**20)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stops listening and drops every connection."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def __aenter__(self) -> ModelServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the server stops: either way nobody listens any more
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; tells whether the connection goes on."""
        request = await _read_request(reader)
        if request is None:
            return False
        method, path, headers, body = request
        if self._api_key is not None and headers.get("authorization") != f"Bearer {self._api_key}":
            return await _respond_error(writer, Fail(401, "Incorrect API key provided", code="invalid_api_key"))
        match method, path.partition("?")[0]:
            case "GET", "/v1/models":
                data = [{"id": name, "object": "model", "created": 0, "owned_by": "witness"} for name in self._models]
                return await _respond_json(writer, 200, {"object": "list", "data": data})
            case "GET", "/witness/calls":
                return await _respond_json(writer, 200, [_witness_entry(call) for call in self.calls])
            case "POST", "/v1/chat/completions":
                return await self._complete(writer, headers, body)
            case _:
                return await _respond_error(writer, Fail(404, f"no {method} {path} here"))

    async def _complete(self, writer: asyncio.StreamWriter, headers: Mapping[str, str], body: bytes) -> bool:
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            return await _respond_error(writer, Fail(400, f"the body is not JSON: {error}"))
        call = RecordedCall(len(self.calls) + 1, headers, parsed)
        self.calls.append(call)
        reply = self._scripted.pop(0) if self._scripted else self.rule(call)
        goes_on = await _play(writer, call, reply)
        call.completed = goes_on
        return goes_on


def _witness_entry(call: RecordedCall) -> dict[str, Any]:
    return {"turn": call.turn, "step": call.step, "dispatch": call.dispatch, "completed": call.completed}


async def _play(writer: asyncio.StreamWriter, call: RecordedCall, reply: Reply) -> bool:
    match reply:
        case Fail():
            return await _respond_error(writer, reply)
        case Hang(seconds):
            await asyncio.sleep(seconds)
            return False
        case Garbage(body, content_type):
            return await _respond(writer, 200, body, content_type)
        case Cut(text, words) if words == 0 or not call.body.get("stream"):
            return False
        case Cut(text, words):
            await _start_stream(writer)
            for piece in list(_words(text))[:words]:
                await _send_event(writer, _chunk(call, {"content": piece}))
            return False
        case Say() | CallTools():
            if call.body.get("stream"):
                return await _stream(writer, call, reply)
            return await _respond_json(writer, 200, _completion(call, reply))


async def _stream(writer: asyncio.StreamWriter, call: RecordedCall, reply: Say | CallTools) -> bool:
    await _start_stream(writer)
    delay_s = reply.delay_s if isinstance(reply, Say) else 0.0
    await _send_event(writer, _chunk(call, {"role": "assistant", "content": ""}))
    for piece in _words(reply.text):
        if delay_s:
            await asyncio.sleep(delay_s)
        await _send_event(writer, _chunk(call, {"content": piece}))
    for delta in _tool_call_deltas(call, reply):
        await _send_event(writer, _chunk(call, {"tool_calls": [delta]}))
    await _send_event(writer, _chunk(call, {}, finish_reason=_finish_reason(reply)))
    if (call.body.get("stream_options") or {}).get("include_usage"):
        await _send_event(writer, _chunk(call, None) | {"usage": _usage(call, reply)})
    await _write_chunk(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True


def _completion(call: RecordedCall, reply: Say | CallTools) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if isinstance(reply, CallTools):
        message["tool_calls"] = [_tool_call(call, index, request) for index, request in enumerate(reply.requests)]
    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(reply)}
    return _envelope(call, "chat.completion") | {"choices": [choice], "usage": _usage(call, reply)}


def _chunk(call: RecordedCall, delta: dict[str, Any] | None, finish_reason: str | None = None) -> dict[str, Any]:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return _envelope(call, "chat.completion.chunk") | {"choices": choices}


def _envelope(call: RecordedCall, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{call.number}", "object": kind, "created": 0, "model": call.body.get("model", "")}


def _tool_call(call: RecordedCall, index: int, request: ToolRequest) -> dict[str, Any]:
    arguments = request.arguments if isinstance(request.arguments, str) else orjson.dumps(request.arguments).decode()
    return {
        "id": request.call_id or f"call_{call.number}_{index}",
        "type": "function",
        "function": {"name": request.tool, "arguments": arguments},
    }


def _tool_call_deltas(call: RecordedCall, reply: Say | CallTools) -> Iterator[dict[str, Any]]:
    """Each call in pieces, as endpoints stream them: first id and name, then the arguments in two halves."""
    if isinstance(reply, Say):
        return
    for index, request in enumerate(reply.requests):
        whole = _tool_call(call, index, request)
        arguments = whole["function"]["arguments"]
        middle = len(arguments) // 2
        yield whole | {"index": index, "function": {"name": request.tool, "arguments": ""}}
        yield {"index": index, "function": {"arguments": arguments[:middle]}}
        yield {"index": index, "function": {"arguments": arguments[middle:]}}


def _finish_reason(reply: Say | CallTools) -> str:
    return "tool_calls" if isinstance(reply, CallTools) else "stop"


def _usage(call: RecordedCall, reply: Say | CallTools) -> dict[str, int]:
    """Tokens as this server counts them: words."""
    read = sum(len(str(message.get("content") or "").split()) for message in call.messages)
    written = len(reply.text.split())
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _words(text: str) -> Iterator[str]:
    """The text in pieces of a word with the blanks before it; joined they are the text."""
    return (match.group() for match in re.finditer(r"\s*\S+(?:\s+$)?|\s+$", text))


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes] | None:
    head = await _read_head(reader)
    if head is None:
        return None
    request_line, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = request_line.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    length = int(headers.get("content-length", "0"))
    if length > MAX_BODY_BYTES:
        return None
    return method, path, headers, await reader.readexactly(length)


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    """The request line and the headers; None when the client has closed between two requests."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        return await reader.readuntil(b"\r\n\r\n")
    return None


async def _respond_json(writer: asyncio.StreamWriter, status: int, value: object) -> bool:
    return await _respond(writer, status, orjson.dumps(value), "application/json")


async def _respond_error(writer: asyncio.StreamWriter, failure: Fail) -> bool:
    body = {"error": {"message": failure.message, "type": "scripted", "param": None, "code": failure.code}}
    extra = "" if failure.retry_after_s is None else f"retry-after: {failure.retry_after_s}\r\n"
    return await _respond(writer, failure.status, orjson.dumps(body), "application/json", extra)


async def _respond(writer: asyncio.StreamWriter, status: int, body: bytes, content_type: str, extra: str = "") -> bool:
    head = f"HTTP/1.1 {status} .\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    writer.write(head.encode("latin-1") + body)
    await writer.drain()
    return True


async def _start_stream(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    await writer.drain()


async def _send_event(writer: asyncio.StreamWriter, event: Mapping[str, Any]) -> None:
    await _write_chunk(writer, b"data: " + orjson.dumps(event) + b"\n\n")


async def _write_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode("latin-1") + data + b"\r\n")
    await writer.drain()
