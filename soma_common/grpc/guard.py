"""What happens around every handler, in this order:

    count and time -> errors to statuses -> deadline -> authenticate -> authorize -> validate -> handler

A unary request is authenticated before it is decoded, too (`Guard.admission`).
Handlers are wrapped once, when the server is made, so a call pays for nothing that is known before it. A stream is
checked at its first message, or the part of it that opens the stream (`hello`); the frames after it pass through
untouched.

A handler reads a request stream through its iterator argument, not through `context.read()`: the first message was
taken already and is given back by the iterator.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2
from grpc_status import rpc_status
from soma.common.v1 import error_reason_pb2

from soma_common.authz.authorizer import Authorizer
from soma_common.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidRequest,
    SomaError,
    Unauthenticated,
    Unimplemented,
    from_inner_call,
    from_rpc_error,
    to_status,
    told_by_peer,
)
from soma_common.grpc.call_context import set_caller, set_deadline
from soma_common.grpc.method import Method
from soma_common.grpc.validation import validate
from soma_common.grpc.wire import Metadata
from soma_common.telemetry.metrics import counter, gauge, histogram
from soma_common.telemetry.trace import TRACEPARENT, TraceContext, new_trace, parse_traceparent, set_trace

FIRST_MESSAGE_TIMEOUT_S = 10.0
"""How long an authenticated stream may stay silent before its first message."""

_handled = counter("soma_rpc_server_handled_total", "Calls served, by gRPC code.", ["method", "code"])
_seconds = histogram("soma_rpc_server_seconds", "Time a unary call took.", ["method"])
_running = gauge("soma_rpc_server_running", "Calls being served now, streams included.", ["method"])
_defects = counter("soma_rpc_server_defects_total", "Calls that failed for a reason nobody foresaw.", ["method"])
_log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Context], Any]
Serve = Callable[[Any, Context], Awaitable[Any]]
Checked = Callable[[Any, Context, str | None], Awaitable[Any]]
"""Like `Serve`; the third argument is the metadata value `authorization`."""


_MAKERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""By whether the request and the response are streams."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Stands for a unary request that is not read, or whose bytes are no message of the contract's type."""

    error: SomaError


class FirstThenRest:
    """A request stream whose first message was read already. What follows comes straight from the source."""

    __slots__ = ("_first", "_next")

    def __init__(self, first: Message, rest: AsyncIterator[Any]) -> None:
        self._first: Message | None = first
        self._next = rest.__anext__

    def __aiter__(self) -> "FirstThenRest":
        return self

    def __anext__(self) -> Awaitable[Any]:
        if self._first is None:
            return self._next()
        first, self._first = self._first, None
        return _resolved(first)


class Guard:
    """Wraps handlers with the checks. One per server."""

    def __init__(self, authorizer: Authorizer, first_message_timeout_s: float = FIRST_MESSAGE_TIMEOUT_S) -> None:
        self._authorizer, self._first_message_timeout_s = authorizer, first_message_timeout_s

    def wrap(self, method: Method, handler: Any) -> "grpc.RpcMethodHandler[Any, Any]":
        """Return `handler`, a `grpc.RpcMethodHandler` of whatever arity, with everything around it."""
        encode = handler.response_serializer
        timed = not (handler.request_streaming or handler.response_streaming)
        if handler.request_streaming:
            decode = _strict_decoder(handler.request_deserializer)
            run = handler.stream_stream or handler.stream_unary
            checked = self._stream_in(method, _streaming_out(run))
        else:
            decode = _marking_decoder(handler.request_deserializer)
            run = handler.unary_stream or handler.unary_unary
            checked = self._unary_in(method, _streaming_out(run))
        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(_observed(method, checked, timed=timed), decode, encode)
        return wrapped

    def admission(self, method: Method) -> Callable[[Metadata], Unread | None] | None:
        """Authenticates the caller of a unary request by its metadata, before the message is expanded and decoded: a
        stranger could have that done for nothing. Returns what the handler is given in place of a message that is not
        to be read. None: the method is public.
        """
        if method.public:
            return None

        def admit(metadata: Metadata) -> Unread | None:
            try:
                self._authorizer.authenticate(_authorization(metadata))
            except SomaError as error:
                return Unread(error)
            return None

        return admit

    def _unary_in(self, method: Method, handler: Serve) -> Checked:
        async def serve(request: Any, context: Context, authorization: str | None) -> Any:
            if type(request) is Unread:
                raise request.error
            self._admit(method, authorization, request)
            return await handler(request, context)

        return serve

    def _stream_in(self, method: Method, handler: Serve) -> Checked:
        async def serve(requests: AsyncIterator[Any], context: Context, authorization: str | None) -> Any:
            # Identity before content: a stranger's stream is not read at all.
            if not method.public:
                self._authorizer.authenticate(authorization)
            source = aiter(requests)
            first = await _first_message(source, self._first_message_timeout_s)
            self._admit(method, authorization, first)
            return await handler(FirstThenRest(first, source), context)

        return serve

    def _admit(self, method: Method, authorization: str | None, request: Message) -> None:
        """Return when the caller may make this call with this request; raises the error to answer with otherwise."""
        if not method.public:
            caller = self._authorizer.authenticate(authorization)
            tenant = method.tenant_of(request)
            self._authorizer.authorize(caller, method.permission, tenant)
            set_caller(caller)
            structlog.contextvars.bind_contextvars(tenant=tenant or caller.tenant)
        if method.opening is None:
            validate(request)
        else:
            validate(getattr(request, method.opening), method.opening)


def _observed(method: Method, serve: Checked, *, timed: bool) -> Serve:
    """Count the call, time it if asked to (streams last as long as they please), limit it and translate its errors."""
    seconds = _seconds.labels(method.path) if timed else None
    running = _running.labels(method.path)
    ok = _handled.labels(method.path, grpc.StatusCode.OK.name)
    cancelled = _handled.labels(method.path, grpc.StatusCode.CANCELLED.name)

    async def observed(request: Any, context: Context) -> Any:
        started = time.perf_counter()
        running.inc()
        try:
            response = await _within_deadline(method, serve, request, context)
            ok.inc()
            return response
        except Exception as error:  # noqa: BLE001 - boundary: every error becomes a status here
            await _answer_error(method, context, error)
        except asyncio.CancelledError:
            cancelled.inc()
            raise
        finally:
            running.dec()
            if seconds is not None:
                seconds.observe(time.perf_counter() - started)

    return observed


async def _within_deadline(method: Method, serve: Checked, request: Any, context: Context) -> Any:
    """Serve within the caller's deadline, which gRPC keeps by cancelling this task, or else within the method's own."""
    authorization = _begin(context)
    left_s: float | None = context.time_remaining()
    if left_s is not None:
        if left_s <= 0:
            raise _deadline_exceeded("the deadline was over when the call arrived")
        set_deadline(left_s)
        return await serve(request, context, authorization)
    if method.default_timeout_s is None:
        return await serve(request, context, authorization)
    set_deadline(method.default_timeout_s)
    limit = asyncio.timeout(method.default_timeout_s)
    try:
        async with limit:
            return await serve(request, context, authorization)
    except TimeoutError as error:
        if limit.expired():
            raise _deadline_exceeded(f"the method's own limit of {method.default_timeout_s:g} s is over") from error
        raise


async def _answer_error(method: Method, context: Context, error: Exception) -> None:
    """End the call with the status that belongs to `error`; always raises."""
    if isinstance(error, grpc.aio.AbortError):
        _handled.labels(method.path, "ABORTED_BY_HANDLER").inc()
        raise error
    known = _known(method, error)
    if known is None:
        _defects.labels(method.path).inc()
        _log.error("rpc.defect", method=method.path, exc_info=error)
        known = Internal(
            error_reason_pb2.ERROR_REASON_INTERNAL, "the server has a defect; its log has the details under this trace"
        )
    status = to_status(known)
    _handled.labels(method.path, code_pb2.Code.Name(code_pb2.Code.ValueType(status.code))).inc()
    await context.abort_with_status(rpc_status.to_status(status))


def _known(method: Method, error: Exception) -> SomaError | None:
    if isinstance(error, SomaError):
        return error
    if isinstance(error, NotImplementedError):  # What a generated servicer raises for a method that nobody wrote.
        return Unimplemented(error_reason_pb2.ERROR_REASON_UNIMPLEMENTED, "the method is not served here")
    # That this service's own token was refused by another is no business of the caller, and a defect of the setup.
    if isinstance(error, grpc.aio.AioRpcError) and error.code() != grpc.StatusCode.UNAUTHENTICATED:
        if told_by_peer(error) is None:
            _log.warning("rpc.inner_call_failed", method=method.path, error=str(from_rpc_error(error)))
        return from_inner_call(error, "a service that this one needs")
    return None


def _streaming_out(handler: Handler) -> Serve:
    """Return a coroutine function for a handler that yields its responses; any other is one already."""
    if not inspect.isasyncgenfunction(handler):
        return handler

    async def write_all(request: Any, context: Context) -> None:
        responses = handler(request, context)
        write = context.write
        try:
            async for response in responses:
                await write(response)
        finally:
            await responses.aclose()

    return write_all


async def _first_message(requests: AsyncIterator[Any], timeout_s: float) -> Message:
    try:
        async with asyncio.timeout(timeout_s):
            first: Message = await anext(requests)
    except StopAsyncIteration:
        raise FailedPrecondition(
            error_reason_pb2.ERROR_REASON_PROTOCOL_ORDER, "the stream was closed before its first message"
        ) from None
    except TimeoutError:
        raise FailedPrecondition(
            error_reason_pb2.ERROR_REASON_PROTOCOL_ORDER,
            f"the first message did not come within {timeout_s:g} s",
        ) from None
    return first


async def _resolved(message: Message) -> Message:
    return message


def _begin(context: Context) -> str | None:
    """Enter the caller's trace, or a new one, and return the metadata value `authorization`; raises Unauthenticated."""
    metadata = context.invocation_metadata() or ()
    received: TraceContext | None = None
    for key, value in metadata:
        if key == TRACEPARENT and isinstance(value, str):
            received = parse_traceparent(value)
    set_trace(received.child() if received is not None else new_trace())
    return _authorization(metadata)


def _authorization(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The value of `authorization`. Raises Unauthenticated if there are several: who would say which one counts?"""
    given = [value for key, value in metadata if key == "authorization" and isinstance(value, str)]
    if len(given) > 1:
        raise Unauthenticated(
            error_reason_pb2.ERROR_REASON_UNAUTHENTICATED, "more than one metadata value `authorization`: send one"
        )
    return given[0] if given else None


def _marking_decoder(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """gRPC turns an error in a unary decoder into INTERNAL before any handler runs, so the error travels as a value."""
    if decode is None:
        return None

    def decode_or_mark(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return Unread(_undecodable(str(error)))

    return decode_or_mark


def _strict_decoder(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """In a stream a decoder's error is raised to whoever reads the message, so it can be the right error at once."""
    if decode is None:
        return None

    def decode_or_refuse(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            raise _undecodable(str(error)) from error

    return decode_or_refuse


def _undecodable(why: str) -> InvalidRequest:
    return InvalidRequest(
        error_reason_pb2.ERROR_REASON_INVALID_REQUEST, f"the request is no message of the contract's type: {why}"
    )


def _deadline_exceeded(what: str) -> DeadlineExceeded:
    return DeadlineExceeded(error_reason_pb2.ERROR_REASON_DEADLINE_EXCEEDED, f"{what}: allow more time or retry")
