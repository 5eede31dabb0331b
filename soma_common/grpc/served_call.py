"""One call as its handler sees it: the context that gRPC gives to generated servicers, on a stream of HTTP/2.

A call runs in a task of its own. It is cancelled when the caller resets the stream, the connection is lost, the
deadline is over or the server stops; what the caller then gets, if it is still there, is the status that says so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import grpc
import structlog

from soma_common.grpc import wire
from soma_common.grpc.wire import PREFIX_BYTES, MessageReader, Metadata, WireError
from soma_common.http2.frames import ErrorCode
from soma_common.http2.headers import Headers, encode
from soma_common.http2.stream import Stream, StreamLost
from soma_common.wakeup import WakeUp

_PLAIN_HEADERS: Final = encode(wire.HTTP_HEADERS)
_OK_TRAILERS: Final = encode(wire.write_status(0, ""))

REQUEST_S: Final = 10.0
"""How long the message of a request that is no stream may take to come."""

_log = structlog.get_logger(__name__)


Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Admission: TypeAlias = Callable[[Metadata], Any]
"""Looks at the metadata before a request that is no stream is expanded and decoded. Returns None, or what its handler
is given in place of the message.
"""


@dataclass(frozen=True, slots=True)
class ServedMethod:
    """How a method is served."""

    handler: Handler
    admission: Admission | None
    max_request_bytes: int
    """Of a message to it."""


class ServedCall(grpc.aio.ServicerContext[Any, Any]):
    """The context of a call, and the receiver of its stream."""

    def __init__(
        self,
        stream: Stream,
        method: ServedMethod,
        peer: str,
        metadata: Metadata,
        *,
        timeout_s: float | None,
        encoding: bytes,
        max_message_bytes: int,
    ) -> None:
        self._stream = stream
        handler = method.handler
        self._handler = handler
        self._admission = method.admission
        self._peer = peer
        self._metadata = metadata
        self._max_message_bytes = max_message_bytes
        self._serialize: Callable[[Any], bytes] = handler.response_serializer or bytes
        self._deserialize: Callable[[bytes], Any] = handler.request_deserializer or bytes
        self._reader = MessageReader(method.max_request_bytes, encoding)
        self._kept = 0
        """Bytes of a message that is not whole."""
        self._messages: deque[bytes] = deque()
        self._has_request = False
        """The one message of a request that is no stream was read."""
        self._wake = WakeUp()
        self._has_all = False
        """The caller sends nothing more, or nothing more will be read."""
        self._headers_sent = False
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._trailing: Sequence[tuple[str, str | bytes]] = ()
        self._is_over = False
        self._is_cancelled = False
        self._callbacks: list[Callable[[Any], None]] = []
        loop = asyncio.get_running_loop()
        self._now = loop.time
        self._ends_at = None if timeout_s is None else loop.time() + timeout_s
        self._deadline = None if timeout_s is None else loop.call_later(timeout_s, self._on_deadline)
        stream.receiver = self
        self.task = loop.create_task(self._run())

    # --- the stream's side

    def headers_received(self, headers: Headers) -> None:
        """Trailers of a request say nothing in gRPC."""

    def data_received(self, data: bytes) -> None:
        """Takes what the caller sends."""
        if self._has_all:
            return
        stream, reader = self._stream, self._reader
        try:
            for message in reader.read(data):
                self._messages.append(message)
                stream.hold(PREFIX_BYTES + len(message))
        except WireError as error:
            self.end_with(error.code, error.why)
            return
        if reader.held != self._kept:
            self._kept = reader.held
            stream.keep(self._kept)
        if not self._handler.request_streaming and len(self._messages) + self._has_request > 1:
            self.end_with(grpc.StatusCode.INTERNAL, "there is more than one request message")
            return
        self._wake()

    def end_received(self) -> None:
        """The caller has said everything."""
        if not self._reader.is_between_messages and not self._has_all:
            self.end_with(grpc.StatusCode.INTERNAL, "the request ends within a message")
        self._has_all = True
        self._wake()

    def stream_lost(self, lost: StreamLost) -> None:
        """The caller is gone."""
        self._is_cancelled = True
        self._finish()
        if not lost.given_up:  # the handler has cancelled its writer, it need not be told
            self.task.cancel()

    # --- what ends it

    def end_with(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call with a status and cancels its handler."""
        if not self._is_over:
            self._code, self._details, self._trailing = code, details, ()
            self._is_cancelled = True
            self._send_end()
            self.task.cancel()

    def _on_deadline(self) -> None:
        self.end_with(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _send_end(self) -> None:
        """Sends the status and closes the stream."""
        if self._is_over:
            return
        code = self._code or grpc.StatusCode.OK
        if code is grpc.StatusCode.OK and not self._details and not self._trailing and self._headers_sent:
            block = _OK_TRAILERS
        else:
            most = self._stream.max_send_headers
            most = wire.LEAST_HEADERS if most is None else most
            trailers = wire.write_status(code.value[0], self._details, self._trailing, most)
            if not self._headers_sent:  # a response of trailers only
                trailers = [*wire.HTTP_HEADERS, *trailers]
            block = encode(trailers)
        self._headers_sent = True
        stream = self._stream
        stream.send_headers(block, end=True)
        if not stream.remote_ended:
            stream.reset(ErrorCode.NO_ERROR)  # the rest of the request is not wanted (RFC 9113, section 8.1)
        self._finish()

    def _finish(self) -> None:
        if self._is_over:
            return
        self._is_over = self._has_all = True
        self._messages.clear()
        if self._deadline is not None:
            self._deadline.cancel()
        self._wake()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # noqa: BLE001 - boundary: the others have to be told too
                _log.exception("rpc.callback_failed")

    # --- the handler's side

    async def _run(self) -> None:
        try:
            await self._serve()
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            if not self._is_over:  # by the handler itself, or by the server's end
                self._code, self._details = grpc.StatusCode.CANCELLED, "the call was cancelled by the server"
        except Exception as error:  # noqa: BLE001 - boundary: gRPC's own services, which no guard surrounds
            _log.exception("rpc.unguarded_error")
            self._code, self._details = grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}"
        finally:
            self._send_end()

    async def _serve(self) -> None:
        handler = self._handler
        if handler.request_streaming:
            request: Any = _Requests(self._next)
            run: Any = handler.stream_stream or handler.stream_unary
        else:
            if not await self._arrives():
                return
            request = None if self._admission is None else self._admission(self._metadata)
            if request is None:
                request = await self._next()
            self._has_request = True
            run = handler.unary_stream or handler.unary_unary
        answer = run(request, self)
        if isinstance(answer, AsyncIterator):
            async for response in answer:
                await self.write(response)
            return
        response = await answer
        if not handler.response_streaming and (self._code is None or self._code is grpc.StatusCode.OK):
            await self.write(response)

    async def _arrives(self) -> bool:
        """Whether the request's message comes, soon; otherwise the status says what is missing."""
        if not self._messages:
            try:
                async with asyncio.timeout(REQUEST_S):
                    while not self._messages and not self._has_all:
                        await self._wake.wait()
            except TimeoutError:
                self._code = grpc.StatusCode.DEADLINE_EXCEEDED
                self._details = f"the request did not come within {REQUEST_S:g} s"
                return False
        if not self._messages:
            self._code, self._details = grpc.StatusCode.INTERNAL, "there is no request message"
        return bool(self._messages)

    async def _next(self) -> Any:
        """The next message of the caller; None: there is none any more."""
        while not self._messages:
            if self._has_all:
                return None
            await self._wake.wait()
        message = self._messages.popleft()
        self._stream.release(PREFIX_BYTES + len(message))
        if type(message) is not bytes:
            try:
                message = self._reader.expanded(message)
            except WireError as error:
                self.end_with(error.code, error.why)
                raise asyncio.CancelledError(error.why) from None
        return self._deserialize(message)

    # --- grpc.aio.ServicerContext

    async def read(self) -> Any:
        """The next message of the caller, or EOF."""
        message = await self._next()
        return grpc.aio.EOF if message is None else message

    async def write(self, message: Any) -> None:
        """Sends a message; returns when the connection has taken it."""
        data = self._serialize(message)
        if self._is_over:
            raise asyncio.CancelledError("the call is over")
        size = len(data)
        if size > self._max_message_bytes:
            await self.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"sent message larger than max ({size} vs. {self._max_message_bytes})",
            )
        if not self._headers_sent:
            await self.send_initial_metadata(())
        head = wire.PREFIX.pack(0, size)
        if not self._stream.try_send(head, data):
            try:
                await self._stream.send(head + data)
            except StreamLost as lost:
                raise asyncio.CancelledError(lost.why) from None

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Sends the headers of the response."""
        if self._headers_sent or self._is_over:
            return
        given = list(initial_metadata)
        block = encode([*wire.HTTP_HEADERS, *wire.write_metadata(given)]) if given else _PLAIN_HEADERS
        self._headers_sent = True
        self._stream.send_headers(block)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Ends the call with a status that is not OK; raises."""
        self._code = grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code
        self._details, self._trailing = details, tuple(trailing_metadata)
        self._send_end()
        raise grpc.aio.AbortError("the call was aborted by its handler")

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """Ends the call with a status that is not OK; raises."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Goes with the status."""
        self._trailing = tuple(trailing_metadata)

    def set_code(self, code: grpc.StatusCode) -> None:
        """The status, when the handler returns."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Goes with the status."""
        self._details = details

    def invocation_metadata(self) -> Any:
        """What the caller sent along."""
        return self._metadata

    def time_remaining(self) -> Any:
        """Seconds until the caller's deadline; None, as in gRPC whatever its stub declares, if it has none."""
        return None if self._ends_at is None else max(self._ends_at - self._now(), 0.0)

    def peer(self) -> str:
        """Address of the caller."""
        return self._peer

    def add_done_callback(self, callback: Any) -> None:
        """Calls `callback(context)` when the call is over."""
        if self._is_over:
            callback(self)
        else:
            self._callbacks.append(callback)

    def cancelled(self) -> bool:
        """Whether the call ended before its handler did."""
        return self._is_cancelled

    def done(self) -> bool:
        """Whether the call is over."""
        return self._is_over

    def code(self) -> Any:
        """The status that was set."""
        return self._code

    def details(self) -> Any:
        """What goes with the status."""
        return self._details

    def trailing_metadata(self) -> Any:
        """What goes with the status."""
        return self._trailing

    def peer_identities(self) -> Iterable[bytes] | None:
        """None: who calls is told by the token, and by the mesh."""
        return None

    def peer_identity_key(self) -> str | None:
        """None, see `peer_identities`."""
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Empty, see `peer_identities`."""
        return {}

    def set_compression(self, compression: grpc.Compression) -> None:
        """Answers are not compressed, whatever is asked for."""

    def disable_next_message_compression(self) -> None:
        """Answers are not compressed."""


class _Requests:
    """The messages of a caller that streams."""

    __slots__ = ("_next",)

    def __init__(self, following: Callable[[], Any]) -> None:
        self._next = following

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> Any:
        message = await self._next()
        if message is None:
            raise StopAsyncIteration
        return message
