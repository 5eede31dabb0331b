"""The server's side of HTTP/2 (RFC 9113) and of gRPC over it, seen by a peer that writes its own frames.

The first part keeps the rules and looks at the answers; the second breaks them and looks at who else is still served.
"""

import asyncio
import base64
import gzip
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from soma.cognition.v1.cognition_service_pb2 import RunTurnsRequest, RunTurnsResponse, StartTurn
from soma.cognition.v1.cognition_service_pb2_grpc import (
    CognitionServiceServicer,
    add_CognitionServiceServicer_to_server,
)
from soma.common.v1 import error_reason_pb2
from soma.toolgw.v1.tool_service_pb2 import ListToolsRequest, ListToolsResponse
from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceServicer, add_ToolServiceServicer_to_server

from soma_common.errors import NotFound
from soma_common.grpc import listener
from soma_common.grpc.call_context import time_left_s
from soma_common.grpc.server import GrpcServer
from soma_common.http2.server import ServerConnection
from soma_common.settings import ServiceSettings
from soma_common.testing.auth import Identities
from soma_common.testing.eventually import eventually
from tests.integration.soma_common.h2_peer import (
    CHECK,
    DEFAULT_FRAME_SIZE,
    DEFAULT_WINDOW,
    GRACEFUL,
    PREFACE,
    Field,
    Peer,
    Stream,
    check,
    decode_bin,
    message,
    messages,
    peer,
    raw_frame,
    request,
    stranger,
)

LIST = "/soma.toolgw.v1.ToolService/ListTools"
RUN = "/soma.cognition.v1.CognitionService/RunTurns"
DEMO = ListToolsRequest(parent="tenants/demo").SerializeToString()
SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()

LIMIT = 1 << 20
"""Largest message of the server that the tests run against."""
MUCH = 24 << 20
"""More bytes than the buffers of two sockets hold: a server that takes so many without being read keeps them."""
BOUND = 8 << 20
"""More than a server may keep of a stream that nobody reads."""

OK, DEADLINE_EXCEEDED, NOT_FOUND, RESOURCE_EXHAUSTED, UNIMPLEMENTED = 0, 4, 5, 8, 12


class Tools(ToolServiceServicer):
    """Answers with `size` letters after `behave`."""

    def __init__(self) -> None:
        self.parents: list[str] = []
        self.metadata: list[list[tuple[str, str | bytes]]] = []
        self.time_left: list[float] = []
        self.running = 0
        self.size = 0
        self.behave: Callable[[], Coroutine[Any, Any, object]] | None = None

    async def ListTools(self, request: ListToolsRequest, context: Any) -> ListToolsResponse:
        self.parents.append(request.parent)
        self.metadata.append(list(context.invocation_metadata()))
        self.time_left.append(time_left_s() or 0)
        self.running += 1
        try:
            if self.behave is not None:
                await self.behave()
        finally:
            self.running -= 1
        return ListToolsResponse(next_page_token="x" * self.size)


class Brain(CognitionServiceServicer):
    """Answers each frame with one that grants as much credit as the frame has starts. A stream whose first frame has
    none waits for `reading` before it reads another.
    """

    def __init__(self) -> None:
        self.reading = asyncio.Event()
        self.frames = 0
        self.running = 0

    async def RunTurns(
        self, request_iterator: AsyncIterator[RunTurnsRequest], context: Any
    ) -> AsyncIterator[RunTurnsResponse]:
        self.running += 1
        first = True
        try:
            async for frame in request_iterator:
                self.frames += 1
                yield RunTurnsResponse(credit=len(frame.starts))
                if first and not frame.starts:
                    await self.reading.wait()
                first = False
        finally:
            self.running -= 1


class Served:
    """A running server, what it serves, and a caller that may call everything."""

    def __init__(self, identities: Identities, **settings: Any) -> None:
        self.tools, self.brain = Tools(), Brain()  # type: ignore[abstract] # what is not called is not written
        self.server = GrpcServer(
            ServiceSettings(service_instance="toolgw-0", grpc_max_message_bytes=LIMIT, **settings),
            identities.authorizer(),
            services=[
                (add_ToolServiceServicer_to_server, self.tools, "soma.toolgw.v1.ToolService"),
                (add_CognitionServiceServicer_to_server, self.brain, "soma.cognition.v1.CognitionService"),
            ],
        )
        self.authorization = ("authorization", f"Bearer {identities.token('tester', '*', ['admin', 'service'])}")

    @property
    def port(self) -> int:
        return self.server.port

    def list_tools(self, *more: Field) -> list[Field]:
        return request(LIST, self.authorization, *more)

    def run_turns(self, *more: Field) -> list[Field]:
        return request(RUN, self.authorization, *more)


@pytest.fixture
async def served(identities: Identities) -> AsyncIterator[Served]:
    running = Served(identities)
    await running.server.start()
    await running.server.set_serving(True)
    yield running
    await running.server.stop(0)


def frame_of(starts: int = 1, size: int = 0) -> bytes:
    """A message of `RunTurns` of about `size` bytes, most of them in a field that its reader skips."""
    frame = RunTurnsRequest(starts=[StartTurn() for _ in range(starts)]).SerializeToString()
    if size:
        length = bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])
        frame += b"\xfa\x3f" + length + bytes(size)  # field 1023, length-delimited
    return message(frame)


def credits_of(stream: Stream) -> list[int]:
    return [RunTurnsResponse.FromString(payload).credit for payload in messages(bytes(stream.data))]


async def taken(connection: Peer, number: int, data: bytes) -> bool:
    """Send `data` on a stream; return whether the server gave windows for it. If not, the rest of it waits."""
    try:
        await connection.write(number, data, patience_s=1)
    except TimeoutError:
        return False
    return True


async def usable(connection: Peer) -> None:
    """Raises AssertionError unless another call on the connection is answered well."""
    answer = await connection.call(request(CHECK))
    assert (answer.status, messages(bytes(answer.data))) == (OK, [SERVING])


# --- Answers


async def test_the_library_h2_finds_no_fault_with_a_call(served: Served) -> None:
    await check(served.port)


async def test_a_unary_call_is_answered_by_headers_one_message_and_trailers(served: Served) -> None:
    async with peer(served.port) as connection:
        answer = await connection.call(request(CHECK))
    headers, trailers = answer.blocks
    assert headers[0] == (":status", "200")
    assert dict(headers)["content-type"].startswith("application/grpc")
    assert "grpc-status" not in dict(headers)
    assert bytes(answer.data) == message(SERVING)
    assert dict(trailers)["grpc-status"] == "0"
    assert not any(name.startswith(":") for name, _ in trailers)


async def test_what_is_written_leaves_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TCP_NODELAY the end of an answer waits for the acknowledgement of its beginning, which may take 40 ms."""
    accepted: list[asyncio.BaseTransport] = []

    class Noted(ServerConnection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.append(transport)
            super().connection_made(transport)

    monkeypatch.setattr(listener, "ServerConnection", Noted)
    async with peer(served.port) as connection:
        await usable(connection)
        [transport] = accepted
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("content_type", ["application/grpc+proto", "application/grpc;charset=utf-8"])
async def test_other_names_of_the_content_type_are_known(served: Served, content_type: str) -> None:
    async with peer(served.port) as connection:
        answer = await connection.call(request(CHECK, content_type=content_type))
    assert answer.status == OK


async def test_an_error_comes_in_the_trailers_with_message_and_details(served: Served) -> None:
    said = "kein Mandant „Bücher“: 100 % weg\n東京"

    async def fail() -> None:
        raise NotFound(error_reason_pb2.ERROR_REASON_TENANT_NOT_FOUND, said, {"tenant": "bücher"})

    served.tools.behave = fail
    async with peer(served.port) as connection:
        answer = await connection.call(served.list_tools(), DEMO)
        await usable(connection)
    assert answer.headers[":status"] == "200"
    assert answer.headers["content-type"].startswith("application/grpc")
    assert answer.data == b""
    assert answer.status == NOT_FOUND
    assert all(" " <= letter <= "~" for letter in answer.trailers["grpc-message"])
    assert answer.status_message == said
    details = status_pb2.Status.FromString(decode_bin(answer.trailers["grpc-status-details-bin"]))
    assert (details.code, details.message) == (NOT_FOUND, said)
    assert [detail.type_url.rpartition(".")[2] for detail in details.details] == ["ErrorInfo"]


@pytest.mark.parametrize("path", ["/soma.toolgw.v1.ToolService/Nothing", "/no.such.Service/ListTools", "/", "/x"])
async def test_a_method_that_is_not_known_is_unimplemented(served: Served, path: str) -> None:
    async with peer(served.port) as connection:
        answer = await connection.call(request(path), DEMO)
        assert answer.headers[":status"] == "200"
        assert answer.status == UNIMPLEMENTED
        await usable(connection)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(request(CHECK, method="GET"), id="GET"),
        pytest.param(request(CHECK, method="PUT"), id="PUT"),
        pytest.param(request(CHECK, content_type="text/html"), id="text"),
        pytest.param(request(CHECK, content_type="application/grpcx"), id="grpcx"),
        pytest.param(request(CHECK, content_type=None), id="no content type"),
    ],
)
async def test_what_is_no_call_is_refused_and_the_connection_goes_on(served: Served, fields: list[Field]) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(fields)
        # The server may have refused it before the message is on its way.
        await connection.send(DataFrame(number, message(b""), flags=["END_STREAM"]))
        assert (await connection.end_of(number)).refused
        await usable(connection)


async def test_an_answer_longer_than_a_frame_is_split_at_the_peers_size(served: Served) -> None:
    served.tools.size = 100_000
    async with peer(served.port) as connection:
        answer = await connection.call(served.list_tools(), DEMO)
        assert len(messages(bytes(answer.data))[0]) > 100_000
    larger = {SettingCodes.MAX_FRAME_SIZE: 1 << 16, SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20}
    async with peer(served.port, larger) as connection:
        answer = await connection.call(served.list_tools(), DEMO)
        assert len(messages(bytes(answer.data))[0]) > 100_000


async def test_trailers_longer_than_a_frame_are_continued(served: Served) -> None:
    said = "x" * 3 * DEFAULT_FRAME_SIZE

    async def fail() -> None:
        raise NotFound(error_reason_pb2.ERROR_REASON_TENANT_NOT_FOUND, said)

    served.tools.behave = fail
    async with peer(served.port, {SettingCodes.MAX_HEADER_LIST_SIZE: 1 << 20}) as connection:
        answer = await connection.call(served.list_tools(), DEMO)
        assert answer.status == NOT_FOUND
        assert answer.status_message == said
        assert any(isinstance(frame, ContinuationFrame) for frame in answer.frames)
        await usable(connection)


async def test_a_peer_without_a_header_table_can_read_every_answer(served: Served) -> None:
    async with stranger(served.port) as connection:
        connection.decoder.max_allowed_table_size = 0
        await connection.greet({SettingCodes.HEADER_TABLE_SIZE: 0})
        for _ in range(3):
            await usable(connection)


# --- Requests in every lawful form


async def test_a_header_block_may_be_continued_at_every_byte(served: Served) -> None:
    async with peer(served.port) as connection:
        cut, size = 0, 1
        while cut <= size:
            number = connection.new_stream()
            block = connection.header_block(request(CHECK, ("x-number", str(number))))
            size = len(block)
            rest = ContinuationFrame(number, block[cut:], flags=["END_HEADERS"])
            await connection.send(HeadersFrame(number, block[:cut]), rest)
            await connection.write(number, message(b""), end=True)
            assert (await connection.end_of(number)).status == OK, cut
            cut += 1


async def test_a_header_block_may_be_continued_several_times(served: Served) -> None:
    async with peer(served.port) as connection:
        number = connection.new_stream()
        block = connection.header_block(served.list_tools(("x-long", "y" * 500)))
        parts = [ContinuationFrame(number, block[at : at + 100]) for at in range(50, len(block), 100)]
        parts[-1].flags.add("END_HEADERS")
        await connection.send(HeadersFrame(number, block[:50]), *parts)
        await connection.write(number, message(DEMO), end=True)
        assert (await connection.end_of(number)).status == OK
    assert ("x-long", "y" * 500) in served.tools.metadata[0]


@pytest.mark.parametrize(
    ("flags", "padding"),
    [({"PRIORITY"}, 0), ({"PADDED"}, 0), ({"PADDED"}, 1), ({"PADDED"}, 255), ({"PADDED", "PRIORITY"}, 255)],
)
async def test_padding_and_priority_of_headers_are_no_part_of_the_call(
    served: Served, flags: set[str], padding: int
) -> None:
    async with peer(served.port) as connection:
        number = connection.new_stream()
        headers = HeadersFrame(
            number,
            connection.header_block(served.list_tools()),
            pad_length=padding,
            depends_on=0,
            stream_weight=15,
            flags=["END_HEADERS", *sorted(flags)],
        )
        await connection.send(headers, DataFrame(number, message(DEMO), flags=["END_STREAM"]))
        assert (await connection.end_of(number)).status == OK
    assert served.tools.parents == ["tenants/demo"]


@pytest.mark.parametrize("padding", [0, 1, 255])
async def test_padding_of_data_is_no_part_of_the_call(served: Served, padding: int) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools())
        await connection.send(DataFrame(number, message(DEMO)[:6], pad_length=padding, flags=["PADDED"]))
        rest = DataFrame(number, message(DEMO)[6:], pad_length=padding, flags=["PADDED", "END_STREAM"])
        await connection.send(rest)
        assert (await connection.end_of(number)).status == OK
    assert served.tools.parents == ["tenants/demo"]


async def test_padding_counts_for_the_windows_and_they_are_given_back(served: Served) -> None:
    """More padding than all windows hold, over a stream and a connection that the server must keep open."""
    async with peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        stream = connection.stream(number)
        total = 0
        while total < 2 * max(connection.window, DEFAULT_WINDOW) and total < BOUND:
            await connection.until(lambda: min(connection.window, stream.window) >= 256, "the server opens a window")
            await connection.send(DataFrame(number, b"", pad_length=255, flags=["PADDED"]))
            connection.window -= 256
            stream.window -= 256
            total += 256
        await connection.write(number, frame_of(), end=True)
        assert (await connection.end_of(number)).status == OK
    assert credits_of(stream) == [1]


async def test_priority_and_frames_of_unknown_types_are_ignored(served: Served) -> None:
    unknown = [raw_frame(kind, 0xFF, stream, b"whatever") for kind in (0x0B, 0x42, 0xFF) for stream in (0, 1, 77)]
    async with peer(served.port) as connection:
        priorities = [PriorityFrame(number, depends_on=0, stream_weight=200) for number in (1, 3, 99)]
        await connection.send(*priorities, *unknown)
        number = await connection.open(served.list_tools())
        await connection.send(*unknown, PriorityFrame(number, depends_on=0, stream_weight=1))
        await connection.write(number, message(DEMO), end=True)
        assert (await connection.end_of(number)).status == OK
        await connection.send(PriorityFrame(number, depends_on=0, stream_weight=1))
        await usable(connection)


async def test_the_reserved_bit_of_a_streams_number_is_ignored(served: Served) -> None:
    async with peer(served.port) as connection:
        number = connection.new_stream()
        block = connection.header_block(served.list_tools())
        await connection.send(raw_frame(0x1, 0x4, number | 1 << 31, block))
        await connection.send(raw_frame(0x0, 0x1, number | 1 << 31, message(DEMO)))
        assert (await connection.end_of(number)).status == OK


async def test_stream_numbers_may_skip(served: Served) -> None:
    async with peer(served.port) as connection:
        for number in (5, 7, 1001, 2**31 - 1):
            headers = HeadersFrame(number, connection.header_block(served.list_tools()), flags=["END_HEADERS"])
            await connection.send(headers, DataFrame(number, message(DEMO), flags=["END_STREAM"]))
            assert (await connection.end_of(number)).status == OK


async def test_a_ping_is_answered_with_its_payload(served: Served) -> None:
    async with peer(served.port) as connection:
        await connection.send(PingFrame(0, b"\x00\xff ping!"))
        await connection.until(lambda: connection.pings, "the ping is answered")
    assert connection.pings == [b"\x00\xff ping!"]


async def test_every_settings_frame_is_acknowledged_and_unknown_settings_are_ignored(served: Served) -> None:
    async with peer(served.port) as connection:
        await connection.send(SettingsFrame(0), SettingsFrame(0, settings={0x99: 1, 0xFFFF: 2**32 - 1}))
        await connection.until(lambda: connection.settings_acks == 3, "both settings are acknowledged")
        await usable(connection)


async def test_a_preface_and_a_call_may_come_byte_by_byte_before_the_server_has_said_anything(served: Served) -> None:
    async with stranger(served.port) as connection:
        connection.read()
        headers = HeadersFrame(1, connection.header_block(served.list_tools()), flags=["END_HEADERS"])
        data = DataFrame(1, message(DEMO), flags=["END_STREAM"])
        for byte in PREFACE + b"".join(part.serialize() for part in (SettingsFrame(0), headers, data)):
            await connection.send(bytes([byte]))
        assert (await connection.end_of(1)).status == OK


async def test_messages_may_be_split_at_every_byte_over_data_frames(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        for starts in range(1, 6):
            for byte in frame_of(starts):
                await connection.write(number, bytes([byte]))
                await connection.send(DataFrame(number, b""))
        await connection.write(number, b"", end=True)
        answer = await connection.end_of(number)
    assert answer.status == OK
    assert credits_of(answer) == [1, 2, 3, 4, 5]


async def test_one_data_frame_may_hold_many_messages_and_a_part_of_the_next(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        data = b"".join(frame_of(starts) for starts in range(1, 200))
        half = len(data) // 2 + 3
        await connection.write(number, data[:half])
        await connection.write(number, data[half:], end=True)
        answer = await connection.end_of(number)
    assert answer.status == OK
    assert credits_of(answer) == list(range(1, 200))


async def test_many_streams_on_one_connection_are_served_side_by_side(served: Served) -> None:
    async with peer(served.port) as connection:
        numbers = [await connection.open(served.run_turns()) for _ in range(50)]
        for starts in (1, 2, 3):
            for number in numbers:
                await connection.write(number, frame_of(starts))
            for number in reversed(numbers):
                stream = connection.stream(number)
                await connection.until(lambda stream=stream: len(stream.data) >= 7 * starts, "a frame is answered")  # type: ignore[misc] # noqa: B023
        for number in numbers:
            await connection.write(number, b"", end=True)
        answers = [await connection.end_of(number) for number in numbers]
    assert {answer.status for answer in answers} == {OK}
    assert all(credits_of(answer) == [1, 2, 3] for answer in answers)


@pytest.mark.parametrize("alone", [True, False])
async def test_the_client_may_end_its_side_with_the_message_or_after_it(served: Served, alone: bool) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools())
        if alone:
            await connection.send(DataFrame(number, message(DEMO)), DataFrame(number, b"", flags=["END_STREAM"]))
        else:
            await connection.send(DataFrame(number, message(DEMO), flags=["END_STREAM"]))
        assert (await connection.end_of(number)).status == OK


async def test_trailers_of_the_client_end_its_side(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        await connection.write(number, frame_of(3))
        trailers = connection.header_block([("x-trailer", "late")])
        await connection.send(HeadersFrame(number, trailers, flags=["END_HEADERS", "END_STREAM"]))
        answer = await connection.end_of(number)
        assert (answer.status, credits_of(answer)) == (OK, [3])
        await usable(connection)


async def test_a_unary_call_without_a_message_is_an_error_of_that_call(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools(), end=True)
        assert (await connection.end_of(number)).refused
        number = await connection.open(served.list_tools())
        await connection.write(number, message(DEMO)[:-3], end=True)
        assert (await connection.end_of(number)).refused
        await usable(connection)
    assert not served.tools.parents


async def test_binary_metadata_is_read_with_and_without_padding(served: Served) -> None:
    values = [b"", b"\x00", b"\xff\xfe", b"abc", bytes(range(256))]
    padded = [(f"x-padded{at}-bin", base64.b64encode(value).decode()) for at, value in enumerate(values)]
    bare = [(f"x-bare{at}-bin", base64.b64encode(value).decode().rstrip("=")) for at, value in enumerate(values)]
    async with peer(served.port) as connection:
        assert (await connection.call(served.list_tools(*padded, *bare), DEMO)).status == OK
    received = dict(served.tools.metadata[0])
    for at, value in enumerate(values):
        assert received[f"x-padded{at}-bin"] == value
        assert received[f"x-bare{at}-bin"] == value


async def test_metadata_keeps_its_order_and_repeated_names(served: Served) -> None:
    more = [("x-a", "1"), ("x-b", "2"), ("x-a", "3"), ("x-text", "a value, with: punctuation")]
    async with peer(served.port) as connection:
        assert (await connection.call(served.list_tools(*more), DEMO)).status == OK
    received = [item for item in served.tools.metadata[0] if item[0] in dict(more)]
    assert [value for name, value in received if name == "x-a"] == ["1", "3"]
    assert sorted(received) == sorted(more)


# --- Compression and sizes


async def test_a_compressed_message_is_read(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools(("grpc-encoding", "gzip")))
        await connection.write(number, message(gzip.compress(DEMO), compressed=True), end=True)
        answer = await connection.end_of(number)
        assert answer.status == OK
        plain = await connection.call(served.list_tools(("grpc-encoding", "gzip")), DEMO)
        assert plain.status == OK
    assert served.tools.parents == ["tenants/demo"] * 2


async def test_an_encoding_that_is_not_known_is_unimplemented(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools(("grpc-encoding", "rot13")))
        await connection.write(number, message(b"whatever", compressed=True), end=True)
        answer = await connection.end_of(number)
        assert answer.status == UNIMPLEMENTED
        assert "gzip" in {**answer.headers, **answer.trailers}["grpc-accept-encoding"]
        await usable(connection)


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        pytest.param([], message(DEMO, compressed=True), id="no encoding was named"),
        pytest.param([("grpc-encoding", "identity")], message(DEMO, compressed=True), id="identity was named"),
        pytest.param([("grpc-encoding", "gzip")], message(DEMO, compressed=True), id="it is not compressed"),
        pytest.param([], b"\x02" + message(DEMO)[1:], id="the flag is neither 0 nor 1"),
    ],
)
async def test_a_message_that_cannot_be_unpacked_is_an_error_of_that_call(
    served: Served, fields: list[Field], data: bytes
) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools(*fields))
        await connection.send(DataFrame(number, data, flags=["END_STREAM"]))
        assert (await connection.end_of(number)).refused
        await usable(connection)
    assert not served.tools.parents


async def test_of_two_messages_of_a_unary_call_none_or_one_is_served(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools())
        await connection.send(DataFrame(number, message(DEMO) * 2, flags=["END_STREAM"]))
        answer = await connection.end_of(number)
        assert answer.refused or answer.status == OK
        await usable(connection)
    assert len(served.tools.parents) <= 1


async def test_a_message_above_the_limit_is_refused_and_the_connection_goes_on(served: Served) -> None:
    packed = gzip.compress(bytes(LIMIT + 1))
    cases: list[tuple[list[Field], bytes]] = [
        ([], message(bytes(LIMIT + 1))),
        ([], b"\x00\xff\xff\xff\xff"),
        ([("grpc-encoding", "gzip")], message(packed, compressed=True)),
    ]
    async with peer(served.port) as connection:
        for fields, data in cases:
            number = await connection.open(served.list_tools(*fields))
            # The answer may come before the message is sent: nobody wants the rest of it then.
            with suppress(ConnectionError):
                await connection.write(number, data, end=True)
            answer = await connection.end_of(number)
            assert answer.status == RESOURCE_EXHAUSTED, (fields, data[:5])
            await usable(connection)
    assert not served.tools.parents


async def test_a_message_of_the_largest_size_is_served(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        frame = frame_of(1, LIMIT - 64)
        await connection.write(number, frame, end=True)
        answer = await connection.end_of(number)
    assert (answer.status, credits_of(answer)) == (OK, [1])


# --- Flow control


async def test_no_more_is_sent_than_the_peer_takes(served: Served) -> None:
    served.tools.size = 1000
    async with peer(served.port, {SettingCodes.INITIAL_WINDOW_SIZE: 10}, window_updates=False) as connection:
        number = await connection.open(served.list_tools())
        await connection.write(number, message(DEMO), end=True)
        stream = connection.stream(number)
        await connection.until(lambda: len(stream.data) >= 10, "the window is used")
        await connection.round_trip()
        assert len(stream.data) == 10
        await connection.send(WindowUpdateFrame(number, 5))
        await connection.until(lambda: len(stream.data) >= 15, "the window is used again")
        await connection.round_trip()
        assert len(stream.data) == 15
        await connection.send(WindowUpdateFrame(number, 10_000))
        answer = await connection.end_of(number)
        assert answer.status == OK
        assert ListToolsResponse.FromString(messages(bytes(answer.data))[0]).next_page_token == "x" * 1000


async def test_a_closed_window_holds_up_no_error_and_no_other_stream(served: Served) -> None:
    """Headers and trailers are no DATA, and each stream has a window of its own."""
    async with peer(served.port, {SettingCodes.INITIAL_WINDOW_SIZE: 0}, window_updates=False) as connection:
        stuck = await connection.open(served.run_turns())
        await connection.write(stuck, frame_of())
        await connection.round_trip()
        assert (await connection.call(request("/no.such.Service/Method"))).status == UNIMPLEMENTED
        number = await connection.open(served.list_tools())
        await connection.send(WindowUpdateFrame(number, 100))
        await connection.write(number, message(DEMO), end=True)
        assert (await connection.end_of(number)).status == OK
        assert not connection.stream(stuck).data


async def test_the_connections_window_bounds_all_streams_together(served: Served) -> None:
    served.tools.size = 50_000
    async with peer(served.port, {SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20}, window_updates=False) as connection:
        numbers = []
        for _ in range(3):
            numbers.append(await connection.open(served.list_tools()))
            await connection.write(numbers[-1], message(DEMO), end=True)

        def received() -> int:
            return sum(len(connection.stream(number).data) for number in numbers)

        await connection.until(lambda: received() >= DEFAULT_WINDOW, "the connection's window is used")
        await connection.round_trip()
        assert received() == DEFAULT_WINDOW
        await connection.send(WindowUpdateFrame(0, 1 << 20))
        for number in numbers:
            answer = await connection.end_of(number)
            assert answer.status == OK
            assert len(messages(bytes(answer.data))[0]) > 50_000


async def test_a_window_may_grow_and_shrink_below_zero_while_a_stream_waits(served: Served) -> None:
    served.tools.size = 1000
    async with peer(served.port, {SettingCodes.INITIAL_WINDOW_SIZE: 100}, window_updates=False) as connection:
        number = await connection.open(served.list_tools())
        await connection.write(number, message(DEMO), end=True)
        stream = connection.stream(number)

        async def settled_at(size: int) -> None:
            await connection.until(lambda: len(stream.data) >= size, f"{size} bytes have come")
            await connection.round_trip()
            assert len(stream.data) == size

        await settled_at(100)
        await connection.send(SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 150}))
        await settled_at(150)
        await connection.send(SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 10}))  # now at -140
        await connection.send(WindowUpdateFrame(number, 140))
        await settled_at(150)
        await connection.send(WindowUpdateFrame(number, 5))
        await settled_at(155)
        await connection.send(SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 100_000}))
        assert (await connection.end_of(number)).status == OK


async def test_the_server_gives_its_windows_back_as_it_reads(served: Served) -> None:
    """Ten megabytes over one stream, which is far more than any window."""
    async with peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        frame = frame_of(2, 100_000)
        count = (10 << 20) // len(frame) + 1
        for _ in range(count):
            await connection.write(number, frame)
        await connection.write(number, b"", end=True)
        answer = await connection.end_of(number)
        assert answer.status == OK
    assert credits_of(answer) == [2] * count


async def test_many_calls_on_one_connection_never_use_its_window_up(served: Served) -> None:
    """What a call leaves unread, because it was refused or is over, is given back to the connection too."""
    async with peer(served.port) as connection:
        for _ in range(60):
            number = await connection.open(request("/no.such.Service/Method"))
            stream = connection.stream(number)
            await connection.until(lambda: connection.window >= DEFAULT_FRAME_SIZE, "the connection's window is open")
            await connection.send(DataFrame(number, bytes(DEFAULT_FRAME_SIZE), flags=["END_STREAM"]))
            connection.window -= DEFAULT_FRAME_SIZE
            await connection.end_of(number)
            assert stream.over
        await usable(connection)


async def test_a_stream_that_nobody_reads_is_stopped_and_holds_up_no_other(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        stream = connection.stream(number)
        await connection.write(number, frame_of(0))
        await connection.until(lambda: stream.data, "the first frame is answered")
        frame, written = frame_of(1, 16_000), 0
        while stream.sent < MUCH and await taken(connection, number, frame):
            written += 1
        assert stream.sent < BOUND
        other = await connection.open(served.run_turns())
        for _ in range(100):
            await connection.write(other, frame)
        await connection.write(other, b"", end=True)
        answer = await connection.end_of(other)
        assert (answer.status, credits_of(answer)) == (OK, [1] * 100)
        served.brain.reading.set()
        await connection.write(number, b"", end=True)
        answer = await connection.end_of(number)
        assert (answer.status, credits_of(answer)) == (OK, [0] + [1] * (written + 1))


async def test_empty_messages_that_nobody_reads_are_bounded_too(served: Served) -> None:
    """Five bytes each on the wire, and more than that in memory: they count although they hold nothing."""
    async with peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        stream = connection.stream(number)
        await connection.write(number, frame_of(0))
        await connection.until(lambda: stream.data, "the first frame is answered")
        while stream.sent < MUCH and await taken(connection, number, bytes(5 * 3000)):
            pass
        assert stream.sent < BOUND


async def test_answers_that_nobody_takes_stop_the_handler(served: Served) -> None:
    """The handler waits for the peer: what it would write is not kept by the server without bound."""
    async with peer(served.port, {SettingCodes.INITIAL_WINDOW_SIZE: 0}, window_updates=False) as connection:
        number = await connection.open(served.run_turns())
        stream = connection.stream(number)
        while stream.sent < MUCH and await taken(connection, number, frame_of(1, 200) * 100):
            pass
        assert stream.sent < MUCH
        assert not stream.data
        await connection.send(WindowUpdateFrame(number, 1000))
        await connection.until(lambda: len(stream.data) == 1000, "answers come again")
        await connection.send(RstStreamFrame(number, ErrorCodes.CANCEL))
        await eventually(lambda: served.brain.running == 0)
        await connection.send(SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: DEFAULT_WINDOW}))
        await usable(connection)


@pytest.fixture
async def accepted(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[ServerConnection]:
    """The server's ends of the connections that a test makes."""
    found: list[ServerConnection] = []

    class Noted(ServerConnection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            found.append(self)
            super().connection_made(transport)

    monkeypatch.setattr(listener, "ServerConnection", Noted)
    return found


@pytest.mark.parametrize("how", ["reset", "deadline"])
async def test_calls_that_ended_while_they_waited_for_the_connections_window_wait_no_more(
    served: Served, accepted: list[ServerConnection], how: str
) -> None:
    served.tools.size = DEFAULT_WINDOW
    async with peer(served.port, {SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20}, window_updates=False) as connection:
        first = await connection.open(served.list_tools())
        await connection.write(first, message(DEMO), end=True)
        await connection.until(lambda: len(connection.stream(first).data) == DEFAULT_WINDOW, "the window is used up")
        [server] = accepted
        served.tools.size = 1
        for _ in range(20):
            timeout = [("grpc-timeout", "20m")] if how == "deadline" else []
            number = await connection.open(served.list_tools(*timeout))
            await connection.write(number, message(DEMO), end=True)
            if how == "reset":
                await eventually(lambda: len(server.queue) > 1)
                await connection.send(RstStreamFrame(number, ErrorCodes.CANCEL))
                await eventually(lambda: list(server.streams) == [first])
            else:
                assert (await connection.end_of(number)).status == DEADLINE_EXCEEDED
        assert list(server.streams) == [first]
        assert [stream.id for stream in server.queue] == [first]
        await connection.send(WindowUpdateFrame(0, DEFAULT_WINDOW))
        assert (await connection.end_of(first)).status == OK
        await usable(connection)


# --- Ends of calls


async def linger() -> None:
    await asyncio.Event().wait()


async def test_a_reset_by_the_client_cancels_its_handler_alone(served: Served) -> None:
    served.tools.behave = linger
    async with peer(served.port) as connection:
        numbers = []
        for _ in range(2):
            numbers.append(await connection.open(served.list_tools()))
            await connection.write(numbers[-1], message(DEMO), end=True)
        stream = await connection.open(served.run_turns())
        await connection.write(stream, frame_of())
        await eventually(lambda: (served.tools.running, served.brain.running) == (2, 1))
        await connection.send(RstStreamFrame(numbers[0], ErrorCodes.CANCEL))
        await eventually(lambda: served.tools.running == 1)
        await connection.send(RstStreamFrame(stream, ErrorCodes.CANCEL))
        await eventually(lambda: served.brain.running == 0)
        assert served.tools.running == 1
        await usable(connection)


async def test_frames_that_crossed_the_end_of_a_call_are_no_offence(served: Served) -> None:
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools())
        await connection.write(number, message(DEMO), end=True)
        assert (await connection.end_of(number)).status == OK
        await connection.send(WindowUpdateFrame(number, 10), RstStreamFrame(number, ErrorCodes.CANCEL))
        refused = await connection.open(request("/no.such.Service/Method"))
        await connection.end_of(refused)
        await connection.send(DataFrame(refused, message(b"late")), DataFrame(refused, b"", flags=["END_STREAM"]))
        await usable(connection)


@pytest.mark.parametrize("politely", [True, False])
async def test_the_end_of_a_connection_cancels_all_its_handlers(served: Served, politely: bool) -> None:
    served.tools.behave = linger
    async with peer(served.port) as other:
        kept = await other.open(served.list_tools())
        await other.write(kept, message(DEMO), end=True)
        async with peer(served.port) as connection:
            for _ in range(5):
                number = await connection.open(served.list_tools())
                await connection.write(number, message(DEMO), end=True)
                stream = await connection.open(served.run_turns())
                await connection.write(stream, frame_of())
            await eventually(lambda: (served.tools.running, served.brain.running) == (6, 5))
            if politely:
                await connection.send(raw_frame(0x7, 0, 0, bytes(8)))
        await eventually(lambda: (served.tools.running, served.brain.running) == (1, 0))
        assert not other.stream(kept).over
        await usable(other)


async def test_a_goaway_of_the_client_lets_its_calls_finish(served: Served) -> None:
    release = asyncio.Event()
    served.tools.behave = release.wait
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools())
        await connection.write(number, message(DEMO), end=True)
        await eventually(lambda: served.tools.running)
        await connection.send(raw_frame(0x7, 0, 0, bytes(8)))
        release.set()
        assert (await connection.end_of(number)).status == OK


@pytest.mark.parametrize("timeout", ["99999999n", "100000u", "100m"])
async def test_the_callers_deadline_ends_the_call(served: Served, timeout: str) -> None:
    served.tools.behave = linger
    async with peer(served.port) as connection:
        started = time.monotonic()
        answer = await connection.call(served.list_tools(("grpc-timeout", timeout)), DEMO)
        assert 0.09 < time.monotonic() - started < 5
        assert answer.status == DEADLINE_EXCEEDED
        await eventually(lambda: served.tools.running == 0)
        await usable(connection)


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [("90000000u", 90), ("70000m", 70), ("50S", 50), ("2M", 120), ("3H", 10_800), ("99999999H", 359_999_996_400)],
)
async def test_a_deadline_is_read_in_every_unit(served: Served, timeout: str, seconds: float) -> None:
    async with peer(served.port) as connection:
        assert (await connection.call(served.list_tools(("grpc-timeout", timeout)), DEMO)).status == OK
    (left,) = served.tools.time_left
    # Those that are longer than anything lasts may be cut.
    assert min(seconds, 10_000) - 10 < left <= seconds * 1.01


@pytest.mark.parametrize(
    "timeout", ["", "S", "1", "1x", "-1S", "1.5S", "999999999S", "1 S S", "\N{ARABIC-INDIC DIGIT ONE}S"]
)
async def test_a_deadline_that_cannot_be_read_hurts_no_other_call(served: Served, timeout: str) -> None:
    async with peer(served.port) as connection:
        block = connection.encoder.encode([*served.list_tools(), (b"grpc-timeout", timeout.encode())])
        number = connection.new_stream()
        await connection.send(HeadersFrame(number, block, flags=["END_HEADERS"]))
        await connection.write(number, message(DEMO), end=True)
        answer = await connection.end_of(number)
        assert answer.refused or answer.status == OK
        await usable(connection)


async def test_a_deadline_of_nothing_is_over(served: Served) -> None:
    served.tools.behave = linger
    async with peer(served.port) as connection:
        answer = await connection.call(served.list_tools(("grpc-timeout", "0m")), DEMO)
        assert answer.status == DEADLINE_EXCEEDED
        await usable(connection)


# --- Rules broken: the connection ends, and nobody else notices


def headers_of(connection: Peer, number: int, *, flags: int = 0x4) -> bytes:
    return raw_frame(0x1, flags, number, connection.header_block(request(RUN)))


def setting(code: int, value: int) -> bytes:
    return raw_frame(0x4, 0, 0, code.to_bytes(2, "big") + value.to_bytes(4, "big"))


UNLAWFUL: dict[str, Callable[[Peer], bytes]] = {
    "DATA on stream 0": lambda c: raw_frame(0x0, 0, 0, b"data"),
    "DATA on a stream that was never opened": lambda c: raw_frame(0x0, 0, 5, b"data"),
    "DATA whose padding is longer than it": lambda c: headers_of(c, 1) + raw_frame(0x0, 0x8, 1, b"\x09abc"),
    "HEADERS on stream 0": lambda c: headers_of(c, 0),
    "HEADERS on an even stream": lambda c: headers_of(c, 2),
    "HEADERS on a lower stream": lambda c: headers_of(c, 5) + headers_of(c, 3),
    "HEADERS whose padding is longer than it": lambda c: raw_frame(0x1, 0xC, 1, b"\xff\x82"),
    "HEADERS that cannot be decompressed": lambda c: raw_frame(0x1, 0x4, 1, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
    "HEADERS with an index that is in no table": lambda c: raw_frame(0x1, 0x4, 1, b"\xff\x20"),
    "CONTINUATION without HEADERS": lambda c: raw_frame(0x9, 0x4, 1, b""),
    "CONTINUATION of another stream": lambda c: headers_of(c, 1, flags=0) + raw_frame(0x9, 0x4, 3, b""),
    "a frame in the middle of a header block": lambda c: headers_of(c, 1, flags=0) + PingFrame(0).serialize(),
    "PRIORITY on stream 0": lambda c: raw_frame(0x2, 0, 0, bytes(5)),
    "RST_STREAM on stream 0": lambda c: raw_frame(0x3, 0, 0, bytes(4)),
    "RST_STREAM on a stream that was never opened": lambda c: raw_frame(0x3, 0, 7, bytes(4)),
    "RST_STREAM of three bytes": lambda c: headers_of(c, 1) + raw_frame(0x3, 0, 1, bytes(3)),
    "SETTINGS on a stream": lambda c: raw_frame(0x4, 0, 1, b""),
    "SETTINGS of five bytes": lambda c: raw_frame(0x4, 0, 0, bytes(5)),
    "SETTINGS that acknowledge and set": lambda c: raw_frame(0x4, 0x1, 0, bytes(6)),
    "SETTINGS with a window above 2^31-1": lambda c: setting(SettingCodes.INITIAL_WINDOW_SIZE, 1 << 31),
    "SETTINGS with a frame size below 2^14": lambda c: setting(SettingCodes.MAX_FRAME_SIZE, (1 << 14) - 1),
    "SETTINGS with a frame size above 2^24-1": lambda c: setting(SettingCodes.MAX_FRAME_SIZE, 1 << 24),
    "SETTINGS with ENABLE_PUSH neither 0 nor 1": lambda c: setting(SettingCodes.ENABLE_PUSH, 2),
    "PUSH_PROMISE": lambda c: headers_of(c, 1) + raw_frame(0x5, 0x4, 1, bytes([0, 0, 0, 2, 0x82])),
    "PING of seven bytes": lambda c: raw_frame(0x6, 0, 0, bytes(7)),
    "PING on a stream": lambda c: raw_frame(0x6, 0, 1, bytes(8)),
    "GOAWAY on a stream": lambda c: raw_frame(0x7, 0, 1, bytes(8)),
    "WINDOW_UPDATE of 0 for the connection": lambda c: raw_frame(0x8, 0, 0, bytes(4)),
    "WINDOW_UPDATE of three bytes": lambda c: raw_frame(0x8, 0, 0, bytes(3)),
    "WINDOW_UPDATE on a stream that was never opened": lambda c: raw_frame(0x8, 0, 9, b"\x00\x00\x00\x01"),
    "a window above 2^31-1 for the connection": lambda c: raw_frame(0x8, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "HEADERS above the server's frame size": lambda c: raw_frame(0x1, 0x4, 1, bytes((1 << 24) - 1)),
}


@asynccontextmanager
async def undisturbed(served: Served) -> AsyncIterator[None]:
    """A stream of somebody else that is open all the time, and a new one at the end; no handler is left over."""
    async with peer(served.port) as other:
        number = await other.open(served.run_turns())
        stream = other.stream(number)
        await other.write(number, frame_of())
        await other.until(lambda: len(stream.data) == 7, "the first frame is answered")
        yield
        await other.write(number, frame_of(2), end=True)
        assert (await other.end_of(number)).status == OK
        assert credits_of(stream) == [1, 2]
    await check(served.port)
    await eventually(lambda: (served.tools.running, served.brain.running) == (0, 0))


@pytest.mark.parametrize("what", UNLAWFUL)
async def test_a_broken_rule_ends_that_connection_alone(served: Served, what: str) -> None:
    async with undisturbed(served), peer(served.port) as connection:
        await connection.try_send(UNLAWFUL[what](connection))
        code = await connection.broken(patience_s=5)
        assert code != ErrorCodes.NO_ERROR


async def test_a_broken_rule_cancels_the_handlers_of_its_connection(served: Served) -> None:
    served.tools.behave = linger
    async with undisturbed(served), peer(served.port) as connection:
        number = await connection.open(served.list_tools())
        await connection.write(number, message(DEMO), end=True)
        await eventually(lambda: served.tools.running == 1)
        await connection.send(raw_frame(0x6, 0, 0, bytes(7)))
        await connection.broken()
        await eventually(lambda: served.tools.running == 0)


@pytest.mark.parametrize("what", ["HEADERS on an even stream", "HEADERS on a lower stream"])
async def test_numbers_of_streams_that_do_not_rise_are_told_as_a_protocol_error(served: Served, what: str) -> None:
    async with peer(served.port) as connection:
        await connection.send(UNLAWFUL[what](connection))
        assert await connection.broken(patience_s=5) == ErrorCodes.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "update", [pytest.param(bytes(4), id="of 0"), pytest.param(b"\x7f\xff\xff\xff", id="above 2^31-1")]
)
async def test_a_window_update_that_a_stream_cannot_take_ends_that_stream(served: Served, update: bytes) -> None:
    async with undisturbed(served), peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        await connection.write(number, frame_of())
        await connection.send(raw_frame(0x8, 0, number, update))
        stream = connection.stream(number)
        await connection.until(lambda: stream.over or connection.closed or connection.goaways, "it is ended", 5)
        assert stream.refused or connection.closed or connection.goaways


async def test_data_above_the_servers_frame_size_ends_its_stream_at_least(served: Served) -> None:
    async with undisturbed(served), peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        await connection.write(number, frame_of())
        await connection.try_send(raw_frame(0x0, 0, number, bytes((1 << 24) - 1)))
        stream = connection.stream(number)
        await connection.until(lambda: stream.over or connection.closed or connection.goaways, "it is ended", 5)
        assert stream.refused or connection.closed or connection.goaways


async def test_more_data_than_the_window_is_a_flow_control_error(served: Served) -> None:
    async with undisturbed(served), peer(served.port) as connection:
        number = await connection.open(served.run_turns())
        await connection.write(number, frame_of(0))
        stream = connection.stream(number)
        await connection.until(lambda: stream.data, "the first frame is answered")
        data = DataFrame(number, frame_of(1, 16_000)).serialize()
        for _ in range(MUCH // len(data)):
            if not await connection.try_send(data) or stream.over or connection.closed or connection.goaways:
                break
            await asyncio.sleep(0)
        await connection.until(lambda: stream.over or connection.closed or connection.goaways, "it is ended", 5)
        assert not stream.over or stream.refused


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), id="TLS"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n", id="HTTP/1.1"),
        pytest.param(PREFACE[:-1] + b"!" + bytes(100), id="a preface with a wrong end"),
        pytest.param(bytes(1000), id="zeros"),
        pytest.param(PREFACE + PingFrame(0).serialize(), id="a first frame that is not SETTINGS"),
        pytest.param(PREFACE * 2, id="the preface twice"),
    ],
)
async def test_what_is_not_http2_is_not_served(served: Served, data: bytes) -> None:
    async with undisturbed(served), stranger(served.port) as connection:
        await connection.send(data)
        # The answer, if any, need not be HTTP/2: it is not looked at.
        assert await end_of_bytes(connection)


async def end_of_bytes(connection: Peer) -> bool:
    """Return True when the server has said GOAWAY or has closed."""
    received = b""
    while part := await connection.receive():
        received += part
        if b"\x07\x00\x00\x00\x00\x00" in received:  # type, flags and stream of the frame
            return True
    return True


async def test_headers_above_the_servers_limit_are_refused(served: Served) -> None:
    async with undisturbed(served), peer(served.port) as connection:
        number = connection.new_stream()
        block = connection.header_block(served.list_tools(("x-long", "~" * (2 << 20))))
        size = DEFAULT_FRAME_SIZE
        parts = [ContinuationFrame(number, block[at : at + size]) for at in range(size, len(block), size)]
        parts[-1].flags.add("END_HEADERS")
        await connection.try_send(HeadersFrame(number, block[:size]), *parts)
        await connection.try_send(DataFrame(number, message(DEMO), flags=["END_STREAM"]))
        stream = connection.stream(number)
        await connection.until(lambda: stream.over or connection.closed or connection.goaways, "it is refused")
        assert stream.refused or connection.closed or connection.goaways
    assert not served.tools.parents


async def test_many_headers_that_compress_well_are_refused(served: Served) -> None:
    """Each reference to the table is one byte on the wire and four kilobytes in memory."""
    async with undisturbed(served), peer(served.port) as connection:
        number = connection.new_stream()
        block = connection.header_block(served.list_tools(("x-bomb", "~" * 3900)))
        reference = connection.header_block([("x-bomb", "~" * 3900)])
        assert len(reference) == 1
        first = HeadersFrame(number, block)
        rest = ContinuationFrame(number, reference * 8000, flags=["END_HEADERS"])
        await connection.try_send(first, rest, DataFrame(number, message(DEMO), flags=["END_STREAM"]))
        stream = connection.stream(number)
        await connection.until(lambda: stream.over or connection.closed or connection.goaways, "it is refused")
        assert stream.refused or connection.closed or connection.goaways
    assert not served.tools.parents


# --- Floods


@pytest.mark.parametrize("size", [0, 1000])
async def test_a_header_block_without_end_is_bounded(served: Served, size: int) -> None:
    async with undisturbed(served), peer(served.port) as connection:
        await connection.send(headers_of(connection, 1, flags=0))
        field = b"\x00\x01x\x7f" + bytes([0x80 | size - 127 & 0x7F, size - 127 >> 7]) + b"y" * size if size else b""
        part = ContinuationFrame(1, field).serialize()
        sent = await connection.flood(part * 1000, MUCH)
        await connection.until(lambda: connection.closed or connection.goaways, f"it is ended (sent: {sent})")


@pytest.mark.parametrize("is_open", [True, False])
async def test_empty_data_is_bounded(served: Served, is_open: bool) -> None:
    """CVE-2019-9518: on a stream that is open, and on one that the server has reset."""
    async with undisturbed(served), peer(served.port) as connection:
        number = await connection.open(served.run_turns() if is_open else request("/no.such.Service/Method"))
        await connection.round_trip()
        assert connection.stream(number).over is not is_open
        await connection.flood(DataFrame(number).serialize() * 1000, 1 << 20)
        assert await connection.broken() == ErrorCodes.ENHANCE_YOUR_CALM


@pytest.mark.timeout(60)
async def test_small_header_blocks_that_grow_large_are_bounded_together(served: Served) -> None:
    """Each is one that a call may have, and a few bytes on the wire when HPACK's table knows it; the calls go on."""
    served.tools.behave = linger
    async with undisturbed(served), peer(served.port) as connection:
        numbers = []
        fields = served.list_tools(*[("x-bomb", "~" * 3600)] * 16)
        size = sum(len(name) + len(value) + 32 for name, value in fields)
        for _ in range(700):
            number = connection.new_stream()
            numbers.append(number)
            headers = HeadersFrame(number, connection.header_block(fields), flags=["END_HEADERS"])
            await connection.send(headers, DataFrame(number, message(DEMO), flags=["END_STREAM"]))
        await connection.round_trip()
        refused = [number for number in numbers if connection.stream(number).over]
        assert {connection.stream(number).reset for number in refused} == {ErrorCodes.REFUSED_STREAM}
        kept = (len(numbers) - len(refused)) * size
        assert (30 << 20) < kept <= (32 << 20)
        await connection.send(RstStreamFrame(numbers[0], ErrorCodes.CANCEL))
        await usable(connection)


@pytest.mark.timeout(60)
async def test_streams_that_are_opened_and_reset_at_once_hurt_nobody(served: Served) -> None:
    served.tools.behave = linger
    async with undisturbed(served), peer(served.port) as connection:
        for _ in range(50):
            frames: list[bytes] = []
            for _ in range(100):
                number = connection.new_stream()
                headers = HeadersFrame(number, connection.header_block(served.list_tools()), flags=["END_HEADERS"])
                data = DataFrame(number, message(DEMO), flags=["END_STREAM"])
                reset = RstStreamFrame(number, ErrorCodes.CANCEL)
                frames += [headers.serialize(), data.serialize(), reset.serialize()]
            if connection.closed or connection.goaways or not await connection.try_send(*frames):
                break
        await check(served.port)


FLOODS = {
    "PING": PingFrame(0, b"flooding").serialize(),
    "SETTINGS": SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 1 << 16}).serialize(),
    "empty SETTINGS": SettingsFrame(0).serialize(),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", FLOODS)
async def test_a_peer_that_asks_and_never_reads_is_stopped(served: Served, what: str) -> None:
    """Every such frame must be answered: a server that goes on reading them keeps the answers."""
    async with undisturbed(served), stranger(served.port, receive_buffer=8192) as connection:
        await connection.send(PREFACE, SettingsFrame(0))
        frame = FLOODS[what]
        assert await connection.flood(frame * (16_000 // len(frame)), MUCH) < MUCH


@pytest.mark.timeout(60)
async def test_a_peer_that_calls_and_never_reads_keeps_no_other_from_being_served(served: Served) -> None:
    async with undisturbed(served), stranger(served.port, receive_buffer=8192) as connection:
        await connection.send(PREFACE, SettingsFrame(0))
        for _ in range(100):
            calls: list[bytes] = []
            for _ in range(100):
                number = connection.new_stream()
                block = connection.header_block(request("/no.such.Service/Method"))
                calls.append(HeadersFrame(number, block, flags=["END_HEADERS", "END_STREAM"]).serialize())
            data = b"".join(calls)
            if await connection.flood(data, len(data)) < len(data):
                break
        await check(served.port)


# --- The server's end


async def test_a_server_that_stops_says_so_first_and_lets_calls_finish(served: Served) -> None:
    release = asyncio.Event()
    served.tools.behave = release.wait
    async with peer(served.port) as connection, peer(served.port) as idle:
        number = await connection.open(served.list_tools())
        await connection.write(number, message(DEMO), end=True)
        await eventually(lambda: served.tools.running)
        stopping = asyncio.create_task(served.server.stop(10))
        # The first may only announce the one that names the last stream.
        await connection.until(
            lambda: any(frame.last_stream_id < GRACEFUL for frame in connection.goaways), "the server says goodbye"
        )
        assert {frame.error_code for frame in connection.goaways} == {ErrorCodes.NO_ERROR}
        assert connection.goaways[-1].last_stream_id == number
        assert not connection.stream(number).over
        late = connection.new_stream()
        await connection.send(
            HeadersFrame(late, connection.header_block(served.list_tools()), flags=["END_HEADERS"]),
            DataFrame(late, message(DEMO), flags=["END_STREAM"]),
        )
        await idle.until(lambda: idle.closed, "a connection without calls is closed")
        with pytest.raises(ConnectionError):
            await check(served.port)
        release.set()
        assert (await connection.end_of(number)).status == OK
        await connection.until(lambda: connection.closed, "the connection is closed")
        await asyncio.wait_for(stopping, 5)
        assert connection.stream(late).status is None
    assert served.tools.parents == ["tenants/demo"]


async def test_a_call_that_outlasts_the_grace_is_cancelled(served: Served) -> None:
    served.tools.behave = linger
    async with peer(served.port) as connection:
        number = await connection.open(served.list_tools())
        await connection.write(number, message(DEMO), end=True)
        stream = await connection.open(served.run_turns())
        await connection.write(stream, frame_of())
        await eventually(lambda: (served.tools.running, served.brain.running) == (1, 1))
        started = time.monotonic()
        await served.server.stop(0.3)
        assert 0.25 < time.monotonic() - started < 5
        await eventually(lambda: (served.tools.running, served.brain.running) == (0, 0))
        await connection.until(lambda: connection.closed, "the connection is closed")
        assert connection.stream(number).status != OK
        assert connection.stream(stream).status != OK
