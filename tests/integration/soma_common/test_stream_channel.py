"""Long streams to other services: against gRPC's own server, and against a peer that breaks every rule it can.

Where gRPC's channel has to do the same, the test runs on both: what is asked of ours is what gRPC does.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import socket
import time
import warnings
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2
from grpc.aio import EOF, AioRpcError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_status import rpc_status
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, Frame, GoAwayFrame
from soma.common.v1 import error_reason_pb2

import soma_common
from soma_common.errors import ResourceExhausted, from_rpc_error, to_status
from soma_common.grpc import stream_channel
from soma_common.grpc.channel import Token, open_channel
from soma_common.grpc.stream_channel import StreamChannel, StreamingChannel, is_plain, open_stream_channel
from soma_common.http2.connection import Keepalive
from soma_common.http2.limits import STREAM_WINDOW
from soma_common.testing.eventually import eventually

SERVICE, TALK, METHOD = "probe.Probe", "Talk", "/probe.Probe/Talk"
WAIT_S = 10.0
"""For what has to happen soon; a test that waits so long fails."""
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SOURCES = Path(soma_common.__file__).parent

Code = grpc.StatusCode
Handler = Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]
Fields = list[tuple[str, str]]
OpenTo = Callable[..., StreamingChannel]
RESPONSE: Fields = [(":status", "200"), ("content-type", "application/grpc")]


def framed(message: bytes) -> bytes:
    return b"\x00" + len(message).to_bytes(4, "big") + message


async def soon(doing: Awaitable[Any], within_s: float = WAIT_S) -> Any:
    return await asyncio.wait_for(doing, within_s)


async def failure(doing: Awaitable[Any], within_s: float = WAIT_S) -> AioRpcError:
    with pytest.raises(AioRpcError) as caught:
        await soon(doing, within_s)
    return caught.value


async def cancelled(doing: Awaitable[Any]) -> None:
    """The call was cancelled, and not whoever waits for it: that would end the test."""
    waiting = asyncio.ensure_future(doing)
    await asyncio.wait({waiting}, timeout=WAIT_S)
    assert waiting.done(), "still waits"
    with pytest.raises(asyncio.CancelledError):
        waiting.result()


def talk(channel: StreamingChannel) -> Any:
    return channel.stream_stream(METHOD)()


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- gRPC's own server


@asynccontextmanager
async def serving(handler: Handler, *, state: int | None = SERVING, port: int = 0) -> AsyncIterator[str]:
    """A server of one method; without a state it has no health service."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    talks: Any = grpc.stream_stream_rpc_method_handler(handler)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {TALK: talks}),))
    if state is not None:
        servicer = health.HealthServicer()
        await servicer.set("", state)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def echo(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for message in requests:
        yield message


class Counting:
    """Echoes, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    async def talk(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.calls += 1
        async for message in echo(requests, context):
            yield message


@asynccontextmanager
async def opened(target: str, **options: Any) -> AsyncIterator[StreamChannel]:
    channel = StreamChannel(target, token=None, **options)
    try:
        yield channel
    finally:
        await channel.close()


@pytest.fixture(params=["ours", "grpc"])
async def open_to(request: pytest.FixtureRequest) -> AsyncIterator[OpenTo]:
    """Opens channels of either kind, and closes them."""
    channels: list[StreamingChannel] = []

    def open_one(target: str, *, token: Token | None = None, **options: Any) -> StreamingChannel:
        channel: StreamingChannel = (
            StreamChannel(target, token=token, **options)
            if request.param == "ours"
            else open_channel(target, token=token, service="cognition", **options)
        )
        channels.append(channel)
        return channel

    yield open_one
    for channel in channels:
        await channel.close()


# --- a server that does what it is told


class Peer:
    """One connection of a server that speaks through the `h2` library, which knows what our client may do."""

    def __init__(self, raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._raw, self._reader, self._writer = raw, reader, writer
        self.h2 = H2Connection(
            H2Configuration(
                client_side=False,
                header_encoding="utf-8",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.requests: dict[int, dict[str, str]] = {}
        self.received: defaultdict[int, bytearray] = defaultdict(bytearray)
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.pongs = 0
        self.credits = True
        """Whether what is received makes room for more."""
        self.frozen = False
        self.gone = False
        self.broken: Exception | None = None
        """What the client did that HTTP/2 forbids."""
        self._uncredited: list[tuple[int, int]] = []

    async def run(self) -> None:
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(2**20)  # so that it is a stream's window that a client fills
        self.flush()
        with suppress(ConnectionError):
            while data := await self._reader.read(65536):
                if not self.frozen:
                    try:
                        self._take(self.h2.receive_data(data))
                    except ProtocolError as error:
                        self.broken = error
                        break
                    self.flush()
        self.gone = True
        self._writer.close()

    def _take(self, happened: Iterable[events.Event]) -> None:
        for event in happened:
            if isinstance(event, events.RequestReceived):
                self._asked(event.stream_id, {str(name): str(value) for name, value in event.headers})
            elif isinstance(event, events.DataReceived):
                self.received[event.stream_id] += event.data
                self._uncredited.append((event.flow_controlled_length, event.stream_id))
                if self.credits:
                    self.credit()
            elif isinstance(event, events.StreamEnded):
                self.ended.add(event.stream_id)
            elif isinstance(event, events.StreamReset):
                self.resets[event.stream_id] = event.error_code
            elif isinstance(event, events.PingAckReceived):
                self.pongs += 1

    def _asked(self, stream: int, request: dict[str, str]) -> None:
        path = request[":path"]
        if not path.startswith("/grpc.health.v1.Health/"):
            self.requests[stream] = request
            self._raw.start(self._raw.behave(self, stream))
            return
        self.headers(stream, RESPONSE)
        self.h2.send_data(stream, framed(self._raw.health))
        if path.endswith("Check"):
            self.headers(stream, [("grpc-status", "0")], end=True)

    def credit(self) -> None:
        """Makes room for as much as was received."""
        self.credits = True
        uncredited, self._uncredited = self._uncredited, []
        for size, stream in uncredited:
            if size:
                with suppress(ProtocolError):  # of a stream that is over
                    self.h2.acknowledge_received_data(size, stream)
        self.flush()

    def flush(self) -> None:
        self._writer.write(self.h2.data_to_send())

    def frame(self, frame: Frame) -> None:
        """Sends a frame that the library would not."""
        self._writer.write(frame.serialize())

    def garbage(self, data: bytes) -> None:
        self._writer.write(data)

    def headers(self, stream: int, fields: Fields, *, end: bool = False) -> None:
        self.h2.send_headers(stream, fields, end_stream=end)
        self.flush()

    def data(self, stream: int, data: bytes, *, end: bool = False, padding: int | None = None) -> None:
        self.h2.send_data(stream, data, end_stream=end, pad_length=padding)
        self.flush()

    def end(self, stream: int, status: int = 0, *more: tuple[str, str]) -> None:
        self.headers(stream, [("grpc-status", str(status)), *more], end=True)

    async def setting(self, name: SettingCodes, value: int) -> None:
        """Changes a setting; the client has acted on it when this returns."""
        self.h2.update_settings({name: value})
        await self.pong()

    def reset(self, stream: int, code: int) -> None:
        self.h2.reset_stream(stream, code)
        self.flush()

    async def message(self, stream: int, size: int = 1) -> bytes:
        """The first `size` bytes of what the client has sent, once they are here."""
        await eventually(lambda: len(self.received[stream]) >= size, WAIT_S, "the client sends")
        return bytes(self.received[stream])

    async def pong(self) -> None:
        """The client has acted on everything that was sent to it before."""
        before = self.pongs
        self.h2.ping(b"01234567")
        self.flush()
        await eventually(lambda: self.pongs > before, WAIT_S, "the client answers a ping", 0.002)

    def freeze(self) -> None:
        """Neither reads nor answers any more; the connection stays."""
        self.frozen = True
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        self._writer.transport.abort()


Behaviour = Callable[[Peer, int], Awaitable[None]]


class Raw:
    """What the connections of one such server have in common."""

    def __init__(self, behave: Behaviour, answer: bytes | None) -> None:
        self.behave = behave
        self.health = health_pb2.HealthCheckResponse(status=SERVING).SerializeToString() if answer is None else answer
        self.peers: list[Peer] = []
        self.address = ""
        self.tasks: list[asyncio.Future[None]] = []

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(self, reader, writer)
        self.peers.append(peer)
        self.start(peer.run())

    def start(self, doing: Awaitable[None]) -> None:
        self.tasks.append(asyncio.ensure_future(doing))

    async def call(self) -> tuple[Peer, int]:
        """The first call that came."""

        def came() -> tuple[Peer, int] | None:
            return next(((peer, stream) for peer in self.peers for stream in peer.requests), None)

        found = await eventually(came, WAIT_S, "a call comes")
        assert found is not None
        await asyncio.sleep(0)  # what answers it was put in the queue before this, and has begun after it
        return found


@asynccontextmanager
async def raw_server(behave: Behaviour, *, answer: bytes | None = None) -> AsyncIterator[Raw]:
    """A server that acts on each call as `behave` does, and answers `answer` when asked for its health."""
    raw = Raw(behave, answer)
    server = await asyncio.start_server(raw.accept, "127.0.0.1", 0)
    raw.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield raw
    finally:
        server.close()
        for peer in raw.peers:
            peer.abort()
        for task in raw.tasks:
            task.cancel()
        results = await asyncio.gather(*raw.tasks, return_exceptions=True)
    # A defect of the test's own server would show as a strange failure of the client.
    assert [result for result in results if isinstance(result, Exception)] == []
    assert [peer.broken for peer in raw.peers if peer.broken is not None] == []


async def idle(peer: Peer, stream: int) -> None:
    """Answers and says no more: the test goes on by itself."""
    peer.headers(stream, RESPONSE)


# --- as gRPC's calls do: what is written and read


async def test_messages_come_back_in_order(open_to: OpenTo) -> None:
    async with serving(echo) as address:
        call = talk(open_to(address))
        for number in range(20):
            await soon(call.write(b"%d" % number))
            assert await soon(call.read()) == b"%d" % number
        await soon(call.done_writing())
        assert await soon(call.read()) is EOF
        assert await soon(call.read()) is EOF
        assert call.done()
        assert not call.cancelled()


async def test_a_thousand_messages_under_way_keep_their_order(open_to: OpenTo) -> None:
    messages = [b"%d " % number + b"x" * (number % 700) for number in range(1000)]
    async with serving(echo) as address:
        call = talk(open_to(address))

        async def write() -> None:
            for message in messages:
                await call.write(message)
            await call.done_writing()

        writing = asyncio.ensure_future(write())
        assert [await soon(call.read()) for _ in messages] == messages
        await soon(writing)
        assert await soon(call.read()) is EOF


async def test_empty_messages_are_messages(open_to: OpenTo) -> None:
    async with serving(echo) as address:
        call = talk(open_to(address))
        for message in (b"", b"a", b""):
            await soon(call.write(message))
        assert [await soon(call.read()) for _ in range(3)] == [b"", b"a", b""]


async def test_a_message_larger_than_every_window_goes_both_ways(open_to: OpenTo) -> None:
    large = bytes(range(256)) * (5 * 1024 * 4)
    async with serving(echo) as address:
        call = talk(open_to(address))
        for message in (large, b"small", large[::-1]):
            writing = asyncio.ensure_future(call.write(message))
            assert await soon(call.read()) == message
            await soon(writing)


async def test_messages_are_serialized_and_deserialized() -> None:
    async with serving(echo) as address, opened(address) as channel:
        call = channel.stream_stream(
            METHOD, health_pb2.HealthCheckRequest.SerializeToString, health_pb2.HealthCheckRequest.FromString
        )()
        await soon(call.write(health_pb2.HealthCheckRequest(service="a")))
        assert await soon(call.read()) == health_pb2.HealthCheckRequest(service="a")


@pytest.mark.parametrize("size", [1000, 1001])
async def test_a_message_above_the_limit_ends_the_call(size: int, open_to: OpenTo) -> None:
    async def answer(_requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield b"x" * size
        await asyncio.Event().wait()

    async with serving(answer) as address:
        call = talk(open_to(address, max_message_bytes=1000))
        assert await soon(call.read()) == b"first"
        if size <= 1000:
            assert await soon(call.read()) == b"x" * size
        else:
            assert (await failure(call.read())).code() is Code.RESOURCE_EXHAUSTED


async def test_done_writing_lets_the_server_finish(open_to: OpenTo) -> None:
    async def count(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        yield b"%d" % len([message async for message in requests])

    async with serving(count) as address:
        call = talk(open_to(address))
        for _ in range(3):
            await soon(call.write(b"x"))
        await soon(call.done_writing())
        assert await soon(call.read()) == b"3"
        assert await soon(call.read()) is EOF


async def test_nothing_may_be_written_after_done_writing_and_the_call_goes_on(open_to: OpenTo) -> None:
    late = asyncio.Event()

    async def answer(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            pass
        await late.wait()
        yield b"still here"

    async with serving(answer) as address:
        call = talk(open_to(address))
        await soon(call.write(b"x"))
        await soon(call.done_writing())
        reading = asyncio.ensure_future(call.read())
        with pytest.raises(asyncio.InvalidStateError):
            await soon(call.write(b"too late"))
        late.set()
        assert await soon(reading, 3.0) == b"still here"
        assert await soon(call.read()) is EOF


async def test_done_writing_to_a_call_that_is_over_is_no_error(open_to: OpenTo) -> None:
    unreachable = talk(open_to(f"127.0.0.1:{unused_port()}"))
    assert (await failure(unreachable.read())).code() is Code.UNAVAILABLE
    await soon(unreachable.done_writing())
    async with serving(echo) as address:
        ended = talk(open_to(address))
        for _ in range(2):
            await soon(ended.done_writing())
        assert await soon(ended.read()) is EOF
        await soon(ended.done_writing())


async def test_a_call_the_server_has_ended_well_reads_eof_and_takes_no_writes(open_to: OpenTo) -> None:
    async def one(_requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        yield b"all there is"

    async with serving(one) as address:
        call = talk(open_to(address))
        assert await soon(call.read()) == b"all there is"
        assert await soon(call.read()) is EOF
        with pytest.raises(asyncio.InvalidStateError):
            await soon(call.write(b"for nobody"))
        assert not call.cancel()


async def test_a_server_that_has_answered_first_still_reads_what_is_written(open_to: OpenTo) -> None:
    got: list[bytes] = []

    async def first_all_answers(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        for number in range(3):
            yield b"%d" % number
        got.extend([message async for message in requests])

    async with serving(first_all_answers) as address:
        call = talk(open_to(address))
        assert [await soon(call.read()) for _ in range(3)] == [b"0", b"1", b"2"]
        for _ in range(3):
            await soon(call.write(b"more"))
        await soon(call.done_writing())
        assert await soon(call.read()) is EOF
        assert got == [b"more"] * 3


# --- errors of the server


async def test_an_error_comes_with_its_reason_and_metadata(open_to: OpenTo) -> None:
    error = ResourceExhausted(
        error_reason_pb2.ERROR_REASON_QUEUE_FULL, "full at 100 % — später", {"bound": "12"}, retry_delay_s=1.5
    )

    async def refuse(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await context.send_initial_metadata((("probe-initial", "i"),))
        async for message in requests:
            yield message
            status: Any = rpc_status.to_status(to_status(error))
            more = (*status.trailing_metadata, ("probe-bin", b"\x00\xff"), ("probe", "text"))
            await context.abort(status.code, status.details, more)

    async with serving(refuse) as address:
        call = talk(open_to(address))
        await soon(call.write(b"x"))
        assert await soon(call.read()) == b"x"
        failed = await failure(call.read())
        assert failed.code() is Code.RESOURCE_EXHAUSTED
        assert failed.details() == "full at 100 % — später"
        assert dict(failed.initial_metadata())["probe-initial"] == "i"
        trailing = dict(failed.trailing_metadata())
        assert trailing["probe-bin"] == b"\x00\xff"
        assert trailing["probe"] == "text"
        read = from_rpc_error(failed)
        assert (type(read), read.reason, read.message) == (ResourceExhausted, error.reason, error.message)
        assert (dict(read.metadata), read.retry_delay_s) == ({"bound": "12"}, 1.5)
        # It stays so.
        assert (await failure(call.read())).code() is Code.RESOURCE_EXHAUSTED
        assert call.done()


async def test_a_call_refused_without_any_answer_fails_with_its_status(open_to: OpenTo) -> None:
    async def refuse(_requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await context.abort(Code.PERMISSION_DENIED, "not you", (("why-bin", b"\x01"),))
        yield b"never"

    async with serving(refuse) as address:
        call = talk(open_to(address))
        failed = await failure(call.read())
        assert (failed.code(), failed.details()) == (Code.PERMISSION_DENIED, "not you")
        assert dict(failed.trailing_metadata())["why-bin"] == b"\x01"


async def test_a_method_that_is_not_served_is_unimplemented(open_to: OpenTo) -> None:
    async with serving(echo) as address:
        call = open_to(address).stream_stream("/probe.Probe/Other")()
        assert (await failure(call.read())).code() is Code.UNIMPLEMENTED


async def test_a_write_to_a_failed_call_says_why() -> None:
    async def refuse(peer: Peer, stream: int) -> None:
        await peer.message(stream)
        peer.headers(stream, [*RESPONSE, ("grpc-status", "9"), ("grpc-message", "no%21")], end=True)

    async with raw_server(refuse) as raw, opened(raw.address) as channel:
        call = talk(channel)
        await soon(call.write(b"x"))
        await eventually(call.done, WAIT_S)
        failed = await failure(call.write(b"y"))
        assert (failed.code(), failed.details()) == (Code.FAILED_PRECONDITION, "no!")


@pytest.mark.parametrize("status", [0, 8])
async def test_a_status_ends_a_writer_that_waits_for_room(status: int) -> None:
    async def take_nothing(peer: Peer, stream: int) -> None:
        peer.credits = False
        peer.headers(stream, RESPONSE)

    async with raw_server(take_nothing) as raw, opened(raw.address) as channel:
        call = talk(channel)
        writing = asyncio.ensure_future(call.write(b"x" * 200_000))
        peer, stream = await raw.call()
        await peer.message(stream, 65_535)
        peer.end(stream, status)
        if status:
            assert (await failure(writing)).code() is Code.RESOURCE_EXHAUSTED
        else:
            with pytest.raises(asyncio.InvalidStateError):
                await soon(writing)
            assert await soon(call.read()) is EOF
        # So that the server need not keep the half of the stream that nobody ends.
        await eventually(lambda: peer.gone or peer.resets.get(stream) == ErrorCodes.NO_ERROR, WAIT_S, "it is let go")


# --- cancellation


async def test_a_cancelled_call_ends_its_reader_and_the_server(open_to: OpenTo) -> None:
    seen = asyncio.Event()

    async def wait(_requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        yield b"x"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.set()
            raise

    async with serving(wait) as address:
        call = talk(open_to(address))
        await soon(call.write(b"x"))
        assert await soon(call.read()) == b"x"
        reading = asyncio.ensure_future(call.read())
        await asyncio.sleep(0)
        assert call.cancel()
        await cancelled(reading)
        await soon(seen.wait())
        await cancelled(call.read())
        assert call.cancelled()
        assert call.done()
        assert not call.cancel()


async def test_a_cancelled_call_ends_its_writer() -> None:
    async def take_nothing(peer: Peer, stream: int) -> None:
        peer.credits = False
        peer.headers(stream, RESPONSE)

    async with raw_server(take_nothing) as raw, opened(raw.address) as channel:
        call = talk(channel)
        writing = asyncio.ensure_future(call.write(b"x" * 200_000))
        peer, stream = await raw.call()
        await peer.message(stream, 65_535)
        assert not writing.done()
        call.cancel()
        await cancelled(writing)
        await cancelled(call.write(b"more"))
        await eventually(lambda: peer.resets or peer.gone, WAIT_S, "the server hears of it")


async def test_a_call_can_be_cancelled_while_it_connects() -> None:
    async with silent_server() as address, opened(address) as channel:
        call = talk(channel)
        reading = asyncio.ensure_future(call.read())
        await asyncio.sleep(0)
        assert call.cancel()
        await cancelled(reading)
        await cancelled(call.write(b"x"))


async def test_a_read_given_up_loses_no_message() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        peer, stream = await raw.call()
        await peer.pong()
        reading = asyncio.ensure_future(call.read())
        await asyncio.sleep(0)
        reading.cancel()
        await cancelled(reading)
        peer.data(stream, framed(b"kept"))
        assert await soon(call.read()) == b"kept"


async def test_a_write_given_up_in_the_middle_of_a_message_ends_the_call() -> None:
    """What would come next could not be told from the rest of it."""

    async def take_nothing(peer: Peer, stream: int) -> None:
        peer.credits = False
        peer.headers(stream, RESPONSE)

    async with raw_server(take_nothing) as raw, opened(raw.address) as channel:
        call = talk(channel)
        writing = asyncio.ensure_future(call.write(b"x" * 200_000))
        peer, stream = await raw.call()
        await peer.message(stream, 65_535)
        writing.cancel()
        await cancelled(writing)
        await eventually(lambda: peer.resets.get(stream), WAIT_S, "the stream is reset")
        assert (await failure(call.read())).code() is Code.CANCELLED


# --- peers that are not there, go or stand still


async def test_nobody_listening_is_said_at_once(open_to: OpenTo) -> None:
    began = time.monotonic()
    call = talk(open_to(f"127.0.0.1:{unused_port()}"))
    assert (await failure(call.read())).code() is Code.UNAVAILABLE
    assert time.monotonic() - began < 2.0


async def test_nobody_listening_fails_a_write_too() -> None:
    port = unused_port()
    async with opened(f"127.0.0.1:{port}") as channel:
        failed = await failure(talk(channel).write(b"x"), 2.0)
        assert failed.code() is Code.UNAVAILABLE
        assert str(port) in str(failed.details())


async def test_a_host_that_no_name_can_have_is_an_address_that_fails() -> None:
    async with serving(echo) as address:
        async with opened("a..b:80") as channel:
            assert (await failure(talk(channel).read())).code() is Code.UNAVAILABLE
        async with opened(f"a..b:80,{address}") as channel:
            call = talk(channel)
            await soon(call.write(b"x"))
            assert await soon(call.read()) == b"x"


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_connection_cut_ends_readers_and_writers(how: str) -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        reading = asyncio.ensure_future(call.read())
        peer, _ = await raw.call()
        await peer.pong()
        getattr(peer, how)()
        assert (await failure(reading)).code() is Code.UNAVAILABLE
        assert (await failure(call.write(b"x"))).code() is Code.UNAVAILABLE
        assert (await failure(call.read())).code() is Code.UNAVAILABLE
        assert not call.cancelled()


async def test_a_connection_cut_ends_a_writer_that_waits_for_room() -> None:
    async def take_nothing(peer: Peer, _stream: int) -> None:
        peer.credits = False

    async with raw_server(take_nothing) as raw, opened(raw.address) as channel:
        call = talk(channel)
        writing = asyncio.ensure_future(call.write(b"x" * 200_000))
        peer, stream = await raw.call()
        await peer.message(stream, 65_535)
        peer.abort()
        assert (await failure(writing)).code() is Code.UNAVAILABLE


async def test_what_came_before_the_cut_is_still_read() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        peer, stream = await raw.call()
        peer.data(stream, framed(b"one") + framed(b"two") + framed(b"thr")[:6])
        await peer.pong()
        peer.close()
        await eventually(call.done, WAIT_S)
        assert [await soon(call.read()) for _ in range(2)] == [b"one", b"two"]
        assert (await failure(call.read())).code() is Code.UNAVAILABLE


@asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """Accepts connections and says nothing."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _reader, writer: writers.append(writer), "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def test_a_peer_that_accepts_and_says_nothing_is_given_two_seconds() -> None:
    async with silent_server() as address, opened(address) as channel:
        began = time.monotonic()
        assert (await failure(talk(channel).read())).code() is Code.UNAVAILABLE
        assert 1.5 < time.monotonic() - began < 4.0


async def test_a_silent_address_costs_its_time_and_the_next_one_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_channel, "CONNECT_S", 0.6)
    async with silent_server() as silent, serving(echo) as live, opened(f"{silent},{live}") as channel:
        for _ in range(2):  # whichever is first in turn
            call = talk(channel)
            await soon(call.write(b"x"))
            assert await soon(call.read()) == b"x"


async def test_a_peer_that_speaks_another_protocol_is_unavailable_at_once() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server, opened(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as channel:
        assert (await failure(talk(channel).read(), 1.5)).code() is Code.UNAVAILABLE


async def test_garbage_in_the_middle_of_a_stream_ends_it() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        reading = asyncio.ensure_future(call.read())
        peer, _ = await raw.call()
        await peer.pong()
        peer.garbage(b"\xff" * 100)
        assert (await failure(reading)).code() is Code.UNAVAILABLE
        assert (await failure(call.write(b"x"))).code() is Code.UNAVAILABLE


@pytest.mark.parametrize("writes", [False, True])
async def test_a_frozen_peer_is_noticed(writes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_channel, "KEEPALIVE", Keepalive(after_s=0.2, timeout_s=0.2))
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        peer, _ = await raw.call()
        await peer.pong()
        peer.freeze()
        began = time.monotonic()
        waiting = call.write(b"x" * 20_000_000) if writes else call.read()
        assert (await failure(waiting)).code() is Code.UNAVAILABLE
        assert 0.1 < time.monotonic() - began < 3.0


@pytest.mark.parametrize(("after_s", "timeout_s"), [(0.4, 0.3), (0.1, 0.4)])
async def test_a_peer_that_only_answers_pings_is_alive(
    after_s: float, timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_channel, "KEEPALIVE", Keepalive(after_s, timeout_s))
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        peer, stream = await raw.call()
        pings = 0
        count = peer._take

        def counting(happened: Iterable[events.Event]) -> None:
            nonlocal pings
            happened = list(happened)
            pings += sum(isinstance(event, events.PingReceived) for event in happened)
            count(happened)

        monkeypatch.setattr(peer, "_take", counting)
        await eventually(lambda: pings >= 2 or call.done(), WAIT_S, "pings come")
        assert not call.done()
        peer.data(stream, framed(b"alive"))
        assert await soon(call.read()) == b"alive"


# --- several addresses, and health


async def test_live_addresses_take_turns_and_dead_ones_are_skipped() -> None:
    one, two = Counting(), Counting()
    async with (
        serving(one.talk) as first,
        serving(two.talk) as second,
        opened(f"{first}, 127.0.0.1:{unused_port()},{second}") as channel,
    ):
        for number in range(6):
            call = talk(channel)
            await soon(call.write(b"x"))
            assert await soon(call.read()) == b"x"
            assert abs(one.calls - two.calls) <= 1, number
        assert (one.calls, two.calls) == (3, 3)


async def test_all_addresses_of_a_name_are_tried() -> None:
    """`localhost` may be two addresses, of which one is served."""
    async with serving(echo) as address, opened(f"localhost:{address.rpartition(':')[2]}") as channel:
        for _ in range(4):
            call = talk(channel)
            await soon(call.write(b"x"))
            assert await soon(call.read()) == b"x"


async def test_a_server_that_is_not_serving_gets_no_stream() -> None:
    resting, working = Counting(), Counting()
    async with (
        serving(resting.talk, state=NOT_SERVING) as first,
        serving(working.talk) as second,
        opened(f"{first},{second}") as both,
        opened(first) as only,
    ):
        for _ in range(4):
            call = talk(both)
            await soon(call.write(b"x"))
            assert await soon(call.read()) == b"x"
        failed = await failure(talk(only).read())
        assert failed.code() is Code.UNAVAILABLE
        assert (resting.calls, working.calls) == (0, 4)


async def test_a_server_without_a_health_service_gets_streams(open_to: OpenTo) -> None:
    async with serving(echo, state=None) as address:
        call = talk(open_to(address))
        await soon(call.write(b"x"))
        assert await soon(call.read()) == b"x"


async def test_a_health_that_cannot_be_read_is_no_health() -> None:
    working = Counting()
    async with (
        raw_server(idle, answer=b"\xff\xff\xff") as raw,
        serving(working.talk) as live,
        opened(f"{raw.address},{live}") as both,
        opened(raw.address) as only,
    ):
        assert (await failure(talk(only).read())).code() is Code.UNAVAILABLE
        for _ in range(2):
            call = talk(both)
            await soon(call.write(b"x"))
            assert await soon(call.read()) == b"x"
        assert working.calls == 2


# --- connections, and their ends


async def test_each_stream_has_a_connection_of_its_own_until_it_ends() -> None:
    async def echo_one(peer: Peer, stream: int) -> None:
        peer.headers(stream, RESPONSE)
        peer.data(stream, await peer.message(stream))
        await eventually(lambda: stream in peer.ended, WAIT_S)
        peer.end(stream)

    async with raw_server(echo_one) as raw, opened(raw.address) as channel:
        calls = [talk(channel) for _ in range(3)]
        for call in calls:
            await soon(call.write(b"x"))
            assert await soon(call.read()) == b"x"
        assert sorted(len(peer.requests) for peer in raw.peers) == [1, 1, 1]
        for call in calls:
            await soon(call.done_writing())
            assert await soon(call.read()) is EOF
        await eventually(lambda: all(peer.gone for peer in raw.peers), WAIT_S, "the connections are closed")


async def test_a_channel_finds_a_connection_and_uses_it_for_the_next_stream() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        assert channel.get_state() is not grpc.ChannelConnectivity.READY
        await eventually(lambda: channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY, WAIT_S)
        assert len(raw.peers) == 1
        assert channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY
        talk(channel)
        peer, _ = await raw.call()
        assert raw.peers == [peer]


async def test_a_channel_is_not_ready_without_being_asked_to_connect() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        await raw.call()
        assert channel.get_state() is not grpc.ChannelConnectivity.READY
        assert len(raw.peers) == 1
        call.cancel()


async def test_a_channel_becomes_ready_when_its_peer_does() -> None:
    port = unused_port()
    async with opened(f"127.0.0.1:{port}") as channel:
        channel.get_state(try_to_connect=True)
        assert (await failure(talk(channel).read())).code() is Code.UNAVAILABLE  # so it has been looked for
        assert channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY
        async with serving(echo, port=port):
            await eventually(lambda: channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY, WAIT_S)
            call = talk(channel)
            await soon(call.write(b"x"))
            assert await soon(call.read()) == b"x"


async def test_a_channel_whose_connection_went_is_not_ready_and_makes_another() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        await eventually(lambda: channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY, WAIT_S)
        raw.peers[0].abort()
        await eventually(lambda: channel.get_state() is not grpc.ChannelConnectivity.READY, WAIT_S)
        talk(channel)
        peer, _ = await raw.call()
        assert raw.peers.index(peer) == 1


def own_tasks() -> set[Any]:
    """Tasks that run our code, and not that of the test or of gRPC."""
    return {
        task
        for task in asyncio.all_tasks()
        if (code := getattr(task.get_coro(), "cr_code", None)) and Path(code.co_filename).is_relative_to(SOURCES)
    }


async def test_close_ends_everything() -> None:
    async def take_nothing(peer: Peer, stream: int) -> None:
        peer.credits = False
        peer.headers(stream, RESPONSE)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with silent_server() as silent, raw_server(take_nothing) as raw:
            channels = [StreamChannel(address, token=None) for address in (raw.address, raw.address, silent, silent)]
            calls = [talk(channels[0]), talk(channels[0]), talk(channels[2])]
            await raw.call()
            waiting = [asyncio.ensure_future(call.read()) for call in calls]
            waiting.append(asyncio.ensure_future(calls[0].write(b"x" * 200_000)))
            await eventually(lambda: any(sum(map(len, peer.received.values())) > 60_000 for peer in raw.peers), WAIT_S)
            await eventually(lambda: channels[1].get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY)
            channels[3].get_state(try_to_connect=True)
            await eventually(own_tasks, WAIT_S, "something is under way")
            for channel in channels:
                await soon(channel.close())
            for task in waiting:
                await cancelled(task)
            await eventually(lambda: not own_tasks(), 1.0, "no task is left")
            await eventually(lambda: all(peer.gone for peer in raw.peers), 2.0, "the connections are closed")
            assert len(raw.peers) == 3
        calls.clear()
        channels.clear()
        waiting.clear()
        del channel, task
        gc.collect()
    assert [str(warning.message) for warning in caught if issubclass(warning.category, ResourceWarning)] == []


async def test_a_channel_that_was_never_used_closes() -> None:
    channel = StreamChannel("127.0.0.1:1", token=None)
    await soon(channel.close())
    assert own_tasks() == set()


# --- GOAWAY, resets and other ends


async def test_a_stream_goes_on_after_goaway() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        peer, stream = await raw.call()
        peer.frame(GoAwayFrame(0, last_stream_id=2**31 - 1))
        peer.frame(GoAwayFrame(0, last_stream_id=stream))
        await peer.pong()
        await soon(call.write(b"still"))
        assert await peer.message(stream, len(framed(b"still"))) == framed(b"still")
        peer.data(stream, framed(b"here"))
        assert await soon(call.read()) == b"here"
        peer.end(stream)
        assert await soon(call.read()) is EOF
        await eventually(lambda: peer.gone, WAIT_S, "the connection is closed with its stream")


async def test_a_goaway_that_names_an_error_ends_the_stream() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        reading = asyncio.ensure_future(call.read())
        peer, stream = await raw.call()
        peer.frame(GoAwayFrame(0, stream, error_code=ErrorCodes.ENHANCE_YOUR_CALM, additional_data=b"too_many_pings"))
        peer.close()
        failed = await failure(reading)
        assert failed.code() is Code.UNAVAILABLE
        assert "too_many_pings" in str(failed.details())


async def test_a_stream_above_the_last_of_goaway_is_unavailable() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        reading = asyncio.ensure_future(call.read())
        peer, stream = await raw.call()
        peer.frame(GoAwayFrame(0, last_stream_id=stream - 2))
        assert (await failure(reading)).code() is Code.UNAVAILABLE
        assert (await failure(call.write(b"x"))).code() is Code.UNAVAILABLE


async def test_a_spare_connection_that_goes_away_gets_no_stream() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        await eventually(lambda: channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY, WAIT_S)
        raw.peers[0].frame(GoAwayFrame(0, last_stream_id=1))
        await eventually(lambda: channel.get_state() is not grpc.ChannelConnectivity.READY, WAIT_S)
        talk(channel)
        peer, _ = await raw.call()
        assert peer is not raw.peers[0]


@pytest.mark.parametrize(
    ("reset", "code"),
    [
        (ErrorCodes.NO_ERROR, Code.INTERNAL),
        (ErrorCodes.PROTOCOL_ERROR, Code.INTERNAL),
        (ErrorCodes.INTERNAL_ERROR, Code.INTERNAL),
        (ErrorCodes.FLOW_CONTROL_ERROR, Code.INTERNAL),
        (ErrorCodes.FRAME_SIZE_ERROR, Code.INTERNAL),
        (ErrorCodes.REFUSED_STREAM, Code.UNAVAILABLE),
        (ErrorCodes.CANCEL, Code.CANCELLED),
        (ErrorCodes.COMPRESSION_ERROR, Code.INTERNAL),
        (ErrorCodes.CONNECT_ERROR, Code.INTERNAL),
        (ErrorCodes.ENHANCE_YOUR_CALM, Code.RESOURCE_EXHAUSTED),
        (ErrorCodes.INADEQUATE_SECURITY, Code.PERMISSION_DENIED),
        (0xABCD, Code.INTERNAL),
    ],
)
async def test_resets_mean_what_grpc_says(reset: int, code: grpc.StatusCode) -> None:
    async def refuse(peer: Peer, stream: int) -> None:
        peer.headers(stream, RESPONSE)
        peer.data(stream, framed(b"before"))
        peer.reset(stream, reset)

    async with raw_server(refuse) as raw, opened(raw.address) as channel:
        call = talk(channel)
        await eventually(call.done, WAIT_S)
        assert await soon(call.read()) == b"before"
        failed = await failure(call.read())
        assert failed.code() is code
        assert not call.cancelled()  # which the server did, and not this end


async def test_a_reset_behind_the_status_changes_nothing() -> None:
    """Servers send RST_STREAM with NO_ERROR when they end a stream that the client has not."""

    async def finish(peer: Peer, stream: int) -> None:
        peer.headers(stream, RESPONSE)
        peer.end(stream)
        with suppress(ProtocolError):
            peer.reset(stream, ErrorCodes.NO_ERROR)

    async with raw_server(finish) as raw, opened(raw.address) as channel:
        assert await soon(talk(channel).read()) is EOF


# --- responses that are none of gRPC's


@pytest.mark.parametrize("body", [None, b"<html>"])
@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("400", Code.INTERNAL),
        ("401", Code.UNAUTHENTICATED),
        ("403", Code.PERMISSION_DENIED),
        ("404", Code.UNIMPLEMENTED),
        ("429", Code.UNAVAILABLE),
        ("503", Code.UNAVAILABLE),
        ("500", Code.UNKNOWN),
        ("302", Code.UNKNOWN),
    ],
)
async def test_an_http_status_becomes_a_code(status: str, code: grpc.StatusCode, body: bytes | None) -> None:
    async def refuse(peer: Peer, stream: int) -> None:
        peer.headers(stream, [(":status", status), ("content-type", "text/html")], end=body is None)
        if body is not None:
            peer.data(stream, body)

    async with raw_server(refuse) as raw, opened(raw.address) as channel:
        failed = await failure(talk(channel).read())
        assert failed.code() is code
        assert status in str(failed.details())


async def test_a_status_of_grpc_counts_more_than_one_of_http() -> None:
    """ "If grpc-status was provided, it must be used." """

    async def refuse(peer: Peer, stream: int) -> None:
        peer.headers(stream, [(":status", "503"), ("content-type", "application/grpc"), ("grpc-status", "8")], end=True)

    async with raw_server(refuse) as raw, opened(raw.address) as channel:
        assert (await failure(talk(channel).read())).code() is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("fields", [[("content-type", "text/html")], []])
async def test_an_answer_that_is_not_grpc_is_unknown(fields: Fields) -> None:
    async def greet(peer: Peer, stream: int) -> None:
        peer.headers(stream, [(":status", "200"), *fields])
        peer.data(stream, b"<html>hello</html>", end=True)

    async with raw_server(greet) as raw, opened(raw.address) as channel:
        assert (await failure(talk(channel).read())).code() is Code.UNKNOWN


@pytest.mark.parametrize("how", ["data", "trailers", "headers"])
async def test_an_answer_without_a_status_is_unknown(how: str) -> None:
    """ "200 is UNKNOWN because there should be a grpc-status in case of truly OK response." """

    async def forget(peer: Peer, stream: int) -> None:
        peer.headers(stream, RESPONSE, end=how == "headers")
        if how == "data":
            peer.data(stream, framed(b"x"), end=True)
        if how == "trailers":
            peer.data(stream, framed(b"x"))
            peer.headers(stream, [("other", "field")], end=True)

    async with raw_server(forget) as raw, opened(raw.address) as channel:
        call = talk(channel)
        if how != "headers":
            assert await soon(call.read()) == b"x"
        assert (await failure(call.read())).code() is Code.UNKNOWN


async def test_a_code_of_thousands_of_digits_is_unknown() -> None:
    async def refuse(peer: Peer, stream: int) -> None:
        peer.headers(stream, RESPONSE)
        peer.headers(stream, [("grpc-status", "1" * 5000)], end=True)

    async with raw_server(refuse) as raw, opened(raw.address) as channel:
        assert (await failure(talk(channel).read())).code() is Code.UNKNOWN


async def test_informational_answers_are_passed_over() -> None:
    async def early(peer: Peer, stream: int) -> None:
        peer.headers(stream, [(":status", "103"), ("link", "</style.css>")])
        peer.headers(stream, [(":status", "100")])
        peer.headers(stream, RESPONSE)
        peer.data(stream, framed(b"x"))
        peer.end(stream)

    async with raw_server(early) as raw, opened(raw.address) as channel:
        call = talk(channel)
        assert await soon(call.read()) == b"x"
        assert await soon(call.read()) is EOF


async def test_data_before_the_headers_fails_the_call() -> None:
    async def rush(peer: Peer, stream: int) -> None:
        peer.frame(DataFrame(stream, framed(b"x")))

    async with raw_server(rush) as raw, opened(raw.address) as channel:
        assert (await failure(talk(channel).read())).code() is Code.INTERNAL


@pytest.mark.parametrize(
    "fields",
    [
        [("content-type", "application/grpc")],
        [(":status", "200"), (":status", "200"), ("content-type", "application/grpc")],
        [("content-type", "application/grpc"), (":status", "200")],
        [(":status", "200"), ("content-type", "application/grpc"), ("Upper", "x")],
        [(":status", "200"), ("content-type", "application/grpc"), ("connection", "close")],
    ],
)
async def test_a_malformed_answer_fails_the_call(fields: Fields) -> None:
    async def garble(peer: Peer, stream: int) -> None:
        peer.headers(stream, fields)
        peer.data(stream, framed(b"x"))

    async with raw_server(garble) as raw, opened(raw.address) as channel:
        assert (await failure(talk(channel).read())).code() is Code.INTERNAL


async def test_trailers_of_many_frames_are_read() -> None:
    details = "x" * 40_000

    async def refuse(peer: Peer, stream: int) -> None:
        peer.headers(stream, RESPONSE)
        peer.end(stream, 5, ("grpc-message", details))

    async with raw_server(refuse) as raw, opened(raw.address) as channel:
        failed = await failure(talk(channel).read())
        assert (failed.code(), failed.details()) == (Code.NOT_FOUND, details)


async def test_a_message_in_frames_of_single_bytes_with_padding_is_read() -> None:
    async def dribble(peer: Peer, stream: int) -> None:
        peer.headers(stream, RESPONSE)
        for byte in framed(b"slowly"):
            peer.data(stream, bytes([byte]), padding=200)
            peer.data(stream, b"", padding=0)
        peer.end(stream)

    async with raw_server(dribble) as raw, opened(raw.address) as channel:
        call = talk(channel)
        assert await soon(call.read()) == b"slowly"
        assert await soon(call.read()) is EOF


async def test_a_message_cut_short_by_the_status_is_no_message() -> None:
    async def refuse(peer: Peer, stream: int) -> None:
        peer.headers(stream, RESPONSE)
        peer.data(stream, framed(b"hello")[:7])
        peer.end(stream, 13)

    async with raw_server(refuse) as raw, opened(raw.address) as channel:
        assert (await failure(talk(channel).read())).code() is Code.INTERNAL


# --- flow control


async def test_a_writer_waits_until_there_is_room() -> None:
    async def take_nothing(peer: Peer, stream: int) -> None:
        peer.credits = False
        peer.headers(stream, RESPONSE)

    message = b"x" * 10_000
    async with raw_server(take_nothing) as raw, opened(raw.address) as channel:
        call = talk(channel)
        written = 0

        async def write() -> None:
            nonlocal written
            for _ in range(100):
                await call.write(message)
                written += 1

        writing = asyncio.ensure_future(write())
        peer, stream = await raw.call()
        await eventually(lambda: len(peer.received[stream]) == 65_535, WAIT_S, "the window is full")
        await peer.pong()
        assert written == 65_535 // len(framed(message))
        peer.credit()
        await soon(writing)
        await eventually(lambda: peer.received[stream] == framed(message) * 100, WAIT_S, "all of it is there")


async def test_a_window_that_opens_by_the_settings_is_used_as_far_as_it_opens() -> None:
    message = framed(b"x" * 1000)
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        call = talk(channel)
        peer, stream = await raw.call()
        peer.credits = False
        await peer.setting(SettingCodes.INITIAL_WINDOW_SIZE, 0)
        writing = asyncio.ensure_future(call.write(message[5:]))
        for size in (0, 1, 700):
            await peer.setting(SettingCodes.INITIAL_WINDOW_SIZE, size)
            assert bytes(peer.received[stream]) == message[:size]
            assert not writing.done()
        # Below what was sent already: the window is negative, and has to open by more than that.
        await peer.setting(SettingCodes.INITIAL_WINDOW_SIZE, 10)
        await peer.setting(SettingCodes.INITIAL_WINDOW_SIZE, 800)
        assert bytes(peer.received[stream]) == message[:800]
        await peer.setting(SettingCodes.INITIAL_WINDOW_SIZE, 70_000)
        await soon(writing)
        assert await peer.message(stream, len(message)) == message


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
async def test_what_is_not_read_is_not_held_without_bound(size: int) -> None:
    """However small the messages: each of them takes room, at least that of its prefix."""
    sent = 0
    full = asyncio.Event()

    async def flood(peer: Peer, stream: int) -> None:
        nonlocal sent
        peer.headers(stream, RESPONSE)
        endless = itertools.cycle(framed(b"x" * size))
        while sent < 4 * STREAM_WINDOW:
            room = min(peer.h2.local_flow_control_window(stream), peer.h2.max_outbound_frame_size)
            if room > 0:
                peer.data(stream, bytes(itertools.islice(endless, room)))
                sent += room
                continue
            await peer.pong()
            if peer.h2.local_flow_control_window(stream) == 0:
                break
        full.set()

    async with raw_server(flood) as raw, opened(raw.address) as channel:
        call = talk(channel)
        await soon(full.wait())
        assert sent <= 2 * STREAM_WINDOW
        assert await soon(call.read()) == b"x" * size


@pytest.mark.parametrize("sizes", [[0], [100], [65_536], [0, 4096]])
async def test_a_peer_that_changes_its_header_table_reads_our_headers(sizes: list[int]) -> None:
    """The next header block has to say what is used of the table, or it cannot be read."""
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        await eventually(lambda: channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY, WAIT_S)
        for size in sizes:
            await raw.peers[0].setting(SettingCodes.HEADER_TABLE_SIZE, size)
        talk(channel)
        peer, stream = await raw.call()
        assert peer is raw.peers[0]
        assert peer.requests[stream][":path"] == METHOD


# --- what goes with a call


async def test_the_request_is_grpcs() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        talk(channel)
        peer, stream = await raw.call()
        request = peer.requests[stream]
        assert {name: request.get(name) for name in (":method", ":scheme", ":path", ":authority", "te")} == {
            ":method": "POST",
            ":scheme": "http",
            ":path": METHOD,
            ":authority": raw.address,
            "te": "trailers",
        }
        assert request["content-type"] == "application/grpc"


async def test_the_token_is_asked_for_with_each_call(open_to: OpenTo) -> None:
    tokens = (f"t{number}" for number in itertools.count())

    async def who(_requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        yield dict(context.invocation_metadata())["authorization"].encode()

    async with serving(who) as address:
        channel = open_to(address, token=lambda: next(tokens))
        for number in range(3):
            assert await soon(talk(channel).read()) == b"Bearer t%d" % number


async def test_a_token_that_is_no_header_fails_the_call_and_leaves_no_connection() -> None:
    async with raw_server(idle) as raw:
        channel = StreamChannel(raw.address, token=lambda: "line\nbreak")
        try:
            with pytest.raises(grpc.aio.AioRpcError, match="authorization") as failed:
                await soon(talk(channel).read())
            assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await eventually(lambda: all(peer.gone for peer in raw.peers), 2.0, "the connection is closed")
        finally:
            await channel.close()


async def test_without_a_token_nobody_is_named() -> None:
    async with raw_server(idle) as raw, opened(raw.address) as channel:
        talk(channel)
        peer, stream = await raw.call()
        assert "authorization" not in peer.requests[stream]


# --- targets


@pytest.mark.parametrize(
    ("target", "plain"),
    [
        ("127.0.0.1:80", True),
        ("gateway:50051", True),
        ("gateway.example.com:1", True),
        ("my-host:8080", True),
        ("[::1]:80", True),
        ("[fe80::1:2]:50051", True),
        ("127.0.0.1:1,127.0.0.1:2", True),
        ("a:1,[::1]:2,c.d:3", True),
        ("a:1, b:2", True),
        ("dns:///gateway", False),
        ("dns:///gateway:80", False),
        ("dns:gateway:80", False),
        ("dns://1.1.1.1/gateway:80", False),
        ("unix:/run/x", False),
        ("unix:x.sock", False),
        ("unix:///run/x", False),
        ("unix-abstract:x", False),
        ("ipv4:127.0.0.1:80", False),
        ("ipv4:127.0.0.1:80,127.0.0.2:80", False),
        ("ipv6:[::1]:80", False),
        ("xds:///service", False),
        ("a:1,dns:///b", False),
        ("gateway", False),
        ("[::1]", False),
        ("", False),
    ],
)
def test_targets_that_need_no_resolver_are_told_apart(target: str, plain: bool) -> None:
    assert is_plain(target) is plain


@pytest.mark.parametrize("target", ["gateway", "dns:///gateway", "a:1,b", ":80", "", "a:99999"])
def test_a_channel_of_ours_refuses_a_target_that_is_not_plain(target: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        StreamChannel(target, token=None)


@pytest.mark.parametrize("scheme", ["", "dns:///", "ipv4:"])
async def test_a_channel_is_opened_for_either_kind_of_target(scheme: str) -> None:
    async with serving(echo) as address:
        channel = open_stream_channel(scheme + address, token=None, service="cognition")
        assert isinstance(channel, StreamChannel) is (not scheme)
        try:
            call = talk(channel)
            await soon(call.write(empty_pb2.Empty().SerializeToString() + b"x"))
            assert await soon(call.read()) == b"x"
        finally:
            await channel.close()
