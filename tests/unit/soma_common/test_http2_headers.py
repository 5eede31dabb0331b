"""Header blocks of HTTP/2: written for decoders in any state, read with one's own, and held to the rules.

Checked against RFC 7541 through the `hpack` library, and against RFC 9113, sections 8.1 to 8.3.
"""

from __future__ import annotations

import re

import pytest
from hpack import Decoder, Encoder, HeaderTuple, NeverIndexedHeaderTuple
from hypothesis import given, settings
from hypothesis import strategies as st

from soma_common.http2 import headers as h
from soma_common.http2.frames import ConnectionFault, ErrorCode, StreamFault
from soma_common.http2.headers import HeaderReader, Headers, encode

REQUEST: Headers = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/a.B/C"),
    (b":authority", b"host:1"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
]
RESPONSE: Headers = [(b":status", b"200"), (b"content-type", b"application/grpc")]
TRAILERS: Headers = [(b"grpc-status", b"0"), (b"grpc-message", b"fine")]

FIELDS = st.lists(
    st.tuples(st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(str.encode), st.binary(max_size=40)),
    max_size=8,
)


def decoded(decoder: Decoder, block: bytes) -> Headers:
    return [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]


# --- blocks that we write


@settings(deadline=None)
@given(lists=st.lists(st.tuples(FIELDS, FIELDS), max_size=5))
def test_blocks_are_read_between_blocks_of_others(lists: list[tuple[Headers, Headers]]) -> None:
    """Whatever the table has come to hold, ours neither needs it nor changes it."""
    decoder, other = Decoder(), Encoder()
    for ours, theirs in lists:
        assert decoded(decoder, encode(ours)) == ours
        assert decoded(decoder, other.encode([HeaderTuple(*pair) for pair in theirs])) == theirs
        assert decoded(decoder, encode(ours)) == ours


def test_a_block_is_the_same_each_time_and_leaves_no_trace() -> None:
    block = encode(REQUEST)
    assert encode(REQUEST) == block
    encode([(b"x-other", b"secret")])
    assert encode(REQUEST) == block
    decoder = Decoder()
    for _ in range(3):
        assert decoded(decoder, block) == REQUEST
    assert len(decoder.header_table.dynamic_entries) == 0


def test_the_order_of_headers_does_not_change_what_they_are() -> None:
    assert decoded(Decoder(), encode([*TRAILERS, *TRAILERS])) == [*TRAILERS, *TRAILERS]


def test_a_decoder_without_a_table_reads_our_blocks() -> None:
    decoder = Decoder()
    decoder.max_allowed_table_size = 0
    decoder.header_table_size = 0
    assert decoded(decoder, encode(REQUEST)) == REQUEST


@pytest.mark.parametrize("size", [0, 100, 4096, 65536])
def test_the_word_about_an_emptied_table_satisfies_a_decoder_that_changed_its_size(size: int) -> None:
    """RFC 7541, section 4.2: after a change the next block has to begin with what is used of the table."""
    decoder = Decoder()
    decoder.max_allowed_table_size = size
    assert decoded(decoder, h.TABLE_EMPTIED + encode(REQUEST)) == REQUEST
    assert decoded(decoder, encode(RESPONSE)) == RESPONSE


def test_no_value_may_be_put_into_a_table_on_the_way() -> None:
    """Section 7.1.3: a literal is marked as one that is never indexed."""
    fields = Decoder().decode(encode([("authorization", "Bearer x"), ("x-own", "y")]), raw=True)
    assert all(isinstance(field, NeverIndexedHeaderTuple) for field in fields)


def test_text_and_bytes_are_written_alike() -> None:
    assert encode([("a", "b")]) == encode([(b"a", b"b")])
    assert decoded(Decoder(), encode([("a", "é")])) == [(b"a", "é".encode())]


def test_no_headers_are_an_empty_block() -> None:
    assert encode([]) == b""


# --- blocks that we read


@settings(deadline=None)
@given(lists=st.lists(FIELDS, max_size=6), huffman=st.booleans())
def test_a_reader_follows_the_table_of_its_peer(lists: list[Headers], huffman: bool) -> None:
    reader, encoder = HeaderReader(), Encoder()
    for fields in [*lists, *lists]:
        assert reader.read(encoder.encode([HeaderTuple(*pair) for pair in fields], huffman=huffman)) == fields


def test_a_peer_may_change_the_size_of_its_table() -> None:
    reader, encoder = HeaderReader(), Encoder()
    for size in (4096, 0, 60, 4096):
        encoder.header_table_size = size
        assert reader.read(encoder.encode([HeaderTuple(*pair) for pair in REQUEST])) == REQUEST


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # index 0
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # an integer without end
        b"\xbe",  # the first of a table that is empty
        b"\x40\x05ab",  # a name that is cut
        b"\x40",
        b"\x40\x01a",
        b"\x40\x01a\x81\x00",  # padding of a Huffman code that is none
        b"\x3f\xe2\x1f",  # a table above what was allowed
        b"\x82\x20",  # a change of size behind a header
    ],
)
def test_a_block_that_is_none_ends_the_connection(block: bytes) -> None:
    with pytest.raises(ConnectionFault) as fault:
        HeaderReader().read(block)
    assert fault.value.code is ErrorCode.COMPRESSION_ERROR


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_headers_or_a_fault(block: bytes) -> None:
    codes: list[ErrorCode] = []
    fields: Headers = []
    try:
        fields = HeaderReader().read(block)
    except ConnectionFault as fault:
        codes.append(fault.code)
    assert not {*codes} - {ErrorCode.COMPRESSION_ERROR, ErrorCode.ENHANCE_YOUR_CALM}
    assert all(type(name) is bytes and type(value) is bytes for name, value in fields)


def test_a_small_block_that_grows_large_ends_the_connection() -> None:
    """One byte refers to an entry of the table; a few thousand of them make megabytes."""
    encoder = Encoder()
    block = encoder.encode([HeaderTuple(b"a", b"x" * 3000)]) + b"\xbe" * 5000
    with pytest.raises(ConnectionFault) as fault:
        HeaderReader().read(block)
    assert fault.value.code is ErrorCode.ENHANCE_YOUR_CALM


# --- what headers may be


def test_lawful_headers_pass() -> None:
    h.check_request(1, REQUEST)
    h.check_request(1, [field for field in REQUEST if field[0] not in (b":authority", b"te")])
    h.check_request(1, [*REQUEST, (b"cookie", b"a"), (b"cookie", b"b")])
    h.check_response(1, RESPONSE)
    h.check_response(1, RESPONSE[:1])
    h.check_trailers(1, TRAILERS)
    h.check_trailers(1, [])


@pytest.mark.parametrize(
    "field",
    [
        (b"x-empty", b""),
        (b"x-inner", b"a b\tc"),
        (b"x-high", b"caf\xc3\xa9 \xff"),
        (b"x!#$%&'*+-.^_`|~9", b"every sign of a token"),
    ],
)
def test_lawful_fields_pass_everywhere(field: tuple[bytes, bytes]) -> None:
    h.check_request(1, [*REQUEST, field])
    h.check_response(1, [*RESPONSE, field])
    h.check_trailers(1, [*TRAILERS, field])


UNLAWFUL = [
    (b"", b"no name"),
    (b"Upper", b"x"),
    (b"uppeR", b"x"),
    (b"connection", b"close"),
    (b"keep-alive", b"timeout=5"),
    (b"proxy-connection", b"keep-alive"),
    (b"transfer-encoding", b"chunked"),
    (b"upgrade", b"h2c"),
    (b"te", b"gzip"),
    (b"te", b"trailers, gzip"),
    (b"te", b""),
]
# RFC 9113, section 8.2.1: "MUST be treated as malformed".
UNLAWFUL_CHARACTERS = [
    (b"a b", b"space in a name"),
    (b"a\x00", b"x"),
    (b"a\n", b"x"),
    (b"a\r\nb", b"x"),
    (b"a\x7f", b"x"),
    (b"caf\xe9", b"x"),
    (b"a:b", b"a colon that does not begin it"),
    (b"x", b"a\x00b"),
    (b"x", b"a\nb"),
    (b"x", b"a\rb"),
    (b"x", b" begins with a space"),
    (b"x", b"ends with a tab\t"),
]


def refused(check: str, fields: Headers) -> StreamFault:
    with pytest.raises(StreamFault) as fault:
        getattr(h, check)(7, fields)
    return fault.value


@pytest.mark.parametrize(
    ("check", "lawful"), [("check_request", REQUEST), ("check_response", RESPONSE), ("check_trailers", TRAILERS)]
)
@pytest.mark.parametrize("field", [*UNLAWFUL, *UNLAWFUL_CHARACTERS], ids=repr)
def test_unlawful_fields_are_malformed_everywhere(check: str, lawful: Headers, field: tuple[bytes, bytes]) -> None:
    fault = refused(check, [*lawful, field])
    assert (fault.stream, fault.code) == (7, ErrorCode.PROTOCOL_ERROR)


@pytest.mark.parametrize(
    "change",
    [
        "without :method",
        "without :scheme",
        "without :path",
        "twice :method",
        "twice :path",
        "twice :authority",
        "late :path",
        "late :authority",
        "empty :path",
        "empty :method",
        "also :status",
        "also :unknown",
        "also :",
        "also :Path",
    ],
)
def test_a_request_with_the_wrong_pseudo_headers_is_malformed(change: str) -> None:
    kind, text = change.split()
    name = text.encode()
    fields = {
        "without": [field for field in REQUEST if field[0] != name],
        "twice": [field for field in REQUEST if field[0] == name] + REQUEST,
        "late": [field for field in REQUEST if field[0] != name] + [field for field in REQUEST if field[0] == name],
        "empty": [(field, b"" if field == name else value) for field, value in REQUEST],
        "also": [(name, b"200"), *REQUEST],
    }[kind]
    assert refused("check_request", fields).code is ErrorCode.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [(b"content-type", b"application/grpc")],
        [(b":status", b"200"), (b":status", b"200")],
        [(b"content-type", b"application/grpc"), (b":status", b"200")],
        [(b":status", b"")],
        [(b":status", b"200"), (b":path", b"/")],
        [(b":method", b"GET"), (b":status", b"200")],
        [(b":status", b"200"), (b":unknown", b"x")],
    ],
)
def test_a_response_with_the_wrong_pseudo_headers_is_malformed(fields: Headers) -> None:
    assert refused("check_response", fields).code is ErrorCode.PROTOCOL_ERROR


@pytest.mark.parametrize("name", [b":status", b":method", b":path", b":x"])
def test_trailers_have_no_pseudo_headers(name: bytes) -> None:
    for fields in ([(name, b"200"), *TRAILERS], [*TRAILERS, (name, b"200")]):
        assert refused("check_trailers", fields).code is ErrorCode.PROTOCOL_ERROR


# --- sizes


def test_a_list_is_as_large_as_its_names_and_values_and_32_bytes_for_each() -> None:
    """RFC 9113, section 6.5.2."""
    assert h.list_size([]) == 0
    assert h.list_size([(b"a", b""), (b":path", b"/x"), (b"a", b"")]) == 3 * 32 + 1 + 7 + 1


# --- content-length


@pytest.mark.parametrize(("value", "length"), [(b"0", 0), (b"17", 17), (b"007", 7), (b"99999999999", 99999999999)])
def test_a_content_length_is_read(value: bytes, length: int) -> None:
    assert h.content_length(1, [*REQUEST, (b"content-length", value)]) == length


def test_no_content_length_is_none() -> None:
    assert h.content_length(1, REQUEST) is None


@pytest.mark.parametrize("value", [b"", b"-1", b"+1", b"1.0", b"0x1", b" 1", b"1,2", b"one", b"\xb2", b"9" * 5000])
def test_a_content_length_that_is_no_number_is_malformed(value: bytes) -> None:
    with pytest.raises(StreamFault, match=re.escape("content-length")) as fault:
        h.content_length(9, [(b"content-length", value)])
    assert (fault.value.stream, fault.value.code) == (9, ErrorCode.PROTOCOL_ERROR)


def test_content_lengths_that_differ_are_malformed() -> None:
    """RFC 9110, section 8.6: which one to believe is how requests are smuggled."""
    with pytest.raises(StreamFault) as fault:
        h.content_length(9, [(b"content-length", b"3"), (b"content-length", b"4")])
    assert fault.value.code is ErrorCode.PROTOCOL_ERROR
