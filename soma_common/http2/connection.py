"""One HTTP/2 connection, of either end: frames, settings, flow control, keepalive and the ends of streams.

What streams carry is their receivers' business. Everything a peer can make grow is bounded: what a stream holds unread
by its window, header blocks, answers to its pings by what it leaves unread, and streams that it only opens and resets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, cast

import structlog

from soma_common.http2 import frames
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
from soma_common.telemetry.metrics import counter

STREAM_WINDOW: Final = 1024 * 1024
"""What a peer may send on a stream beyond what was credited; half of it may lie unread before credit ends."""
CONNECTION_WINDOW: Final = 16 * 1024 * 1024
"""For all streams together: large enough that one which nobody reads leaves room for the others."""
MAX_UNREAD: Final = 128 * 1024 * 1024
"""Bytes of all streams that may lie unread or wait for the rest of their message, before the connection's credit ends.
"""
MAX_PARTS: Final = MAX_UNREAD * 3 // 4
"""Of these, bytes that wait for the rest of their message. Only more bytes can make an end of them, so that beyond this
the stream with the most of them is reset when credit ends."""
MAX_STREAMS: Final = 10_000
MAX_FRAME: Final = 64 * 1024
MAX_UNREAD_ANSWERS: Final = 4 * 1024 * 1024
"""Bytes that a peer may leave unread while it still asks for answers (pings, settings, requests that are refused)."""
MAX_RESETS: Final = 2_000
"""Streams that may be opened within `SPELL_S` and reset within it, by the peer (CVE-2023-44487) or because of what it
did (CVE-2025-8671)."""
MAX_SETTINGS_FRAMES: Final = 20
"""Within `SPELL_S`: each may change the window of every stream."""
SPELL_S: Final = 1.0
MAX_FRAGMENTS: Final = 64
"""Frames that a header block may come in (CVE-2024-27983 and others)."""
CLOSE_S: Final = 5.0
"""How long the last words may take to leave."""
MAX_DISCARDED: Final = 1024 * 1024
"""Bytes that are read meanwhile for nothing."""
REMEMBERED: Final = 4 * 1024
"""Streams that are over, to tell what was still under way on them from what is wrong."""
_COPIED_BYTES: Final = 64 * 1024
"""Larger payloads are not copied behind their frame's header."""

_faults = counter("soma_http2_faults_total", "Connections ended because the peer broke a rule of HTTP/2.", ["code"])
_silent = counter("soma_http2_silent_peers_total", "Connections ended because the peer gave no sign of life.")
_log = structlog.get_logger(__name__)


class StreamLost(Exception):
    """The stream is over: `code` says how it was reset, None that the connection went."""

    def __init__(self, code: int | None, why: str, *, given_up: bool = False) -> None:
        """`given_up`: this end's own sender was cancelled in the middle of a message."""
        super().__init__(why)
        self.code, self.why, self.given_up = code, why, given_up


class Receiver(Protocol):
    """Who gets what comes on a stream. None of it may block."""

    def headers_received(self, headers: Headers) -> None:
        """The headers of a response, or trailers."""

    def data_received(self, data: bytes) -> None:
        """Bytes of the message, as they came."""

    def end_received(self) -> None:
        """The peer has nothing more to say."""

    def stream_lost(self, lost: StreamLost) -> None:
        """The stream was reset or its connection is gone. Nothing follows."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """After `after_s` of silence the peer is asked for a sign of life, and given `timeout_s` for it."""

    after_s: float
    timeout_s: float


class Stream:
    """One stream of a connection. `receiver` is set by whoever opens or accepts it."""

    __slots__ = (
        "_connection",
        "_held",
        "_owed",
        "_sending",
        "_waiter",
        "awaited",
        "id",
        "kept",
        "local_ended",
        "lost",
        "queued",
        "receive_window",
        "receiver",
        "remote_ended",
        "send_window",
    )

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self.id = number
        self.receiver: Receiver
        self.send_window = connection.first_send_window
        self.receive_window = STREAM_WINDOW
        self.awaited: int | None = None
        """Bytes that are still to come by the message's own content-length; None: it has none."""
        self.local_ended = False
        self.remote_ended = False
        self.lost: StreamLost | None = None
        self.queued = False
        """It stands in the connection's queue of senders."""
        self._owed = 0
        self._held = 0
        self.kept = 0
        """Bytes that wait for the rest of their message."""
        self._sending: asyncio.Lock | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def peer(self) -> str:
        """Address of the other end."""
        return self._connection.peer

    @property
    def max_send_headers(self) -> int | None:
        """Bytes that a header block may decode to; None: the peer does not say."""
        return self._connection.max_send_headers

    def send_headers(self, block: bytes, *, end: bool = False) -> None:
        """Sends a header block; nothing if the stream is lost."""
        if self.lost is None:
            self._connection.send_headers(self, block, end=end)
            if end:
                self._end_local()

    def try_send(self, head: bytes, data: bytes) -> bool:
        """Sends `head` and `data` if they may go at once and whole; False: `send` is to wait for room."""
        size = len(head) + len(data)
        connection = self._connection
        if (
            size > self.send_window
            or size > connection.send_window
            or size > connection.max_send_frame
            or connection.blocked
            or connection.queue
            or self._sending is not None
            or not self._is_open
        ):
            return False
        self.send_window -= size
        connection.send_window -= size
        connection.write_data(self.id, head, data)
        return True

    async def send(self, data: bytes) -> None:
        """Sends data as the peer has room for it. Raises StreamLost."""
        while self._sending is not None:  # one message after the other
            async with self._sending:
                pass
        lock = self._sending = asyncio.Lock()
        try:
            async with lock:
                await self._send_in_parts(data)
        finally:
            self._sending = None
            self._connection.pass_on()

    async def _send_in_parts(self, data: bytes) -> None:
        connection = self._connection
        at, size = 0, len(data)
        while at < size:
            while self._is_open and (connection.blocked or self.send_window <= 0 or connection.send_window <= 0):
                try:
                    await self._room()
                except asyncio.CancelledError:
                    if at:  # what would follow could not be told from the rest of this
                        self.lose(StreamLost(ErrorCode.CANCEL, "given up in the middle of a message", given_up=True))
                        connection.reset(self, ErrorCode.CANCEL)
                    raise
            if not self._is_open:
                lost = self.lost or StreamLost(None, "the stream has ended")
                raise StreamLost(lost.code, lost.why)
            part = min(size - at, self.send_window, connection.send_window, connection.max_send_frame)
            self.send_window -= part
            connection.send_window -= part
            connection.write_data(self.id, b"", data[at : at + part])
            at += part

    @property
    def _is_open(self) -> bool:
        """Whether anything may still be sent."""
        return self.lost is None and not self.local_ended and not self._connection.closed

    async def _room(self) -> None:
        """Returns when there may be room, or the stream is over."""
        connection = self._connection
        if self.send_window <= 0:
            connection.pass_on()  # the room that the connection has is for others
        elif not self.queued:  # it is the connection or its socket that has no room
            self.queued = True
            connection.queue.append(self)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> bool:
        """Has a waiting sender look again; False: nobody waits."""
        if self._waiter is None or self._waiter.done():
            return False
        self._waiter.set_result(None)
        return True

    def end(self) -> None:
        """Says that nothing more will be sent."""
        if self.lost is None and not self.local_ended:
            self._connection.write(HEADER.pack(DATA, END_STREAM, self.id))
            self._end_local()

    def reset(self, code: ErrorCode) -> None:
        """Ends the stream at once, both ways. The receiver hears nothing more."""
        if self.lost is None:
            self.lost = StreamLost(code, "reset by this end")
            self.wake()
            self._connection.reset(self, code)

    def hold(self, size: int) -> None:
        """So many bytes lie unread."""
        self._held += size
        self._connection.unread += size

    def keep(self, size: int) -> None:
        """So many bytes wait for the rest of their message. They do not end the stream's credit: it has to come."""
        self._connection.unread += size - self.kept
        self._connection.parts += size - self.kept
        self.kept = size

    def release(self, size: int) -> None:
        """So many of the bytes that lay unread have been read, or nobody wants them any more."""
        size = min(size, self._held)
        self._held -= size
        self._connection.unread -= size
        self._connection.credit()
        if self._owed >= STREAM_WINDOW // 2 >= self._held:
            self._credit()

    def owe(self, size: int) -> None:
        """So many bytes of the window were used. Raises StreamFault if there were not so many."""
        self.receive_window -= size
        if self.receive_window < 0:
            raise StreamFault(self.id, ErrorCode.FLOW_CONTROL_ERROR, "more data than the stream's window")
        self._owed += size
        if self._owed >= STREAM_WINDOW // 2 >= self._held:
            self._credit()

    def discharge(self) -> None:
        """The stream is over: what it holds is no longer the connection's business."""
        self._connection.unread -= self._held + self.kept
        self._connection.parts -= self.kept
        self._held = self.kept = 0
        self._connection.credit()

    def _credit(self) -> None:
        if not self.remote_ended and self.lost is None:
            owed, self._owed = self._owed, 0
            self.receive_window += owed
            self._connection.write(frames.window_update(self.id, owed))

    def lose(self, lost: StreamLost) -> None:
        """The peer or the connection has ended it."""
        if self.lost is None:
            self.lost = lost
            self.wake()
            try:
                self.receiver.stream_lost(lost)
            except Exception:  # noqa: BLE001 - boundary: the other streams have to hear of it too
                _log.exception("http2.receiver_failed", stream=self.id)

    def _end_local(self) -> None:
        self.local_ended = True
        self.wake()
        if self.remote_ended:
            self._connection.forget(self)


class Connection(asyncio.Protocol):
    """What both ends have in common."""

    is_server: bool

    def __init__(self, keepalive: Keepalive, on_close: Callable[[Connection], None]) -> None:
        self._keepalive = keepalive
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._reader = HeaderReader()
        self._block: tuple[int, int, list[bytes]] | None = None
        """Stream, flags and parts of a header block that goes on in CONTINUATION."""
        self._block_prefix = b""
        self._seen_settings = False
        self._discarded = 0
        self._owed = 0
        self._receive_window = CONNECTION_WINDOW
        self._spell_at = self._now()
        self._spell_first = 0
        """The highest stream when the present spell began."""
        self._resets = self._settings_frames = 0
        self._own_resets: deque[int] = deque(maxlen=REMEMBERED)
        self._ended: deque[int] = deque(maxlen=REMEMBERED)
        self._heard_at = self._now()
        self._timer: asyncio.TimerHandle | None = None
        self._asked_at: float | None = None
        """When the peer was asked for a sign of life; None: it gave one since."""
        self.streams: dict[int, Stream] = {}
        self.queue: deque[Stream] = deque()
        """Senders that wait for the connection's window or its socket, the first one first."""
        self.unread = 0
        """Bytes of all streams that lie unread."""
        self.parts = 0
        """Of these, bytes that wait for the rest of their message."""
        self.highest = 0
        """The highest stream that the peer (of a server) or this end (of a client) has opened."""
        self.send_window = frames.FIRST_WINDOW
        self.first_send_window = frames.FIRST_WINDOW
        self.max_send_frame = frames.SMALLEST_MAX_FRAME
        self.max_send_headers: int | None = None
        """Bytes that a header block may decode to; None: the peer does not say."""
        self.blocked = False
        """The socket takes no more for now."""
        self.closing: str | None = None
        """Why no stream may be opened any more."""
        self.closed = False

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.closed:
            self._transport.abort()
            return
        self._heard_at = self._now()
        self._greet()
        self._timer = self._loop.call_later(self._keepalive.after_s, self._check_life)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._now()
        if self.closed:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED and self._transport is not None:
                self._transport.abort()
            return
        if self._rest:
            data = self._rest + data
            self._rest = b""
        try:
            self._take(data)
        except ConnectionFault as fault:
            self.fail(fault.code, fault.why)

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        self.pass_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._over("the connection was lost" if exc is None else f"the connection was lost: {exc}")
        self._on_close(self)

    def _greet(self) -> None:
        """Says hello in the way of this end."""
        raise NotImplementedError

    # --- what others ask for

    @property
    def peer(self) -> str:
        """Address of the other end."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "")

    def write(self, data: bytes) -> None:
        """Sends whole frames; nothing on a connection that is gone."""
        transport = self._transport
        if transport is None or self.closed:
            return
        if transport.is_closing():  # its end has not been told yet: whoever has more to send waits for that
            self.blocked = True
        else:
            transport.write(data)

    def write_data(self, stream: int, head: bytes, data: bytes) -> None:
        """Sends a DATA frame of `head` and `data`, for which there is room."""
        size = len(data)
        head = HEADER.pack(size + len(head) << 8, 0, stream) + head
        if size < _COPIED_BYTES:
            self.write(head + data)
        else:
            self.write(head)
            self.write(data)

    def send_headers(self, stream: Stream, block: bytes, *, end: bool) -> None:
        """Sends a header block, in as many frames as the peer wants it in."""
        if self._block_prefix:
            block, self._block_prefix = self._block_prefix + block, b""
        flags = END_STREAM if end else 0
        most = self.max_send_frame
        if len(block) <= most:
            self.write(frames.frame(frames.HEADERS, flags | END_HEADERS, stream.id, block))
            return
        parts = [block[at : at + most] for at in range(0, len(block), most)]
        out = [frames.frame(frames.HEADERS, flags, stream.id, parts[0])]
        out += [frames.frame(frames.CONTINUATION, 0, stream.id, part) for part in parts[1:-1]]
        out.append(frames.frame(frames.CONTINUATION, END_HEADERS, stream.id, parts[-1]))
        self.write(b"".join(out))

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """Resets a stream that is not lost yet; nothing if it is over."""
        if stream.id not in self.streams:
            return
        if not stream.remote_ended:
            self._own_resets.append(stream.id)
        self.write(frames.rst_stream(stream.id, code))
        self.forget(stream)

    def forget(self, stream: Stream) -> None:
        """The stream is over."""
        if self.streams.pop(stream.id, None) is not None:
            self._ended.append(stream.id)
            stream.discharge()
        if self.closing is not None and not self.streams:
            self.close(linger=True)

    def pass_on(self) -> None:
        """Wakes the next sender that waits, if there is room. It calls this again when it is done."""
        while self.queue and not self.blocked and self.send_window > 0:
            stream = self.queue.popleft()
            stream.queued = False
            if stream.send_window > 0 and stream.wake():
                return

    def credit(self) -> None:
        """Gives back what was used of the connection's window, unless too much lies unread."""
        if self._owed >= CONNECTION_WINDOW // 4 and self.unread <= MAX_UNREAD:
            self.write(frames.window_update(0, self._owed))
            self._receive_window += self._owed
            self._owed = 0

    def go_away(self, why: str) -> None:
        """Lets no stream begin any more; the connection closes when the last one is over."""
        if self.closing is None and not self.closed:
            self.closing = why
            self.write(frames.goaway(self.highest if self.is_server else 0, ErrorCode.NO_ERROR, why))
            if not self.streams:
                self.close(linger=True)

    def fail(self, code: ErrorCode, why: str) -> None:
        """Ends the connection because of what the peer did."""
        _faults.labels(code.name).inc()
        _log.info("http2.connection_ended", peer=self.peer, code=code.name, why=why)
        self.write(frames.goaway(self.highest if self.is_server else 0, code, why))
        self.close(why, linger=True)

    def close(self, why: str = "the connection was closed", *, linger: bool = False) -> None:
        """Ends the connection; what was written still leaves. With `linger` the socket stays open for as long as the
        peer may need to read it: to close one on which something lies unread throws away what is on its way.
        """
        self._over(why)
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        try:
            if linger:
                transport.write_eof()  # the peer's answer to it, its own end, closes the transport
        except OSError:  # the peer is gone
            linger = False
        if not linger:
            transport.close()
        self._loop.call_later(CLOSE_S, transport.abort)

    def _over(self, why: str) -> None:
        if self.closed:
            return
        self.closed = True
        self.closing = self.closing or why
        if self._timer is not None:
            self._timer.cancel()
        streams, self.streams = list(self.streams.values()), {}
        for stream in streams:
            stream.lose(StreamLost(None, why))
        while self.queue:
            self.queue.popleft().wake()

    # --- frames

    def _take(self, data: bytes) -> None:
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
            self._on_late(number, "DATA")
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

    def _on_late(self, number: int, what: str) -> None:
        """Something came on a stream on which nothing may come."""
        if self._is_idle(number):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"{what} on stream {number}, which is not open")
        if number not in self._own_resets:
            raise StreamFault(number, ErrorCode.STREAM_CLOSED, f"{what} on a stream that is closed")

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
        self._count_reset(fault.stream)
        stream = self.streams.get(fault.stream)
        if stream is None:
            self._own_resets.append(fault.stream)
            self.write(frames.rst_stream(fault.stream, fault.code))
            return
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

    def _open(self, number: int, headers: Headers, *, ended: bool) -> None:
        """The peer's headers on a stream that is not open."""
        raise NotImplementedError

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
            self._resets += 1
            if self._resets > MAX_RESETS:
                raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"more than {MAX_RESETS} streams opened and reset")

    def _begin_spell(self) -> None:
        now = self._now()
        if now - self._spell_at > SPELL_S:
            self._spell_at, self._spell_first = now, self.highest
            self._resets = self._settings_frames = 0

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

    # --- bounds and life

    def _check_unread(self) -> None:
        """Raises ConnectionFault if the peer asks for answers and does not read them."""
        if self._transport is not None and self._transport.get_write_buffer_size() > MAX_UNREAD_ANSWERS:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "answers are asked for and not read")

    def _check_life(self) -> None:
        silent_s = self._now() - self._heard_at
        left_s = self._keepalive.after_s - silent_s
        if left_s > 0 or (self._asked_at is not None and self._heard_at >= self._asked_at):
            self._asked_at = None
            self._timer = self._loop.call_later(max(left_s, 0.0), self._check_life)
        elif self._asked_at is None:
            self._asked_at = self._now()
            self.write(frames.frame(frames.PING, 0, 0, b"alive?\r\n"))
            self._timer = self._loop.call_later(self._keepalive.timeout_s, self._check_life)
        else:
            _silent.inc()
            _log.info("http2.peer_silent", peer=self.peer, silent_s=round(silent_s, 1))
            self._over(f"the peer was silent for {silent_s:.1f} s")
            if self._transport is not None:
                self._transport.abort()


_ACTS: Final[dict[int, Callable[[Connection, int, int, bytes], None]]] = {
    frames.DATA: Connection._on_data,
    frames.HEADERS: Connection._on_headers,
    frames.PRIORITY: Connection._on_priority,
    frames.RST_STREAM: Connection._on_rst_stream,
    frames.SETTINGS: Connection._on_settings,
    frames.PUSH_PROMISE: Connection._on_push_promise,
    frames.PING: Connection._on_ping,
    frames.GOAWAY: Connection._on_goaway,
    frames.WINDOW_UPDATE: Connection._on_window_update,
    frames.CONTINUATION: Connection._on_continuation,
}
