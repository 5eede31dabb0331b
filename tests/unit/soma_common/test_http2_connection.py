"""What one peer may make a connection keep and do, without a socket: frames in, frames out.

The limits are those of RFC 9113, sections 5.1, 6.5.2 and 6.8, and of the CVEs that limits.py names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import pytest
from hpack import Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from soma_common.http2.client import ClientConnection
from soma_common.http2.connection import Connection, Keepalive
from soma_common.http2.frames import FIRST_WINDOW, LARGEST_STREAM, PREFACE, ErrorCode
from soma_common.http2.headers import MAX_BLOCK_BYTES, Headers, encode
from soma_common.http2.limits import MAX_FRAME, MAX_STREAMS, STREAM_WINDOW
from soma_common.http2.server import ServerConnection
from soma_common.http2.stream import Stream, StreamLost

REQUEST: Final = [(":method", "POST"), (":scheme", "http"), (":path", "/a.B/C"), (":authority", "x")]
BLOCK: Final = encode(REQUEST)
WASTE: Final = 2_000
"""How much may come to nothing within a second."""
HEADER_BYTES: Final = 32 << 20
"""What the headers of all open requests may take."""
LATER_S: Final = 2.0

CALM, CANCEL, CLOSED, REFUSED = (
    ErrorCode.ENHANCE_YOUR_CALM,
    ErrorCode.CANCEL,
    ErrorCode.STREAM_CLOSED,
    ErrorCode.REFUSED_STREAM,
)


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self._written = bytearray()

    def write(self, data: Any) -> None:
        self._written += data

    def written(self) -> list[Frame]:
        """The frames that were written since this was last asked."""
        data, at, found = bytes(self._written), 0, []
        self._written.clear()
        while at < len(data):
            frame, length = Frame.parse_frame_header(memoryview(data)[at : at + 9])
            at += 9 + length
            frame.parse_body(memoryview(data)[at - length : at])
            found.append(frame)
        return found

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write_eof(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


class Receiver:
    """Counts the bytes of a message."""

    def __init__(self) -> None:
        self.bytes = 0

    def headers_received(self, headers: Headers) -> None:
        pass

    def data_received(self, data: bytes) -> None:
        self.bytes += len(data)

    def end_received(self) -> None:
        pass

    def stream_lost(self, lost: StreamLost) -> None:
        pass


class Server:
    """The server's end of a connection, and its peer, which numbers its streams."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.connection = ServerConnection(Keepalive(1e6, 1e6), lambda _connection: None, self._accept)
        self.clock_s = asyncio.get_running_loop().time()
        self.connection._now = lambda: self.clock_s
        self.accepted: dict[int, Stream] = {}
        self.is_refusing = False
        self._next = 1
        self.connection.connection_made(self.wire)
        self.send(PREFACE, SettingsFrame(0))
        self.wire.written()

    def _accept(self, stream: Stream, _headers: Headers) -> None:
        stream.receiver = Receiver()
        if self.is_refusing:
            stream.send_headers(encode([(":status", "415")]), end=True)
            if not stream.remote_ended:
                stream.reset(ErrorCode.NO_ERROR)
        else:
            self.accepted[stream.id] = stream

    def send(self, *parts: Frame | bytes) -> None:
        self.connection.data_received(b"".join(part if isinstance(part, bytes) else part.serialize() for part in parts))

    def open(self, block: bytes = BLOCK, *, end: bool = False) -> int:
        """The number of a stream that the peer opens."""
        number, self._next = self._next, self._next + 2
        self.send(HeadersFrame(number, block, flags=["END_HEADERS", *(["END_STREAM"] if end else [])]))
        return number

    def open_and_reset(self) -> int:
        """The number of a stream that the server has reset."""
        number = self.open()
        self.accepted[number].reset(CANCEL)
        return number

    def send_until_ended(self, frames: Iterable[Frame]) -> int:
        """How many of the frames the peer could send before the connection was ended."""
        sent = 0
        for frame in frames:
            if self.connection.closed:
                break
            self.send(frame)
            sent += 1
        return sent

    def goaways(self) -> list[tuple[int, int]]:
        """Last stream and code of each GOAWAY since what was written was last asked for."""
        return [
            (frame.last_stream_id, frame.error_code) for frame in self.wire.written() if isinstance(frame, GoAwayFrame)
        ]

    def resets(self) -> dict[int, int]:
        """Streams and codes of the RST_STREAM since what was written was last asked for."""
        return {frame.stream_id: frame.error_code for frame in self.wire.written() if isinstance(frame, RstStreamFrame)}


@pytest.fixture
async def server() -> Server:
    return Server()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# --- senders that wait for the connection's window


async def waiting(server: Server, count: int) -> tuple[list[int], list[asyncio.Task[None]]]:
    """Streams, each with a sender that waits because another has used the connection's window up."""
    server.send(SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 1 << 30}))
    await server.accepted[server.open()].send(bytes(FIRST_WINDOW))
    numbers = [server.open() for _ in range(count)]
    tasks = [asyncio.create_task(server.accepted[number].send(b"%d" % number)) for number in numbers]
    await settle()
    assert len(server.connection.queue) == count
    return numbers, tasks


def end_and_reset(stream: Stream) -> None:
    """As a call ends at its deadline."""
    stream.send_headers(encode([("grpc-status", "4")]), end=True)
    stream.reset(ErrorCode.NO_ERROR)


def end_both(server: Server, number: int) -> None:
    """As a call ends that went well."""
    server.send(DataFrame(number, flags=["END_STREAM"]))
    server.accepted[number].end()


ENDS: dict[str, Callable[[Server, int], None]] = {
    "the peer resets it": lambda server, number: server.send(RstStreamFrame(number, CANCEL)),
    "this end resets it": lambda server, number: server.accepted[number].reset(CANCEL),
    "its deadline is over": lambda server, number: end_and_reset(server.accepted[number]),
    "the peer breaks a rule on it": lambda server, number: server.send(WindowUpdateFrame(number, LARGEST_STREAM)),
    "both ends have said everything": end_both,
}


@pytest.mark.parametrize("how", ENDS)
async def test_a_stream_that_is_over_waits_for_no_window(server: Server, how: str) -> None:
    numbers, tasks = await waiting(server, 20)
    for number in numbers:
        ENDS[how](server, number)
    async with asyncio.timeout(5):
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, StreamLost) for end in ends)
    assert len(server.connection.queue) == 0
    assert list(server.connection.streams) == [1]


async def test_peers_that_open_and_reset_for_ever_leave_nothing_behind(server: Server) -> None:
    await waiting(server, 1)
    for _ in range(50):
        number = server.open()
        sending = asyncio.create_task(server.accepted[number].send(b"x"))
        await settle()
        server.send(RstStreamFrame(number, CANCEL))
        assert isinstance((await asyncio.gather(sending, return_exceptions=True))[0], StreamLost)
    assert len(server.connection.queue) == 1


async def test_room_goes_to_who_has_waited_longest(server: Server) -> None:
    """One that is over in the middle changes nothing for the others."""
    numbers, tasks = await waiting(server, 5)
    server.wire.written()
    server.send(RstStreamFrame(numbers[1], CANCEL))
    await settle()
    for _ in range(100):
        server.send(WindowUpdateFrame(0, 1))
        await settle()
    sent = [frame for frame in server.wire.written() if isinstance(frame, DataFrame)]
    order = list(dict.fromkeys(frame.stream_id for frame in sent))
    assert order == [number for number in numbers if number != numbers[1]]
    assert [task.exception() for task in tasks if task is not tasks[1]] == [None] * 4
    assert not server.connection.queue


async def test_a_closed_connection_lets_all_senders_go(server: Server) -> None:
    _, tasks = await waiting(server, 5)
    server.connection.close()
    async with asyncio.timeout(5):
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, StreamLost) for end in ends)
    assert not server.connection.queue


# --- what comes to nothing


FOR_NOTHING: dict[str, Callable[[int], Frame]] = {
    "empty DATA": lambda number: DataFrame(number),
    "HEADERS that end nothing": lambda number: HeadersFrame(number, encode([("a", "b")]), flags=["END_HEADERS"]),
}


async def test_empty_data_on_an_open_stream_is_bounded(server: Server) -> None:
    """CVE-2019-9518."""
    number = server.open()
    sent = server.send_until_ended(DataFrame(number) for _ in range(3 * WASTE))
    assert WASTE <= sent <= WASTE + 1
    assert server.goaways() == [(number, CALM)]


@pytest.mark.parametrize("what", FOR_NOTHING)
async def test_what_says_nothing_on_a_stream_that_was_reset_is_bounded(server: Server, what: str) -> None:
    number = server.open_and_reset()
    sent = server.send_until_ended(FOR_NOTHING[what](number) for _ in range(3 * WASTE))
    assert WASTE <= sent <= WASTE + 1
    assert server.goaways() == [(number, CALM)]


async def test_some_empty_data_now_and_then_is_no_offence(server: Server) -> None:
    number = server.open()
    for _ in range(5):
        assert server.send_until_ended(DataFrame(number) for _ in range(WASTE // 2)) == WASTE // 2
        server.clock_s += LATER_S
    server.send(DataFrame(number, b"data"))
    assert not server.connection.closed
    receiver = server.accepted[number].receiver
    assert isinstance(receiver, Receiver)
    assert receiver.bytes == 4


@pytest.mark.parametrize(
    "frame_of",
    [
        pytest.param(lambda number: DataFrame(number), id="DATA"),
        pytest.param(lambda number: DataFrame(number, b"x"), id="DATA that is not empty"),
        pytest.param(lambda number: DataFrame(number, flags=["END_STREAM"]), id="DATA that ends"),
        pytest.param(lambda number: b"\0\0\4\x08\0" + number.to_bytes(4, "big") + bytes(4), id="WINDOW_UPDATE of 0"),
        pytest.param(lambda number: PriorityFrame(number, depends_on=number), id="PRIORITY on itself"),
    ],
)
async def test_faults_on_streams_that_ended_long_ago_are_bounded(
    server: Server, frame_of: Callable[[int], Frame]
) -> None:
    """Each is answered by a reset: that the stream is an old one makes it no cheaper."""
    numbers = [server.open() for _ in range(3 * WASTE)]
    for number in numbers:
        end_both(server, number)
    assert not server.connection.streams
    server.clock_s += LATER_S
    sent = server.send_until_ended(frame_of(number) for number in numbers)
    assert WASTE <= sent <= WASTE + 1
    assert server.goaways() == [(numbers[-1], CALM)]


@pytest.mark.parametrize("end", [False, True])
async def test_requests_that_are_refused_are_bounded(server: Server, end: bool) -> None:
    server.is_refusing = True
    opened = 0
    while not server.connection.closed and opened < 3 * WASTE:
        server.open(end=end)
        opened += 1
    assert WASTE <= opened <= WASTE + 2
    assert [code for _, code in server.goaways()] == [CALM]


async def test_requests_that_are_refused_slowly_are_answered(server: Server) -> None:
    server.is_refusing = True
    for _ in range(3):
        for _ in range(WASTE // 2):
            server.open()
        server.clock_s += LATER_S
    assert not server.connection.closed
    answers = [frame for frame in server.wire.written() if isinstance(frame, HeadersFrame)]
    assert len(answers) == 3 * (WASTE // 2)


# --- what was under way when a stream was reset


async def test_what_was_under_way_is_dropped_without_a_word(server: Server) -> None:
    number = server.open_and_reset()
    server.wire.written()
    server.send(*(DataFrame(number, bytes(MAX_FRAME)) for _ in range(STREAM_WINDOW // MAX_FRAME)))
    server.send(WindowUpdateFrame(number, 1))
    server.send(HeadersFrame(number, encode([("x-trailer", "late")]), flags=["END_HEADERS", "END_STREAM"]))
    server.send(WindowUpdateFrame(number, 1), RstStreamFrame(number, CANCEL))
    assert server.wire.written() == []
    assert not server.connection.closed


async def test_more_than_its_window_cannot_have_been_under_way(server: Server) -> None:
    number = server.open()
    server.send(DataFrame(number, bytes(1000)))
    server.accepted[number].reset(CANCEL)
    left = STREAM_WINDOW - 1000
    server.send(*(DataFrame(number, bytes(min(MAX_FRAME, left - at))) for at in range(0, left, MAX_FRAME)))
    assert not server.connection.closed
    server.send(DataFrame(number, b"x"))
    assert server.connection.closed
    assert server.goaways() == [(number, ErrorCode.FLOW_CONTROL_ERROR)]


async def test_nothing_is_under_way_behind_the_end(server: Server) -> None:
    number = server.open_and_reset()
    server.send(DataFrame(number, b"x", flags=["END_STREAM"]))
    server.wire.written()
    server.send(DataFrame(number, b"x"))
    assert server.resets() == {number: CLOSED}


async def test_all_streams_that_are_open_may_be_reset_at_once(server: Server) -> None:
    """What was under way on each of them is known for what it is. To know it costs the same for one and for all: they
    are looked up once for each frame.
    """
    numbers = [server.open() for _ in range(MAX_STREAMS)]
    for number in numbers:
        server.accepted[number].reset(CANCEL)
    server.wire.written()
    assert len(server.connection._own_resets) == MAX_STREAMS
    assert not isinstance(server.connection._own_resets, Sequence)
    for number in numbers:
        server.send(DataFrame(number, b"x"), DataFrame(number, flags=["END_STREAM"]))
    assert not server.connection.closed
    assert server.resets() == {}
    assert not server.connection._own_resets


async def test_no_more_resets_are_remembered_than_streams_may_be_open(server: Server) -> None:
    for _ in range(MAX_STREAMS + 10):
        server.open_and_reset()
    assert len(server.connection._own_resets) == MAX_STREAMS


# --- headers of open streams


def heavy(encoder: Encoder) -> bytes:
    """Headers that decode to nearly as much as a block may, and are a few bytes when the table knows them."""
    return bytes(encoder.encode([*REQUEST, *[("p", "y" * 3700)] * 17], huffman=False))


def fill(server: Server, encoder: Encoder) -> list[int]:
    """Opens heavy streams until one is refused; returns those that were not."""
    taken: list[int] = []
    for _ in range(2 * HEADER_BYTES // MAX_BLOCK_BYTES):
        number = server.open(heavy(encoder))
        if number not in server.accepted:
            break
        taken.append(number)
    return taken


async def test_small_blocks_that_make_large_headers_are_bounded_together(server: Server) -> None:
    encoder = Encoder()
    taken = fill(server, encoder)
    assert 0.9 * HEADER_BYTES < len(taken) * 17 * (3700 + 1 + 32) <= HEADER_BYTES
    assert server.resets() == {taken[-1] + 2: REFUSED}
    assert not server.connection.closed


async def test_the_room_of_headers_is_given_back_at_the_end_of_a_stream(server: Server) -> None:
    encoder = Encoder()
    for how, number in zip(ENDS, fill(server, encoder), strict=False):
        assert server.open(heavy(encoder)) not in server.accepted
        ENDS[how](server, number)
        assert server.open(heavy(encoder)) in server.accepted
    assert server.open(heavy(encoder)) not in server.accepted
    for stream in list(server.connection.streams.values()):
        stream.reset(CANCEL)
    assert server.connection.header_bytes == 0


async def test_as_many_lawful_calls_as_streams_have_room_for_their_headers() -> None:
    """Each with a token of 2 KiB, a trace and what gRPC sends along."""
    fields = [
        *REQUEST,
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "grpc-python-asyncio/1.76.0 grpc-c/51.0.0 (linux; chttp2)"),
        ("grpc-timeout", "9999999u"),
        ("traceparent", "0" * 55),
        ("authorization", "Bearer " + "t" * 2048),
    ]
    assert sum(len(name) + len(value) + 32 for name, value in fields) * MAX_STREAMS < HEADER_BYTES
    server = Server()
    encoder = Encoder()
    for _ in range(100):
        assert server.open(encoder.encode(fields, huffman=False)) in server.accepted
    assert server.connection.header_bytes * (MAX_STREAMS // 100) < HEADER_BYTES


# --- the last stream of GOAWAY


async def test_the_last_stream_of_goaway_never_rises(server: Server) -> None:
    first = server.open()
    server.connection.go_away("the server is stopping")
    late = [server.open(), server.open()]
    written = server.wire.written()
    assert [frame.stream_id for frame in written if isinstance(frame, RstStreamFrame)] == late
    assert [frame.last_stream_id for frame in written if isinstance(frame, GoAwayFrame)] == [first]
    server.send(b"\0\0\x08\x06\0\0\0\0\1" + bytes(8))  # PING on a stream
    assert server.goaways() == [(first, ErrorCode.PROTOCOL_ERROR)]


async def test_goaway_names_the_last_stream_that_was_opened(server: Server) -> None:
    numbers = [server.open() for _ in range(3)]
    server.send(b"\0\0\x08\x06\0\0\0\0\1" + bytes(8))
    assert server.goaways() == [(numbers[-1], ErrorCode.PROTOCOL_ERROR)]


async def test_a_client_that_goes_away_names_no_stream_of_the_server() -> None:
    def gone(_connection: Connection) -> None:
        pass

    wire = Wire()
    connection = ClientConnection(Keepalive(1e6, 1e6), "x", gone)
    connection.connection_made(wire)
    connection.open(Receiver(), BLOCK)
    connection.go_away("done")
    connection.fail(ErrorCode.PROTOCOL_ERROR, "a rule is broken")
    wire._written = wire._written.removeprefix(PREFACE)
    assert [frame.last_stream_id for frame in wire.written() if isinstance(frame, GoAwayFrame)] == [0, 0]
