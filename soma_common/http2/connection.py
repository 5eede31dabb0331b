"""One HTTP/2 connection, of either end: its transport, what it sends, its windows, its life and its end.

What streams carry is their receivers' business. Everything a peer can make grow is bounded (limits.py).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

import structlog

from soma_common.http2 import frames
from soma_common.http2.frames import END_HEADERS, END_STREAM, HEADER, LARGEST_STREAM, ConnectionFault, ErrorCode
from soma_common.http2.limits import (
    CLOSE_S,
    CONNECTION_WINDOW,
    MAX_DISCARDED,
    MAX_OWN_RESETS,
    MAX_UNREAD,
    MAX_UNREAD_ANSWERS,
    REMEMBERED,
)
from soma_common.http2.stream import Stream, StreamLost
from soma_common.telemetry.metrics import counter

_COPIED_BYTES: Final = 64 * 1024
"""Larger payloads are not copied behind their frame's header."""

_faults = counter("soma_http2_faults_total", "Connections ended because the peer broke a rule of HTTP/2.", ["code"])
_silent = counter("soma_http2_silent_peers_total", "Connections ended because the peer gave no sign of life.")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Keepalive:
    """After `after_s` of silence the peer is asked for a sign of life, and given `timeout_s` for it."""

    after_s: float
    timeout_s: float


class Connection(asyncio.Protocol, ABC):
    """What both ends have in common, but for the frames that come (reading.py)."""

    is_server: bool

    def __init__(self, keepalive: Keepalive, on_close: Callable[[Connection], None]) -> None:
        self._keepalive = keepalive
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._transport: asyncio.Transport | None = None
        self._block_prefix = b""
        """Stands before the next header block."""
        self._discarded = 0
        self._owed = 0
        self._receive_window = CONNECTION_WINDOW
        self._own_resets: OrderedDict[int, int] = OrderedDict()
        """Streams that this end has reset, and the bytes of DATA that may still be under way on each."""
        self._ended: deque[int] = deque(maxlen=REMEMBERED)
        self._last_told = LARGEST_STREAM
        """The last stream of the latest GOAWAY."""
        self._heard_at = self._now()
        self._timer: asyncio.TimerHandle | None = None
        self._asked_at: float | None = None
        """When the peer was asked for a sign of life; None: it gave one since."""
        self.streams: dict[int, Stream] = {}
        self.queue: OrderedDict[Stream, None] = OrderedDict()
        """Senders that wait for the connection's window or its socket, the first one first. None of them is over."""
        self.unread = 0
        """Bytes of all streams that lie unread."""
        self.parts = 0
        """Of these, bytes that wait for the rest of their message."""
        self.header_bytes = 0
        """Bytes of the headers of all streams' requests, decoded."""
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

    @abstractmethod
    def _take(self, data: bytes) -> None:
        """Acts on what has come. Raises ConnectionFault."""

    @abstractmethod
    def _greet(self) -> None:
        """Says hello in the way of this end."""

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
            self._remember_reset(stream.id, max(stream.receive_window, 0))
        self.write(frames.rst_stream(stream.id, code))
        self.forget(stream)

    def forget(self, stream: Stream) -> None:
        """The stream is over."""
        if self.streams.pop(stream.id, None) is not None:
            self.queue.pop(stream, None)
            self._ended.append(stream.id)
            stream.discharge()
        if self.closing is not None and not self.streams:
            self.close(linger=True)

    def _remember_reset(self, number: int, under_way: int) -> None:
        self._own_resets[number] = under_way
        if len(self._own_resets) > MAX_OWN_RESETS:
            self._own_resets.popitem(last=False)

    def pass_on(self) -> None:
        """Wakes the next sender that waits, if there is room. It calls this again when it is done."""
        while self.queue and not self.blocked and self.send_window > 0:
            stream, _ = self.queue.popitem(last=False)
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
            self._write_goaway(ErrorCode.NO_ERROR, why)
            if not self.streams:
                self.close(linger=True)

    def fail(self, code: ErrorCode, why: str) -> None:
        """Ends the connection because of what the peer did."""
        _faults.labels(code.name).inc()
        _log.info("http2.connection_ended", peer=self.peer, code=code.name, why=why)
        self._write_goaway(code, why)
        self.close(why, linger=True)

    def _write_goaway(self, code: ErrorCode, why: str) -> None:
        """Names the last stream that was acted on: never one above what was told before (RFC 9113, section 6.8)."""
        self._last_told = min(self._last_told, self.highest if self.is_server else 0)
        self.write(frames.goaway(self._last_told, code, why))

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
        self.queue.clear()

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
