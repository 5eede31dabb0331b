"""Long streams to another service: each on a connection of its own, opened when it is and closed when it ends.

Takes the place of gRPC's channel for the streams that carry every turn, where a frame costs a fifth of what it costs
there. It does what the options of our channels (channel.py) ask of gRPC: addresses take turns, one whose health is not
SERVING gets no stream, a silent peer is noticed, the token goes with every call. Calls are made, read, written and fail
as gRPC's do.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import EOF, AioRpcError
from grpc_health.v1 import health_pb2

from soma_common.grpc import wire
from soma_common.grpc.channel import Token, call_metadata, open_channel
from soma_common.grpc.wire import PREFIX_BYTES, MessageReader, WireError
from soma_common.http2.client import ClientConnection, connect, resolve
from soma_common.http2.connection import Keepalive, Stream, StreamLost
from soma_common.http2.frames import ErrorCode
from soma_common.http2.headers import Headers, check_response, check_trailers, encode
from soma_common.settings import split_address

KEEPALIVE: Final = Keepalive(after_s=5.0, timeout_s=2.0)
CONNECT_S: Final = 2.0
"""For one address: to connect, and to hear of its health."""
USER_AGENT: Final = "somastack"

_HEALTH_BYTES: Final = 64 * 1024
_HEALTH: Final = "/grpc.health.v1.Health/Check"
_URI: Final = re.compile(r"[a-z0-9+.-]+:(?![0-9]+$)")
"""A target that only gRPC can resolve: `dns:///gateway`, `unix:/run/x`."""

_PORT: Final = re.compile(r":[0-9]+$")

_StatusCode = grpc.StatusCode


class StreamingChannel(Protocol):
    """What is used of a channel by those who keep a long stream: gRPC's own fits too."""

    def stream_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        """A function that opens the stream."""

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """READY when an address was found that serves."""

    async def close(self, grace: float | None = None) -> None:
        """Ends all streams."""


def is_plain(target: str) -> bool:
    """Whether a target is `host:port`, or several of them: what needs no resolver of gRPC's."""
    return all(_URI.match(part) is None and _PORT.search(part.strip()) is not None for part in target.split(","))


def open_stream_channel(target: str, *, token: Token | None, service: str) -> StreamingChannel:
    """A channel for long streams to `target`; gRPC's own (channel.py) if only that can resolve it. `service` is the
    peer's short name.
    """
    return (
        StreamChannel(target, token=token) if is_plain(target) else open_channel(target, token=token, service=service)
    )


class StreamChannel:
    """Opens streams to the addresses of `target`, `host:port` or several separated by commas, in turn."""

    def __init__(self, target: str, *, token: Token | None, max_message_bytes: int = 16 * 1024 * 1024) -> None:
        """Raises ValueError for a target that is not plain."""
        self._targets = [split_address(part.strip()) for part in target.split(",")]
        self._next = random.randrange(len(self._targets))
        self._token = token
        self._max_message_bytes = max_message_bytes
        self._calls: set[StreamCall] = set()
        self._spare: ClientConnection | None = None
        """Connected to an address that serves, for the next stream."""
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = False

    def stream_stream(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
    ) -> Callable[[], StreamCall]:
        """A function that opens a stream of the method."""

        def begin() -> StreamCall:
            if self._is_closed:
                raise grpc.aio.UsageError("Channel is closed.")
            call = StreamCall(
                self._connected,
                method,
                call_metadata(self._token, None),
                request_serializer or bytes,
                response_deserializer or bytes,
                self._max_message_bytes,
                self._calls.discard,
            )
            self._calls.add(call)
            return call

        return begin

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """READY when a connection to an address that serves is at hand; looks for one if asked to."""
        if self._is_closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        if self._spare is not None and self._spare.closing is None:
            return grpc.ChannelConnectivity.READY
        if try_to_connect and (self._looking is None or self._looking.done()):
            self._looking = asyncio.get_running_loop().create_task(self._look())
        return grpc.ChannelConnectivity.CONNECTING

    async def close(self, grace: float | None = None) -> None:
        """Ends all streams and connections."""
        self._is_closed = True
        for call in list(self._calls):
            call.cancel()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        if self._spare is not None:
            self._spare.close()

    async def _look(self) -> None:
        try:
            self._spare = await self._connected()
        except WireError:
            self._spare = None

    async def _connected(self) -> ClientConnection:
        """A connection to the next address that serves. Raises WireError with what was wrong with the last one."""
        spare, self._spare = self._spare, None
        if spare is not None and await _still_serves(spare):
            return spare
        failure = ""
        for _ in self._targets:
            host, port = self._targets[self._next]
            self._next = (self._next + 1) % len(self._targets)
            authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            try:
                async with asyncio.timeout(CONNECT_S):
                    addresses = await resolve(host, port)
            except (OSError, UnicodeError, TimeoutError) as error:
                failure = f"{authority} cannot be resolved: {error}"
                continue
            random.shuffle(addresses)
            for address in addresses:
                try:
                    async with asyncio.timeout(CONNECT_S):
                        return await _serving(address, authority)
                except TimeoutError:
                    failure = f"{address} did not answer within {CONNECT_S:g} s"
                except OSError as error:
                    failure = f"{address}: {error.strerror or error}"
                except WireError as error:
                    failure = f"{address}: {error.why}"
        raise WireError(_StatusCode.UNAVAILABLE, f"failed to connect to all addresses; last: {failure}")


async def _still_serves(spare: ClientConnection) -> bool:
    """Whether a connection that was made a while ago may be used; closes it if not."""
    serves = False
    try:
        async with asyncio.timeout(CONNECT_S):
            await _check_health(spare)
        serves = True
    except (TimeoutError, WireError):
        pass
    finally:
        if not serves:
            spare.close()
    return serves


async def _serving(address: tuple[str, int], authority: str) -> ClientConnection:
    """A connection to an address that says it serves, or says nothing of it. Raises OSError, WireError."""
    connection = await connect(address, KEEPALIVE, authority)
    try:
        await _check_health(connection)
    except BaseException:
        connection.close()
        raise
    return connection


async def _check_health(connection: ClientConnection) -> None:
    replies = _Replies(health_pb2.HealthCheckResponse.FromString, _HEALTH_BYTES)
    stream = _request(connection, replies, _HEALTH, ())
    try:
        await _send(stream, health_pb2.HealthCheckRequest().SerializeToString())
    except StreamLost as lost:
        raise WireError(_StatusCode.UNAVAILABLE, lost.why) from None
    stream.end()
    try:
        reply = await replies.next()
    except DecodeError as error:
        raise WireError(_StatusCode.UNAVAILABLE, f"health: {error}") from None
    if reply is None:
        if replies.code is not _StatusCode.UNIMPLEMENTED:  # a server without health serves
            raise WireError(_StatusCode.UNAVAILABLE, f"health: {replies.code}: {replies.details}")
    elif reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise WireError(_StatusCode.UNAVAILABLE, "not serving")


def _request(
    connection: ClientConnection,
    replies: _Replies,
    method: str,
    metadata: Sequence[tuple[str, str | bytes]],
) -> Stream:
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


async def _send(stream: Stream, data: bytes) -> None:
    """Sends a message. Raises StreamLost."""
    head = wire.PREFIX.pack(0, len(data))
    if not stream.try_send(head, data):
        await stream.send(head + data)


class _Replies:
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
        self._waiter: asyncio.Future[None] | None = None

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
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
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

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


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
        self._replies = _Replies(deserialize, max_message_bytes)
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
            self._stream = _request(connection, self._replies, self._method, self._metadata)
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
