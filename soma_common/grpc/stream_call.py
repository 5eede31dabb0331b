"""One call of two streams as its caller sees it, like gRPC's: its request, the replies and how it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
from grpc.aio import EOF, AioRpcError

from soma_common.grpc import wire
from soma_common.grpc.wire import PREFIX_BYTES, MessageReader, WireError
from soma_common.http2.client import ClientConnection
from soma_common.http2.frames import ErrorCode
from soma_common.http2.headers import Headers, check_response, check_trailers, encode
from soma_common.http2.stream import Stream, StreamLost
from soma_common.wakeup import WakeUp

USER_AGENT: Final = "somastack"

_StatusCode = grpc.StatusCode


def begin_request(
    connection: ClientConnection,
    replies: Replies,
    method: str,
    metadata: Sequence[tuple[str, str | bytes]],
) -> Stream:
    """Opens the stream of a call. Raises WireError if the connection takes none, ValueError for bad metadata."""
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", connection.authority),
        ("te", "trailers"),
        ("content-type", wire.CONTENT_TYPE),
        ("user-agent", USER_AGENT),
        *wire.write_metadata(metadata),
    ]
    try:
        stream = connection.open(replies, encode(headers))
    except StreamLost as lost:
        raise WireError(_StatusCode.UNAVAILABLE, lost.why) from None
    replies.stream = stream
    return stream


async def send_message(stream: Stream, data: bytes) -> None:
    """Sends a message. Raises StreamLost."""
    head = wire.PREFIX.pack(0, len(data))
    if not stream.try_send(head, data):
        await stream.send(head + data)


class Replies:
    """The receiver of a response: its messages, and the status it ends with."""

    def __init__(self, deserialize: Callable[[bytes], Any], max_message_bytes: int) -> None:
        self.stream: Stream
        self.code: _StatusCode | None = None
        """None: the call goes on."""
        self.details = ""
        self.trailing: wire.Metadata = ()
        self.initial: wire.Metadata = ()
        self._deserialize = deserialize
        self._reader: MessageReader | None = None
        self._max_message_bytes = max_message_bytes
        self._messages: deque[bytes] = deque()
        self._wake = WakeUp()

    def headers_received(self, headers: Headers) -> None:
        """The response begins, or ends."""
        try:
            self._take_headers(headers)
        except WireError as error:
            self.fail(error.code, error.why)

    def _take_headers(self, headers: Headers) -> None:
        if self._reader is not None:
            check_trailers(self.stream.id, headers)
            self._take_status(headers)
            return
        check_response(self.stream.id, headers)
        given = dict(headers)
        status = given[b":status"]
        if status[:1] == b"1":  # informational
            return
        if b"grpc-status" in given:  # a response of trailers only, whatever HTTP says of it
            self._reader = MessageReader(self._max_message_bytes)
            self._take_status(headers)
            return
        if status != b"200":
            raise WireError(wire.status_of_http(status), f"HTTP status {status.decode('latin-1')}")
        if not given.get(b"content-type", b"").startswith(b"application/grpc"):
            raise WireError(_StatusCode.UNKNOWN, f"not gRPC: {given.get(b'content-type', b'')!r}")
        self._reader = MessageReader(self._max_message_bytes, given.get(b"grpc-encoding", b"identity"))
        self.initial = wire.read_metadata(headers)

    def _take_status(self, headers: Headers) -> None:
        found = wire.read_status(headers)
        if found is None:
            raise WireError(_StatusCode.UNKNOWN, "the response ends without a status")
        self.trailing = wire.read_metadata(headers)
        self.end(*found)

    def data_received(self, data: bytes) -> None:
        """Bytes of messages."""
        if self.code is not None:
            return
        if self._reader is None:
            self.fail(_StatusCode.INTERNAL, "data before the response's headers")
            return
        try:
            for message in self._reader.read(data):
                self._messages.append(message)
                self.stream.hold(PREFIX_BYTES + len(message))
        except WireError as error:
            self.fail(error.code, error.why)
        self._wake()

    def end_received(self) -> None:
        """The server has said everything."""
        self.end(_StatusCode.UNKNOWN, "the response ends without a status")
        if not self.stream.local_ended:
            self.stream.reset(ErrorCode.NO_ERROR)

    def stream_lost(self, lost: StreamLost) -> None:
        """The stream was reset, or the connection is gone."""
        self.end(_status_of_reset(lost.code), lost.why)

    def fail(self, code: _StatusCode, details: str) -> None:
        """Ends the call from this side."""
        self.end(code, details)
        self.stream.reset(ErrorCode.CANCEL)

    def end(self, code: _StatusCode, details: str) -> None:
        """The call is over; the first to say so counts."""
        if self.code is None:
            self.code, self.details = code, details
            self._wake()

    async def next(self) -> Any:
        """The next message; None: the call is over. Raises DecodeError for a message that is none of its type."""
        while not self._messages:
            if self.code is not None:
                return None
            await self._wake.wait()
        message = self._messages.popleft()
        self.stream.release(PREFIX_BYTES + len(message))
        if type(message) is not bytes and self._reader is not None:
            try:
                message = self._reader.expanded(message)
            except WireError as error:
                self._messages.clear()
                self.fail(error.code, error.why)
                return None
        return self._deserialize(message)


class StreamCall:
    """A call of two streams, like gRPC's: `write`, `read`, `done_writing`, `cancel`.

    One reader and one writer at a time. After a `cancel` both raise CancelledError.
    """

    def __init__(
        self,
        connected: Callable[[], Any],
        method: str,
        metadata: Sequence[tuple[str, str | bytes]],
        serialize: Callable[[Any], bytes],
        deserialize: Callable[[bytes], Any],
        max_message_bytes: int,
        on_end: Callable[[StreamCall], None],
    ) -> None:
        self._method = method
        self._metadata = metadata
        self._serialize = serialize
        self._replies = Replies(deserialize, max_message_bytes)
        self._on_end = on_end
        self._connection: ClientConnection | None = None
        self._stream: Stream | None = None
        self._cancelled = False
        self._opening = asyncio.get_running_loop().create_task(self._open(connected))

    async def write(self, message: Any) -> None:
        """Sends a message. Raises AioRpcError if the call has failed, InvalidStateError if it is over."""
        stream = self._stream or await self._opened()
        data = self._serialize(message)
        if self._replies.code is None:
            head = wire.PREFIX.pack(0, len(data))
            if stream.try_send(head, data):
                return
            try:
                await stream.send(head + data)
            except StreamLost:
                if self._replies.code is None:
                    raise asyncio.InvalidStateError("nothing may be written after done_writing") from None
            else:
                return
        raise self._failure() or asyncio.InvalidStateError("the call is over")

    async def read(self) -> Any:
        """The next message, or EOF when the call has ended well. Raises AioRpcError if it has not."""
        if self._stream is None:
            await self._opened()
        message = await self._replies.next()
        if message is not None and not self._cancelled:
            return message
        failure = self._failure()
        if failure is not None:
            raise failure
        self._end()
        return EOF

    async def done_writing(self) -> None:
        """Says that nothing more will be sent."""
        await asyncio.wait({self._opening})
        if self._stream is not None:
            self._stream.end()

    def cancel(self) -> bool:
        """Ends the call now; False: it was over."""
        if self._replies.code is not None:
            self._end()
            return False
        self._cancelled = True
        self._replies.end(_StatusCode.CANCELLED, "cancelled by this end")
        self._end()
        return True

    def done(self) -> bool:
        """Whether the call is over."""
        return self._replies.code is not None

    def cancelled(self) -> bool:
        """Whether this end has cancelled it."""
        return self._cancelled

    async def _open(self, connected: Callable[[], Any]) -> None:
        try:
            connection: ClientConnection = await connected()
            if self._cancelled:
                connection.close()
                return
            self._connection = connection
            self._stream = begin_request(connection, self._replies, self._method, self._metadata)
        except WireError as error:
            self._replies.end(error.code, error.why)
        except ValueError as error:  # a token or metadata that is no header
            self._replies.end(_StatusCode.INVALID_ARGUMENT, str(error))
            if self._connection is not None:
                self._connection.close()

    async def _opened(self) -> Stream:
        await asyncio.wait({self._opening})
        if not self._opening.cancelled() and (defect := self._opening.exception()) is not None:
            raise defect
        if self._stream is None or self._cancelled:
            raise self._failure() or asyncio.CancelledError
        return self._stream

    def _failure(self) -> BaseException | None:
        """What a read or write of a call that is over raises; None: it has ended well."""
        self._end()
        replies = self._replies
        if self._cancelled:
            return asyncio.CancelledError("the call was cancelled")
        if replies.code is None or replies.code is _StatusCode.OK:
            return None
        return AioRpcError(
            replies.code,
            grpc.aio.Metadata(*replies.initial),
            grpc.aio.Metadata(*replies.trailing),
            replies.details,
        )

    def _end(self) -> None:
        self._on_end(self)
        self._opening.cancel()
        if self._stream is not None:
            self._stream.reset(ErrorCode.CANCEL)
        if self._connection is not None:
            self._connection.close()


def _status_of_reset(code: int | None) -> _StatusCode:
    """What a stream that was reset means (PROTOCOL-HTTP2.md, Errors)."""
    if code is None or code == ErrorCode.REFUSED_STREAM:
        return _StatusCode.UNAVAILABLE
    if code == ErrorCode.CANCEL:
        return _StatusCode.CANCELLED
    if code == ErrorCode.ENHANCE_YOUR_CALM:
        return _StatusCode.RESOURCE_EXHAUSTED
    if code == ErrorCode.INADEQUATE_SECURITY:
        return _StatusCode.PERMISSION_DENIED
    return _StatusCode.INTERNAL
