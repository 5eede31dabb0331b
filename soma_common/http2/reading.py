"""The frames that come on a connection, and what each of them does (RFC 9113, section 6)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Final

from soma_common.http2 import frames
from soma_common.http2.connection import Connection, Keepalive
from soma_common.http2.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADER,
    HEADER_BYTES,
    LARGEST_STREAM,
    LARGEST_WINDOW,
    ConnectionFault,
    ErrorCode,
    StreamFault,
)
from soma_common.http2.headers import MAX_BLOCK_BYTES, TABLE_EMPTIED, HeaderReader, Headers, check_trailers
from soma_common.http2.limits import (
    CONNECTION_WINDOW,
    MAX_FRAGMENTS,
    MAX_FRAME,
    MAX_PARTS,
    MAX_SETTINGS_FRAMES,
    MAX_WASTED,
    SPELL_S,
    STREAM_WINDOW,
)
from soma_common.http2.stream import Stream, StreamLost


class ReadingConnection(Connection):
    """A connection that acts on what comes."""

    is_server: bool

    def __init__(self, keepalive: Keepalive, on_close: Callable[[Connection], None]) -> None:
        super().__init__(keepalive, on_close)
        self._rest = b""
        """The beginning of a frame."""
        self._reader = HeaderReader()
        self._block: tuple[int, int, list[bytes]] | None = None
        """Stream, flags and parts of a header block that goes on in CONTINUATION."""
        self._seen_settings = False
        self._spell_at = self._now()
        self._spell_first = 0
        """The highest stream when the present spell began."""
        self._wasted = self._settings_frames = 0

    def _take(self, data: bytes) -> None:
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, size = 0, len(data)
        while size - at >= HEADER_BYTES:
            length_and_kind, flags, number = HEADER.unpack_from(data, at)
            length = length_and_kind >> 8
            if length > MAX_FRAME:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            begin = at + HEADER_BYTES
            at = begin + length
            if at > size:
                at = begin - HEADER_BYTES
                break
            kind = length_and_kind & 0xFF
            number &= LARGEST_STREAM
            try:
                if kind == DATA and self._block is None and self._seen_settings:
                    self._on_data(number, flags, data[begin:at])
                else:
                    self._on_other(kind, number, flags, data[begin:at])
            except StreamFault as fault:
                self._on_fault(fault)
            if self.closed:
                return
        self._rest = data[at:] if at < size else b""

    def _on_other(self, kind: int, number: int, flags: int, payload: bytes) -> None:
        if not self._seen_settings and (kind != frames.SETTINGS or flags & ACK):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._block is not None and (kind != frames.CONTINUATION or number != self._block[0]):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a header block that does not go on")
        act = _ACTS.get(kind)
        if act is not None:  # of other types there may be any (section 5.5)
            act(self, number, flags, payload)

    def _on_data(self, number: int, flags: int, payload: bytes) -> None:
        size = len(payload)
        self._use_window(size)
        if flags & frames.PADDED:
            payload = frames.unpadded(payload, flags)
        stream = self.streams.get(number)
        if stream is None or stream.remote_ended:
            self._on_late(number, "DATA", size, ended=bool(flags & END_STREAM))
            return
        if flags & END_STREAM:
            stream.remote_ended = True
        stream.owe(size)
        if stream.awaited is not None:
            stream.awaited -= len(payload)
            if stream.awaited < 0 or (flags & END_STREAM and stream.awaited):
                raise StreamFault(number, ErrorCode.PROTOCOL_ERROR, "not as long as its content-length")
        if payload:
            stream.receiver.data_received(payload)
        elif not size and not flags & END_STREAM:
            self._count_waste()
        if flags & END_STREAM:
            self.end_remote(stream)

    def _use_window(self, size: int) -> None:
        self._receive_window -= size
        if self._receive_window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        self._owed += size
        self.credit()
        if self.parts > MAX_PARTS and self._owed >= CONNECTION_WINDOW // 4:
            largest = max(self.streams.values(), key=lambda stream: stream.kept)
            largest.lose(StreamLost(ErrorCode.ENHANCE_YOUR_CALM, "too many large messages are under way at once"))
            self.reset(largest, ErrorCode.ENHANCE_YOUR_CALM)

    def _on_late(self, number: int, what: str, size: int, *, ended: bool) -> None:
        """Something came on a stream on which nothing may come. Raises ConnectionFault, StreamFault."""
        if self._is_idle(number):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"{what} on stream {number}, which is not open")
        if number not in self._own_resets:
            raise StreamFault(number, ErrorCode.STREAM_CLOSED, f"{what} on a stream that is closed")
        self._discard(number, size, ended=ended)

    def _discard(self, number: int, size: int, *, ended: bool) -> None:
        """Drops what was under way when this end reset the stream (section 5.1): at most what its window had room for,
        and one end. Raises ConnectionFault for more.
        """
        if ended:
            del self._own_resets[number]
        elif size == 0:
            self._count_waste()
        else:
            left = self._own_resets[number] - size
            if left < 0:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than a stream's window")
            self._own_resets[number] = left

    def _is_idle(self, number: int) -> bool:
        """Whether a stream has never been opened."""
        return number > self.highest or number % 2 == 0

    def end_remote(self, stream: Stream) -> None:
        """The peer has nothing more to say on a stream."""
        stream.remote_ended = True
        if stream.lost is None:
            stream.receiver.end_received()
            if stream.local_ended:
                self.forget(stream)

    def _on_fault(self, fault: StreamFault) -> None:
        self._check_unread()
        stream = self.streams.get(fault.stream)
        if stream is None:
            self._count_waste()
            self._remember_reset(fault.stream, STREAM_WINDOW)
            self.write(frames.rst_stream(fault.stream, fault.code))
            return
        self._count_reset(fault.stream)
        stream.lose(StreamLost(fault.code, fault.why))
        self.reset(stream, fault.code)

    def _on_headers(self, number: int, flags: int, payload: bytes) -> None:
        if number == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "HEADERS on stream 0")
        try:
            block = frames.unprioritized(frames.unpadded(payload, flags), flags, number)
        except StreamFault as fault:  # without its block read the tables of both ends would differ
            raise ConnectionFault(fault.code, fault.why) from None
        self._gather_block(number, flags, [block])

    def _on_continuation(self, _number: int, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        number, first_flags, parts = self._block
        self._block = None
        self._gather_block(number, first_flags | flags & END_HEADERS, [*parts, payload])

    def _gather_block(self, number: int, flags: int, parts: list[bytes]) -> None:
        if sum(map(len, parts)) > MAX_BLOCK_BYTES or len(parts) > MAX_FRAGMENTS:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"headers of more than {MAX_BLOCK_BYTES} bytes")
        if not flags & END_HEADERS:
            self._block = (number, flags, parts)
            return
        headers = self._reader.read(b"".join(parts))  # also if nobody wants them: the table has to follow
        stream = self.streams.get(number)
        ended = bool(flags & END_STREAM)
        if stream is None:
            self._open(number, headers, ended=ended)
        elif stream.remote_ended:
            raise StreamFault(number, ErrorCode.STREAM_CLOSED, "HEADERS on a stream that was half-closed")
        else:
            self._on_more_headers(stream, headers, ended=ended)

    @abstractmethod
    def _open(self, number: int, headers: Headers, *, ended: bool) -> None:
        """The peer's headers on a stream that is not open."""

    def _on_more_headers(self, stream: Stream, headers: Headers, *, ended: bool) -> None:
        """Headers on an open stream: trailers, unless this end is a client's."""
        if not ended:
            raise StreamFault(stream.id, ErrorCode.PROTOCOL_ERROR, "trailers that do not end the stream")
        check_trailers(stream.id, headers)
        if stream.awaited:
            raise StreamFault(stream.id, ErrorCode.PROTOCOL_ERROR, "not as long as its content-length")
        stream.remote_ended = True
        stream.receiver.headers_received(headers)
        self.end_remote(stream)

    def _on_priority(self, number: int, _flags: int, payload: bytes) -> None:
        if number == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        frames.check_priority(payload, number)

    def _on_rst_stream(self, number: int, _flags: int, payload: bytes) -> None:
        code = frames.read_word(payload, "RST_STREAM")
        if number == 0 or self._is_idle(number):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM on stream {number}, which is not open")
        stream = self.streams.get(number)
        if stream is None:
            return
        self._count_reset(number)
        stream.lose(StreamLost(code, "reset by the peer"))
        self.forget(stream)

    def _count_reset(self, number: int) -> None:
        """Raises ConnectionFault if too many streams are opened for nothing. Old ones may go as many at a time as they
        please: a proxy has lost one of its clients.
        """
        self._begin_spell()
        if self.is_server and number > self._spell_first:
            self._count_waste()

    def _count_waste(self) -> None:
        """Raises ConnectionFault if too much comes to nothing."""
        self._begin_spell()
        self._wasted += 1
        if self._wasted > MAX_WASTED:
            raise ConnectionFault(
                ErrorCode.ENHANCE_YOUR_CALM, f"more than {MAX_WASTED} streams and frames for nothing in a second"
            )

    def _begin_spell(self) -> None:
        now = self._now()
        if now - self._spell_at > SPELL_S:
            self._spell_at, self._spell_first = now, self.highest
            self._wasted = self._settings_frames = 0

    def _on_settings(self, number: int, flags: int, payload: bytes) -> None:
        if number != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS that acknowledge and set")
            return
        self._begin_spell()
        self._settings_frames += 1
        if self._settings_frames > MAX_SETTINGS_FRAMES:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"more than {MAX_SETTINGS_FRAMES} SETTINGS in a second")
        for name, value in dict(frames.read_settings(payload)).items():
            self._apply(name, value)
        self._seen_settings = True
        self._check_unread()
        self.write(frames.frame(frames.SETTINGS, ACK, 0))

    def _apply(self, name: int, value: int) -> None:
        if name == frames.INITIAL_WINDOW_SIZE:
            more = value - self.first_send_window
            if not more:
                return
            self.first_send_window = value
            for stream in self.streams.values():
                stream.send_window += more
                if stream.send_window > LARGEST_WINDOW:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a window above 2^31-1")
                if stream.send_window - more <= 0 < stream.send_window:
                    stream.wake()
        elif name == frames.MAX_FRAME_SIZE:
            self.max_send_frame = min(value, MAX_FRAME)
        elif name == frames.MAX_HEADER_LIST_SIZE:
            self.max_send_headers = value
        elif name == frames.HEADER_TABLE_SIZE:
            self._block_prefix = TABLE_EMPTIED

    def _on_push_promise(self, _number: int, _flags: int, _payload: bytes) -> None:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE, which nobody asked for")

    def _on_ping(self, number: int, flags: int, payload: bytes) -> None:
        if number != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
        if not flags & ACK:
            self._check_unread()
            self.write(frames.frame(frames.PING, ACK, 0, payload))

    def _on_goaway(self, number: int, _flags: int, payload: bytes) -> None:
        if number != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        last, code, why = frames.read_goaway(payload)
        self._gone_away(last, code, why)

    def _gone_away(self, last: int, code: int, why: str) -> None:
        """The peer lets no stream begin any more. A server opens none."""

    def _on_window_update(self, number: int, _flags: int, payload: bytes) -> None:
        more = frames.read_word(payload, "WINDOW_UPDATE") & LARGEST_WINDOW
        if number == 0:
            if more == 0:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            self.send_window += more
            if self.send_window > LARGEST_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a window above 2^31-1")
            self.pass_on()
        else:
            if self._is_idle(number):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"WINDOW_UPDATE on stream {number}, which is not open")
            if more == 0:
                raise StreamFault(number, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            stream = self.streams.get(number)
            if stream is None:
                return
            stream.send_window += more
            if stream.send_window > LARGEST_WINDOW:
                raise StreamFault(number, ErrorCode.FLOW_CONTROL_ERROR, "a window above 2^31-1")
            if stream.send_window - more <= 0 < stream.send_window:
                stream.wake()


_ACTS: Final[dict[int, Callable[[ReadingConnection, int, int, bytes], None]]] = {
    frames.DATA: ReadingConnection._on_data,
    frames.HEADERS: ReadingConnection._on_headers,
    frames.PRIORITY: ReadingConnection._on_priority,
    frames.RST_STREAM: ReadingConnection._on_rst_stream,
    frames.SETTINGS: ReadingConnection._on_settings,
    frames.PUSH_PROMISE: ReadingConnection._on_push_promise,
    frames.PING: ReadingConnection._on_ping,
    frames.GOAWAY: ReadingConnection._on_goaway,
    frames.WINDOW_UPDATE: ReadingConnection._on_window_update,
    frames.CONTINUATION: ReadingConnection._on_continuation,
}
