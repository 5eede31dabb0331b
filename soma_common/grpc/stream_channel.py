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
from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from soma_common.grpc.channel import Token, call_metadata, open_channel
from soma_common.grpc.stream_call import Replies, StreamCall, begin_request, send_message
from soma_common.grpc.wire import WireError
from soma_common.http2.client import ClientConnection, connect, resolve
from soma_common.http2.connection import Keepalive
from soma_common.http2.stream import StreamLost
from soma_common.settings import split_address

KEEPALIVE: Final = Keepalive(after_s=5.0, timeout_s=2.0)
CONNECT_S: Final = 2.0
"""For one address: to connect, and to hear of its health."""

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
    replies = Replies(health_pb2.HealthCheckResponse.FromString, _HEALTH_BYTES)
    stream = begin_request(connection, replies, _HEALTH, ())
    try:
        await send_message(stream, health_pb2.HealthCheckRequest().SerializeToString())
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
