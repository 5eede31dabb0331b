"""A client of HTTP/2 that may break its rules: frames and plain bytes over one socket, every wait with a deadline.

It is made of `hyperframe` and `hpack` alone, so that nothing keeps a test from sending what no library would. `check`
is its opposite: a call made by the library `h2`, which keeps every rule and raises when the server does not.
"""

import asyncio
import base64
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Self, TypeVar
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
from grpc_health.v1 import health_pb2
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

T = TypeVar("T")
Field = tuple[str, str]
Settings = Mapping[SettingCodes, int]

PATIENCE_S = 10.0
"""How long a wait lasts before it fails, unless it says otherwise."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CHECK = "/grpc.health.v1.Health/Check"
DEFAULT_WINDOW = 65_535
DEFAULT_FRAME_SIZE = 16_384
GRACEFUL = 2**31 - 1
"""The last stream of a GOAWAY that only announces another."""


def request(
    path: str, *more: Field, method: str = "POST", content_type: str | None = "application/grpc"
) -> list[Field]:
    """Return the header fields of a lawful call, and `more` behind them."""
    fields = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "127.0.0.1")]
    if content_type is not None:
        fields.append(("content-type", content_type))
    return [*fields, ("te", "trailers"), *more]


def message(payload: bytes, *, compressed: bool = False) -> bytes:
    """Return `payload` behind gRPC's prefix of five bytes."""
    return bytes([compressed]) + len(payload).to_bytes(4, "big") + payload


def messages(data: bytes) -> list[bytes]:
    """Return the payloads of the messages that `data` holds; raises AssertionError when a part is left."""
    found = []
    while data:
        assert len(data) >= 5, "a message's prefix is cut off"
        size = int.from_bytes(data[1:5], "big")
        assert len(data) >= 5 + size, "a message is cut off"
        found.append(data[5 : 5 + size])
        data = data[5 + size :]
    return found


def raw_frame(kind: int, flags: int, stream: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a frame byte by byte: `kind`, `stream` (32 bits) and even `length` may be what no library would send."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


@dataclass
class Stream:
    """What the server has sent on a stream, and what is yet to be sent to it."""

    window: int
    """How many bytes of DATA the server still takes."""
    blocks: list[list[Field]] = field(default_factory=list)
    """Header blocks: the response's headers and its trailers, or both in one."""
    data: bytearray = field(default_factory=bytearray)
    frames: list[Frame] = field(default_factory=list)
    ended: bool = False
    reset: int | None = None
    unsent: bytearray = field(default_factory=bytearray)
    sent: int = 0

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.blocks[0]) if self.blocks else {}

    @property
    def trailers(self) -> dict[str, str]:
        return dict(self.blocks[-1]) if self.blocks and self.ended else {}

    @property
    def status(self) -> int | None:
        """The `grpc-status`, once the stream has ended with one."""
        value = self.trailers.get("grpc-status")
        return None if value is None else int(value)

    @property
    def status_message(self) -> str:
        """The `grpc-message`, decoded."""
        return unquote(self.trailers.get("grpc-message", ""), errors="strict")

    @property
    def refused(self) -> bool:
        """Whether it was answered, and with anything but success: an HTTP status, a gRPC status or a reset."""
        if self.reset is not None:
            return True
        return self.ended and (self.headers.get(":status") != "200" or self.status not in (0, None))


class Peer:
    """One connection. What the server sends is read all the time, acknowledged, and kept by stream."""

    def __init__(self, sock: socket.socket, *, window_updates: bool = True) -> None:
        self._sock, self._loop = sock, asyncio.get_running_loop()
        self._window_updates = window_updates
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._block = bytearray()
        self._defect: Exception | None = None
        self.max_frame_size = DEFAULT_FRAME_SIZE
        """The largest frame that the server may send."""
        self._next_id = 1
        self.encoder, self.decoder = Encoder(), Decoder(max_header_list_size=1 << 24)
        self.settings: dict[int, int] = {}
        """What the server has said."""
        self.settings_acks = 0
        self.pings: list[bytes] = []
        """Payloads of the acknowledged pings."""
        self.streams: dict[int, Stream] = {}
        self.window = DEFAULT_WINDOW
        """How many bytes of DATA the server still takes on all streams together."""
        self.goaways: list[GoAwayFrame] = []
        self.closed = False
        """Whether the server has closed the connection."""

    @classmethod
    async def connect(cls, port: int, *, window_updates: bool = True, receive_buffer: int | None = None) -> Self:
        """Connect and send nothing. `window_updates`: give back the window of every DATA frame that comes."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, receive_buffer)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock, window_updates=window_updates)

    def read(self) -> None:
        """Begin to read."""
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        """Close without a word, as a process that dies does."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        self._sock.close()

    async def send(self, *parts: Frame | bytes) -> None:
        """Send frames and bytes as they are, at once."""
        data = b"".join(part if isinstance(part, bytes) else part.serialize() for part in parts)
        async with asyncio.timeout(PATIENCE_S):
            await self._loop.sock_sendall(self._sock, data)

    async def receive(self) -> bytes:
        """Return the bytes that came next, as they are, or none at the end; not together with `read`."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._loop.sock_recv(self._sock, 1 << 16)
        except ConnectionError:
            return b""

    async def what_comes(self, patience_s: float) -> bytes:
        """Return the bytes that come until there are none for `patience_s`, or the end; not together with `read`."""
        received = b""
        with suppress(ConnectionError, TimeoutError):
            while True:
                async with asyncio.timeout(patience_s):
                    part = await self._loop.sock_recv(self._sock, 1 << 16)
                if not part:
                    break
                received += part
        return received

    async def try_send(self, *parts: Frame | bytes) -> bool:
        """Like `send`; returns whether the server still takes bytes, for those that break its rules."""
        try:
            await self.send(*parts)
        except (ConnectionError, TimeoutError):
            return False
        return True

    async def flood(self, data: bytes, limit: int, patience_s: float = 1.0) -> int:
        """Send `data` again and again; return the bytes sent when the server takes none, or after `limit`."""
        sent = 0
        with suppress(ConnectionError, TimeoutError):
            while sent < limit:
                async with asyncio.timeout(patience_s):
                    await self._loop.sock_sendall(self._sock, data)
                sent += len(data)
                if self.closed:
                    break
                await asyncio.sleep(0)
        return sent

    async def greet(self, settings: Settings | None = None) -> None:
        """Send the preface and settings, and wait until both sides know each other's."""
        mine = {int(code): value for code, value in (settings or {}).items()}
        self.max_frame_size = mine.get(SettingCodes.MAX_FRAME_SIZE, DEFAULT_FRAME_SIZE)
        self.read()
        await self.send(PREFACE, SettingsFrame(0, settings=mine))
        await self.until(lambda: self.settings_acks > 0, "the server acknowledges the settings")

    def header_block(self, fields: Sequence[Field]) -> bytes:
        """Return `fields` compressed, but for Huffman's code, which takes long where a field is."""
        return self.encoder.encode(fields, huffman=False)

    def new_stream(self) -> int:
        stream, self._next_id = self._next_id, self._next_id + 2
        return stream

    async def open(self, fields: Sequence[Field], *, end: bool = False) -> int:
        """Open a stream with one HEADERS frame and return its number."""
        stream = self.new_stream()
        flags = ["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"]
        await self.send(HeadersFrame(stream, self.header_block(fields), flags=flags))
        return stream

    async def call(self, fields: Sequence[Field], payload: bytes = b"") -> Stream:
        """Make a unary call as any client would, and return what it ended in."""
        stream = await self.open(fields)
        await self.write(stream, message(payload), end=True)
        return await self.end_of(stream)

    async def write(self, stream: int, data: bytes, *, end: bool = False, patience_s: float = PATIENCE_S) -> None:
        """Send as the server's windows allow; raises TimeoutError when they stay shut. What is left is kept, and sent
        before what is written next.
        """
        state = self.stream(stream)
        state.unsent += data
        size = self.settings.get(SettingCodes.MAX_FRAME_SIZE, DEFAULT_FRAME_SIZE)
        while state.unsent:
            if self.closed or state.over:
                raise ConnectionError("the stream or its connection is over")
            part = min(size, self.window, state.window, len(state.unsent))
            if part <= 0:
                await self.until(
                    lambda: (self.window > 0 and state.window > 0) or self.closed or state.over,
                    "the server opens a window",
                    patience_s,
                )
                continue
            frame = DataFrame(stream, bytes(state.unsent[:part]))
            del state.unsent[:part]
            self.window -= part
            state.window -= part
            state.sent += part
            await self.send(frame)
        if end:
            await self.send(DataFrame(stream, flags=["END_STREAM"]))

    def stream(self, number: int) -> Stream:
        if number not in self.streams:
            self.streams[number] = Stream(self.settings.get(SettingCodes.INITIAL_WINDOW_SIZE, DEFAULT_WINDOW))
        return self.streams[number]

    async def end_of(self, number: int) -> Stream:
        """Return the stream when the server has ended or reset it; raises ConnectionError when that cannot come."""
        stream = self.stream(number)
        await self.until(lambda: stream.over or self.closed, f"the server ends stream {number}")
        if not stream.over:
            raise ConnectionError(f"the connection was closed before the end of stream {number}")
        return stream

    async def until(self, predicate: Callable[[], T], what: str, patience_s: float = PATIENCE_S) -> T:
        """Return the first true result of `predicate`, asked whenever something has come from the server."""
        try:
            async with asyncio.timeout(patience_s):
                while not (result := predicate()) and self._defect is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"not within {patience_s:g} s: {what}") from None
        if self._defect is not None:
            raise AssertionError("the server sent what a client cannot read") from self._defect
        return result

    async def round_trip(self) -> None:
        """Return when the server has dealt with everything sent so far: it has acknowledged settings twice.

        The second answer leaves after everything that was on its way when the server had read the first. Pings would
        do, but servers count them.
        """
        for _ in range(2):
            expected = self.settings_acks + 1
            await self.send(SettingsFrame(0))
            await self.until(lambda expected=expected: self.settings_acks >= expected, "settings are acknowledged")  # type: ignore[misc]

    async def broken(self, patience_s: float = PATIENCE_S) -> int | None:
        """Wait until the server has ended the connection; return the error code that it gave, or None."""
        await self.until(lambda: self.closed or self.goaways, "the server ends the connection", patience_s)
        return self.goaways[-1].error_code if self.goaways else None

    async def _read(self) -> None:
        buffer = bytearray()
        try:
            while data := await self._loop.sock_recv(self._sock, 1 << 16):
                buffer += data
                replies = self._frames_in(buffer)
                self._changed.set()
                if replies:
                    await self._loop.sock_sendall(self._sock, b"".join(frame.serialize() for frame in replies))
        except ConnectionError:
            pass
        except Exception as error:  # noqa: BLE001 - raised to whoever waits
            self._defect = error
        self.closed = True
        self._changed.set()

    def _frames_in(self, buffer: bytearray) -> list[Frame]:
        replies: list[Frame] = []
        while len(buffer) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(bytes(buffer[:9])))
            assert length <= self.max_frame_size, f"a frame of {length} bytes: {frame!r}"
            if len(buffer) < 9 + length:
                break
            frame.parse_body(memoryview(bytes(buffer[9 : 9 + length])))
            del buffer[: 9 + length]
            replies += self._on_frame(frame)
        return replies

    def _on_frame(self, frame: Frame) -> list[Frame]:
        if isinstance(frame, DataFrame):
            return self._on_data(frame)
        if isinstance(frame, HeadersFrame | ContinuationFrame):
            self._on_headers(frame)
        elif isinstance(frame, RstStreamFrame):
            self.stream(frame.stream_id).reset = frame.error_code
        elif isinstance(frame, SettingsFrame):
            return self._on_settings(frame)
        elif isinstance(frame, PingFrame):
            if "ACK" not in frame.flags:
                return [PingFrame(0, frame.opaque_data, flags=["ACK"])]
            self.pings.append(frame.opaque_data)
        elif isinstance(frame, WindowUpdateFrame):
            if frame.stream_id:
                self.stream(frame.stream_id).window += frame.window_increment
            else:
                self.window += frame.window_increment
        elif isinstance(frame, GoAwayFrame):
            self.goaways.append(frame)
        return []

    def _on_data(self, frame: DataFrame) -> list[Frame]:
        stream = self.stream(frame.stream_id)
        assert not stream.over, "DATA after the end of the stream"
        assert stream.blocks, "DATA before the headers"
        stream.frames.append(frame)
        stream.data += frame.data
        stream.ended = "END_STREAM" in frame.flags
        if not self._window_updates or not frame.flow_controlled_length:
            return []
        size = frame.flow_controlled_length
        updates: list[Frame] = [WindowUpdateFrame(0, size)]
        return updates if stream.ended else [*updates, WindowUpdateFrame(frame.stream_id, size)]

    def _on_headers(self, frame: HeadersFrame | ContinuationFrame) -> None:
        stream = self.stream(frame.stream_id)
        stream.frames.append(frame)
        self._block += frame.data
        if "END_HEADERS" in frame.flags:
            fields = self.decoder.decode(bytes(self._block), raw=True)
            stream.blocks.append([(name.decode("ascii"), value.decode("ascii")) for name, value in fields])
            self._block.clear()
            opened = next(part for part in reversed(stream.frames) if isinstance(part, HeadersFrame))
            stream.ended = "END_STREAM" in opened.flags

    def _on_settings(self, frame: SettingsFrame) -> list[Frame]:
        if "ACK" in frame.flags:
            self.settings_acks += 1
            return []
        before = self.settings.get(SettingCodes.INITIAL_WINDOW_SIZE, DEFAULT_WINDOW)
        self.settings.update(frame.settings)
        more = self.settings.get(SettingCodes.INITIAL_WINDOW_SIZE, DEFAULT_WINDOW) - before
        for stream in self.streams.values():
            stream.window += more
        return [SettingsFrame(0, flags=["ACK"])]


@asynccontextmanager
async def peer(port: int, settings: Settings | None = None, *, window_updates: bool = True) -> AsyncIterator[Peer]:
    """A connection on which preface and settings are exchanged; closed without a word at the end."""
    connected = await Peer.connect(port, window_updates=window_updates)
    try:
        await connected.greet(settings)
        yield connected
    finally:
        await connected.close()


@asynccontextmanager
async def stranger(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[Peer]:
    """A connection on which nothing was sent, and nothing is read before `read`."""
    connected = await Peer.connect(port, receive_buffer=receive_buffer)
    try:
        yield connected
    finally:
        await connected.close()


async def check(port: int) -> None:
    """Ask for the server's health by the library `h2`, which raises ProtocolError when the server breaks a rule."""
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            headers, data, trailers = await _ask(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
    assert headers[b":status"] == b"200"
    assert trailers.get(b"grpc-status", headers.get(b"grpc-status")) == b"0"
    (payload,) = messages(data)
    assert health_pb2.HealthCheckResponse.FromString(payload).status == health_pb2.HealthCheckResponse.SERVING


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[dict[bytes, bytes], bytes, dict[bytes, bytes]]:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
    client.initiate_connection()
    client.send_headers(1, request(CHECK))
    client.send_data(1, message(b""), end_stream=True)
    headers: dict[bytes, bytes] = {}
    trailers: dict[bytes, bytes] = {}
    body = bytearray()
    while True:
        writer.write(client.data_to_send())
        received = await reader.read(1 << 16)
        assert received, "the connection was closed before the answer"
        for event in client.receive_data(received):
            if isinstance(event, h2.events.ResponseReceived):
                headers = dict(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                body += event.data
                client.acknowledge_received_data(event.flow_controlled_length, 1)
            elif isinstance(event, h2.events.TrailersReceived):
                trailers = dict(event.headers)
            elif isinstance(event, h2.events.StreamEnded):
                return headers, bytes(body), trailers
            elif isinstance(event, h2.events.StreamReset):
                raise AssertionError(f"the call was reset: {ErrorCodes(event.error_code).name}")


def decode_bin(value: str) -> bytes:
    """Return a `-bin` metadata value, padded or not."""
    return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
