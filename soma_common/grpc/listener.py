"""The gRPC server's socket: connections of HTTP/2, and their requests as calls."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

import grpc
import structlog

from soma_common.grpc import wire
from soma_common.grpc.served_call import Admission, Handler, ServedCall, ServedMethod
from soma_common.grpc.wire import WireError
from soma_common.http2.connection import Connection, Keepalive
from soma_common.http2.frames import ErrorCode
from soma_common.http2.headers import Headers, encode
from soma_common.http2.server import ServerConnection
from soma_common.http2.stream import Stream, StreamLost
from soma_common.settings import split_address
from soma_common.telemetry.metrics import gauge

KEEPALIVE: Final = Keepalive(after_s=10.0, timeout_s=5.0)
BACKLOG: Final = 1024
LAST_WORDS_S: Final = 1.0
"""How long handlers that were cancelled at the end may take."""

LOOK_S: Final = 0.01

_connections = gauge("soma_rpc_server_connections", "Connections of clients.")

_METHOD_NOT_ALLOWED: Final = encode(((":status", "405"), ("allow", "POST")))
_NOT_GRPC: Final = encode(((":status", "415"),))

_log = structlog.get_logger(__name__)


class AddressInUse(RuntimeError):
    """The address to listen on is taken."""


class Listener:
    """Serves methods by their paths."""

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._methods: dict[bytes, ServedMethod] = {}
        self._connections: set[Connection] = set()
        self._calls: dict[asyncio.Task[None], ServedCall] = {}
        self._server: asyncio.Server | None = None

    def add(
        self, path: str, handler: Handler, *, admission: Admission | None = None, max_request_bytes: int | None = None
    ) -> None:
        """Serves a method by its path, as `/soma.router.v1.TurnService/GetTurn`. `max_request_bytes`: of a message to
        it, if fewer than `max_message_bytes`.
        """
        limit = self._max_message_bytes if max_request_bytes is None else max_request_bytes
        self._methods[path.encode()] = ServedMethod(handler, admission, min(limit, self._max_message_bytes))

    async def start(self, address: str) -> int:
        """Listens on `host:port` and returns the port. Raises AddressInUse."""
        loop = asyncio.get_running_loop()
        listening = await _listening(address)
        self._server = await loop.create_server(self._connected, sock=listening, backlog=BACKLOG)
        port: int = listening.getsockname()[1]
        return port

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls, gives running ones `grace_s` seconds, then cancels them."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.go_away("the server is stopping")
        if self._calls:
            await asyncio.wait(self._calls, timeout=grace_s)
        for call in list(self._calls.values()):
            call.end_with(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        if self._calls:
            _, stuck = await asyncio.wait(self._calls, timeout=LAST_WORDS_S)
            if stuck:
                _log.warning("grpc.calls_left", calls=len(stuck))
        # What was written last still leaves, but nobody is waited for who does not read it.
        ends_at = asyncio.get_running_loop().time() + LAST_WORDS_S
        while any(connection.closed for connection in self._connections):
            if asyncio.get_running_loop().time() > ends_at:
                break
            await asyncio.sleep(LOOK_S)
        for connection in list(self._connections):
            connection.close("the server has stopped")

    def _connected(self) -> ServerConnection:
        connection = ServerConnection(KEEPALIVE, self._disconnected, self._accept)
        self._connections.add(connection)
        _connections.inc()
        return connection

    def _disconnected(self, connection: Connection) -> None:
        self._connections.discard(connection)
        _connections.dec()

    def _accept(self, stream: Stream, headers: Headers) -> None:
        """Starts the call that a request asks for, or answers what is none."""
        given = dict(headers)
        if given[b":method"] != b"POST":
            _refuse(stream, _METHOD_NOT_ALLOWED)
        elif not _is_grpc(given.get(b"content-type", b"")):
            _refuse(stream, _NOT_GRPC)
        else:
            try:
                self._begin(stream, given, headers)
            except WireError as error:
                _refuse(stream, _trailers_only(error.code, error.why))

    def _begin(self, stream: Stream, given: dict[bytes, bytes], headers: Headers) -> None:
        method = self._methods.get(given[b":path"])
        if method is None:
            raise WireError(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        encoding = given.get(b"grpc-encoding", b"identity")
        if not wire.is_known_encoding(encoding):
            raise WireError(grpc.StatusCode.UNIMPLEMENTED, f"messages compressed by {encoding!r} cannot be read")
        timeout = given.get(b"grpc-timeout")
        call = ServedCall(
            stream,
            method,
            stream.peer,
            wire.read_metadata(headers),
            timeout_s=None if timeout is None else wire.read_timeout(timeout),
            encoding=encoding,
            max_message_bytes=self._max_message_bytes,
        )
        self._calls[call.task] = call
        call.task.add_done_callback(self._calls.pop)


class _Ignored:
    """The receiver of a request that was answered at once."""

    def headers_received(self, headers: Headers) -> None:
        pass

    def data_received(self, data: bytes) -> None:
        pass

    def end_received(self) -> None:
        pass

    def stream_lost(self, lost: StreamLost) -> None:
        pass


def _refuse(stream: Stream, block: bytes) -> None:
    stream.receiver = _Ignored()
    stream.send_headers(block, end=True)
    if not stream.remote_ended:
        stream.reset(ErrorCode.NO_ERROR)


def _trailers_only(code: grpc.StatusCode, details: str) -> bytes:
    number: int = code.value[0]
    return encode((*wire.HTTP_HEADERS, *wire.write_status(number, details)))


def _is_grpc(content_type: bytes) -> bool:
    kind = content_type.partition(b";")[0].strip()
    return kind == b"application/grpc" or kind.startswith(b"application/grpc+")


async def _listening(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, *_, where = found[0]
        both = family == socket.AF_INET6 and where[0] == "::" and socket.has_dualstack_ipv6()
        listening = socket.create_server(where, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise AddressInUse(f"cannot listen on {address}: {error}") from error
    # What it accepts has it too. uvloop sets it itself, asyncio leaves it to who makes the socket: the end of an answer
    # would wait 40 ms for the acknowledgement of its beginning.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listening.setblocking(False)
    return listening
