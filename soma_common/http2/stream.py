"""One stream of an HTTP/2 connection: what it may send and receive, and its ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import structlog

from soma_common.http2 import frames
from soma_common.http2.frames import DATA, END_STREAM, HEADER, ErrorCode, StreamFault
from soma_common.http2.headers import Headers
from soma_common.http2.limits import STREAM_WINDOW
from soma_common.wakeup import WakeUp

if TYPE_CHECKING:
    from soma_common.http2.connection import Connection

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


class Stream:
    """One stream of a connection. `receiver` is set by whoever opens or accepts it."""

    __slots__ = (
        "_connection",
        "_held",
        "_owed",
        "_sending",
        "awaited",
        "header_bytes",
        "id",
        "kept",
        "local_ended",
        "lost",
        "receive_window",
        "receiver",
        "remote_ended",
        "send_window",
        "wake",
    )

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self.id = number
        self.receiver: Receiver
        self.send_window = connection.first_send_window
        self.receive_window = STREAM_WINDOW
        self.awaited: int | None = None
        """Bytes that are still to come by the message's own content-length; None: it has none."""
        self.header_bytes = 0
        """Bytes of the request's headers, which are kept until the stream is over."""
        self.local_ended = False
        self.remote_ended = False
        self.lost: StreamLost | None = None
        self._owed = 0
        self._held = 0
        self.kept = 0
        """Bytes that wait for the rest of their message."""
        self.wake = WakeUp()
        """Has a waiting sender look again."""
        self._sending: asyncio.Lock | None = None

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
        else:  # it is the connection or its socket that has no room; one that waits already keeps its place
            connection.queue[self] = None
        await self.wake.wait()

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
        self._connection.header_bytes -= self.header_bytes
        self._held = self.kept = self.header_bytes = 0
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
