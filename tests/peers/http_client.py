"""Two small HTTP clients, so that the load takes little of the cores that it shares with what it measures.

HTTP/1.1 keeps a connection alive and has one request under way on each; HTTP/2 (prior knowledge, clear text) has many
under way on each. They know what the peers answer with: a status and a body of a known length.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol, cast

_WINDOW = 2**30  # granted to the peer once: more than it answers in a run


class Connection(Protocol):
    """One connection that posts and gets."""

    async def request(self, method: str, path: str, key: str, body: bytes) -> tuple[int, bytes]:
        """Send one request with an idempotency key (none when empty), return status and body."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


async def connect(port: int, *, http2: bool) -> Connection:
    """A connection to a peer on this machine."""
    loop = asyncio.get_running_loop()
    kind = _Http2 if http2 else _Http1
    _, protocol = await loop.create_connection(lambda: kind(port), "127.0.0.1", port)
    return protocol


class _Http1(asyncio.Protocol):
    """One request at a time; a further one waits for its turn."""

    def __init__(self, port: int) -> None:
        self._host = f"127.0.0.1:{port}"
        self._buffer = b""
        self._answers: deque[asyncio.Future[tuple[int, bytes]]] = deque()
        self._free = asyncio.Lock()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def request(self, method: str, path: str, key: str, body: bytes) -> tuple[int, bytes]:
        named = f"idempotency-key: {key}\r\n" if key else ""
        typed = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if method == "POST" else ""
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\n{named}{typed}\r\n"
        async with self._free:
            answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
            self._answers.append(answer)
            self._transport.write(head.encode() + body)
            return await answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while self._answers:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            if at < 0:
                self._answers.popleft().set_exception(ConnectionError(f"an answer without a length: {head!r}"))
                return
            length = int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            self._answers.popleft().set_result((int(head[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        while self._answers:
            self._answers.popleft().set_exception(exc or ConnectionError("the peer closed the connection"))

    def close(self) -> None:
        self._transport.close()


_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 0x1
_END_HEADERS = 0x4
_STATUS_200 = 0x88  # ":status: 200" of HPACK's static table


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _text(text: str) -> bytes:
    """A string of HPACK, not compressed; longer ones than 126 bytes are not sent here."""
    raw = text.encode()
    assert len(raw) < 127
    return bytes((len(raw),)) + raw


class _Http2(asyncio.Protocol):
    """Streams of one connection. Of the answers' headers only "200" is understood: the peer is told to keep no
    table."""

    def __init__(self, port: int) -> None:
        self._host = f"127.0.0.1:{port}"
        self._buffer = b""
        self._next = 1
        self._window = 65_535
        self._streams: dict[int, tuple[asyncio.Future[tuple[int, bytes]], bytearray]] = {}
        self._ok: set[int] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        settings = b"".join(
            number.to_bytes(2, "big") + value.to_bytes(4, "big") for number, value in ((1, 0), (2, 0), (4, _WINDOW))
        )
        self._transport.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_UPDATE, 0, 0, _WINDOW.to_bytes(4, "big"))
        )

    async def request(self, method: str, path: str, key: str, body: bytes) -> tuple[int, bytes]:
        stream, self._next = self._next, self._next + 2
        self._window -= len(body)
        if self._window < 0:
            raise ConnectionError("the peer's window is used up: more is under way than this client is made for")
        headers = b"\x83" if method == "POST" else b"\x82"
        headers += b"\x86\x04" + _text(path) + b"\x01" + _text(self._host)
        if body:
            headers += b"\x0f\x10" + _text("application/json")
        if key:
            headers += b"\x00" + _text("idempotency-key") + _text(key)
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._streams[stream] = (answer, bytearray())
        if body:
            sent = _frame(_HEADERS, _END_HEADERS, stream, headers) + _frame(_DATA, _END_STREAM, stream, body)
        else:
            sent = _frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, headers)
        self._transport.write(sent)
        return await answer

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        at = 0
        while len(buffer) - at >= 9:
            end = at + 9 + int.from_bytes(buffer[at : at + 3], "big")
            if len(buffer) < end:
                break
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big") & 0x7FFFFFFF
            self._received(buffer[at + 3], buffer[at + 4], stream, buffer[at + 9 : end])
            at = end
        self._buffer = buffer[at:]

    def _received(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == _HEADERS:
            # The peer may first say that its table has become empty.
            if payload.lstrip(b"\x20")[:1] == bytes((_STATUS_200,)):
                self._ok.add(stream)
        elif kind == _DATA and stream in self._streams:
            self._streams[stream][1].extend(payload)
        elif kind == _RESET and stream in self._streams:
            self._streams.pop(stream)[0].set_exception(ConnectionError("the peer reset the stream"))
        elif kind == _GOAWAY:
            self._transport.close()
        if kind in (_DATA, _HEADERS) and flags & _END_STREAM and stream in self._streams:
            answer, body = self._streams.pop(stream)
            answer.set_result((200 if stream in self._ok else 500, bytes(body)))
            self._ok.discard(stream)

    def connection_lost(self, exc: Exception | None) -> None:
        for answer, _ in self._streams.values():
            answer.set_exception(exc or ConnectionError("the peer closed the connection"))
        self._streams.clear()

    def close(self) -> None:
        self._transport.close()
