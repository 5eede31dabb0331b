"""The server's end of an HTTP/2 connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from soma_common.http2 import frames
from soma_common.http2.connection import Connection, Keepalive
from soma_common.http2.frames import PREFACE, ConnectionFault, ErrorCode, StreamFault
from soma_common.http2.headers import MAX_BLOCK_BYTES, Headers, check_request, content_length, list_size
from soma_common.http2.limits import CONNECTION_WINDOW, MAX_FRAME, MAX_HEADER_BYTES, MAX_STREAMS, STREAM_WINDOW
from soma_common.http2.reading import ReadingConnection
from soma_common.http2.stream import Stream

_GREETING: Final = frames.settings(
    {
        frames.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
        frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
        frames.MAX_FRAME_SIZE: MAX_FRAME,
        frames.MAX_HEADER_LIST_SIZE: MAX_BLOCK_BYTES,
    }
) + frames.window_update(0, CONNECTION_WINDOW - frames.FIRST_WINDOW)


class ServerConnection(ReadingConnection):
    """Takes requests: `accept(stream, headers)` sets the stream's receiver."""

    is_server = True

    def __init__(
        self,
        keepalive: Keepalive,
        on_close: Callable[[Connection], None],
        accept: Callable[[Stream, Headers], None],
    ) -> None:
        super().__init__(keepalive, on_close)
        self._accept = accept
        self._preface = b""
        self._is_client_known = False

    def data_received(self, data: bytes) -> None:
        if self._is_client_known or self.closed:
            super().data_received(data)
            return
        self._preface += data
        if not PREFACE.startswith(self._preface[: len(PREFACE)]):
            self.fail(ErrorCode.PROTOCOL_ERROR, "not HTTP/2: the client's preface is missing")
        elif len(self._preface) >= len(PREFACE):
            self._is_client_known = True
            rest, self._preface = self._preface[len(PREFACE) :], b""
            super().data_received(rest)

    def _greet(self) -> None:
        self.write(_GREETING)

    def _open(self, number: int, headers: Headers, *, ended: bool) -> None:
        if number % 2 == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client cannot open stream {number}")
        if number <= self.highest:
            if number in self._own_resets:
                self._discard(number, 0, ended=ended)
                return
            code = ErrorCode.STREAM_CLOSED if number in self._ended else ErrorCode.PROTOCOL_ERROR
            raise ConnectionFault(code, f"HEADERS on stream {number}, which is over")
        self.highest = number
        stream = Stream(self, number)
        if self.closing is not None or len(self.streams) >= MAX_STREAMS:
            raise StreamFault(number, ErrorCode.REFUSED_STREAM, self.closing or "too many streams")
        stream.header_bytes = list_size(headers)
        if self.header_bytes + stream.header_bytes > MAX_HEADER_BYTES:
            raise StreamFault(number, ErrorCode.REFUSED_STREAM, "too many headers on all streams")
        self._check_unread()
        check_request(number, headers)
        stream.awaited = content_length(number, headers)
        if ended and stream.awaited:
            raise StreamFault(number, ErrorCode.PROTOCOL_ERROR, "not as long as its content-length")
        self.streams[number] = stream
        self.header_bytes += stream.header_bytes
        stream.remote_ended = ended
        self._accept(stream, headers)
        if number not in self.streams:  # refused: it never counts among the open ones, whose number is bounded
            self._count_reset(number)
        elif ended:
            self.end_remote(stream)
