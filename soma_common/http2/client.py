"""The client's end of an HTTP/2 connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from soma_common.http2 import frames
from soma_common.http2.connection import Connection, Keepalive
from soma_common.http2.frames import LARGEST_STREAM, PREFACE, ConnectionFault, ErrorCode
from soma_common.http2.headers import MAX_BLOCK_BYTES, Headers
from soma_common.http2.limits import CONNECTION_WINDOW, MAX_FRAME, STREAM_WINDOW
from soma_common.http2.reading import ReadingConnection
from soma_common.http2.stream import Receiver, Stream, StreamLost

_GREETING: Final = (
    PREFACE
    + frames.settings(
        {
            frames.ENABLE_PUSH: 0,
            frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            frames.MAX_FRAME_SIZE: MAX_FRAME,
            frames.MAX_HEADER_LIST_SIZE: MAX_BLOCK_BYTES,
        }
    )
    + frames.window_update(0, CONNECTION_WINDOW - frames.FIRST_WINDOW)
)


class ClientConnection(ReadingConnection):
    """Opens streams."""

    is_server = False

    def __init__(self, keepalive: Keepalive, authority: str, on_close: Callable[[Connection], None]) -> None:
        """`authority` is what the peer is called by."""
        super().__init__(keepalive, on_close)
        self.authority = authority
        self._next_stream = 1

    def open(self, receiver: Receiver, block: bytes) -> Stream:
        """Opens a stream with the headers of a request. Raises StreamLost when no stream may be opened any more."""
        if self.closing is not None or self._next_stream > LARGEST_STREAM:
            raise StreamLost(None, self.closing or "all streams of the connection are used up")
        stream = Stream(self, self._next_stream)
        stream.receiver = receiver
        self.highest = stream.id
        self._next_stream += 2
        self.streams[stream.id] = stream
        stream.send_headers(block)
        return stream

    def _greet(self) -> None:
        self.write(_GREETING)

    def _open(self, number: int, headers: Headers, *, ended: bool) -> None:
        self._on_late(number, "HEADERS", 0, ended=ended)

    def _on_more_headers(self, stream: Stream, headers: Headers, *, ended: bool) -> None:
        # What is the response and what its trailers, the receiver tells apart.
        stream.remote_ended = ended
        stream.receiver.headers_received(headers)
        if ended:
            self.end_remote(stream)

    def _gone_away(self, last: int, code: int, why: str) -> None:
        reason = why or "the server is going away"
        self.closing = self.closing or reason
        for number, stream in list(self.streams.items()):
            if number > last:
                stream.lose(StreamLost(ErrorCode.REFUSED_STREAM, reason))
                self.forget(stream)
        if code != ErrorCode.NO_ERROR:
            raise ConnectionFault(ErrorCode.NO_ERROR, f"the server ended the connection: {reason}")
        if not self.streams:
            self.close(reason)


async def connect(address: tuple[str, int], keepalive: Keepalive, authority: str) -> ClientConnection:
    """A connection to an address. Raises OSError; the caller bounds the time."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: ClientConnection(keepalive, authority, _unnoticed), *address)
    return connection


async def resolve(host: str, port: int) -> list[tuple[str, int]]:
    """All addresses of a host. Raises OSError; the caller bounds the time."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((str(where[0]), int(where[1])) for *_, where in found))


def _unnoticed(_connection: Connection) -> None:
    """Those who use the connection hear of its end through their streams."""
