"""gRPC on the wire: messages out of any pieces, compression, timeouts, metadata and statuses.

Checked against PROTOCOL-HTTP2.md and http-grpc-status-mapping.md of gRPC.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import tracemalloc
import zlib

import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from soma_common.grpc import wire
from soma_common.grpc.wire import MessageReader, WireError

LIMIT = 1000
NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-.", min_size=1, max_size=12)


def framed(message: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


def read_all(reader: MessageReader, pieces: list[bytes]) -> list[bytes]:
    """As the messages are read: one that came compressed is expanded only then."""
    return [reader.expanded(message) for piece in pieces for message in reader.read(piece)]


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in itertools.pairwise(at)]


# --- messages


@settings(deadline=None)
@given(messages=st.lists(st.binary(max_size=40), max_size=8), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    reader = MessageReader(LIMIT)
    data = b"".join(map(framed, messages))
    assert read_all(reader, pieces_of(data, cuts)) == messages
    assert reader.is_between_messages


@settings(deadline=None)
@given(
    messages=st.lists(st.tuples(st.binary(max_size=40), st.booleans()), max_size=6),
    cuts=st.lists(st.integers(0, 600), max_size=8),
)
def test_compressed_and_plain_messages_mix_on_a_stream(messages: list[tuple[bytes, bool]], cuts: list[int]) -> None:
    data = b"".join(framed(zlib.compress(text), 1) if packed else framed(text) for text, packed in messages)
    assert read_all(MessageReader(LIMIT, b"deflate"), pieces_of(data, cuts)) == [text for text, _ in messages]


@pytest.mark.parametrize("at", range(len(framed(b"hello")) * 2 + 1))
def test_a_message_is_out_as_soon_as_its_last_byte_is_in(at: int) -> None:
    whole = framed(b"hello")
    reader = MessageReader(LIMIT)
    first = reader.read((whole * 2)[:at])
    assert first == [b"hello"] * (at // len(whole))
    assert reader.is_between_messages is (at % len(whole) == 0)
    assert reader.held == at % len(whole)
    assert first + reader.read((whole * 2)[at:]) == [b"hello"] * 2


def test_single_bytes_make_messages_too() -> None:
    data = framed(b"") + framed(b"ab") + framed(b"")
    assert read_all(MessageReader(LIMIT), [data[at : at + 1] for at in range(len(data))]) == [b"", b"ab", b""]


def test_nothing_read_is_nothing_lost() -> None:
    reader = MessageReader(LIMIT)
    assert reader.read(b"") == []
    assert reader.is_between_messages
    assert reader.read(framed(b"ab")[:3]) == []
    assert reader.read(b"") == []
    assert reader.read(framed(b"ab")[3:]) == [b"ab"]


def test_a_message_of_just_the_limit_passes() -> None:
    assert MessageReader(LIMIT).read(framed(b"x" * LIMIT)) == [b"x" * LIMIT]


@pytest.mark.parametrize("before", [b"", framed(b"ok")])
@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("size", [LIMIT + 1, 2**32 - 1])
def test_a_message_above_the_limit_is_refused_by_its_prefix_alone(before: bytes, pieces: int, size: int) -> None:
    """The size says it all: waiting for the body would let a peer fill the memory."""
    prefix = b"\x00" + size.to_bytes(4, "big")
    data = before + prefix
    step = -(-len(data) // pieces)
    with pytest.raises(WireError) as refused:
        read_all(MessageReader(LIMIT), [data[at : at + step] for at in range(0, len(data), step)])
    assert refused.value.code is StatusCode.RESOURCE_EXHAUSTED
    assert str(size) in refused.value.why
    assert str(LIMIT) in refused.value.why


@pytest.mark.parametrize("flag", [1, 2, 255])
def test_the_limit_comes_before_the_flag(flag: int) -> None:
    with pytest.raises(WireError) as refused:
        MessageReader(LIMIT, b"gzip").read(bytes([flag]) + (LIMIT + 1).to_bytes(4, "big"))
    assert refused.value.code is StatusCode.RESOURCE_EXHAUSTED


# --- compression


def packed(encoding: bytes, data: bytes) -> bytes:
    return gzip.compress(data) if encoding == b"gzip" else zlib.compress(data)


ENCODINGS = pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])


@ENCODINGS
@pytest.mark.parametrize("size", [0, 1, LIMIT])
def test_a_compressed_message_is_expanded(encoding: bytes, size: int) -> None:
    message = b"x" * size
    reader = MessageReader(LIMIT, encoding)
    assert read_all(reader, [framed(packed(encoding, message), 1)]) == [message]
    # Contexts do not outlive a message.
    assert read_all(reader, [framed(packed(encoding, message), 1) + framed(b"plain")]) == [message, b"plain"]


@ENCODINGS
def test_a_message_that_expands_beyond_the_limit_is_refused(encoding: bytes) -> None:
    with pytest.raises(WireError) as refused:
        read_all(MessageReader(LIMIT, encoding), [framed(packed(encoding, b"x" * (LIMIT + 1)), 1)])
    assert refused.value.code is StatusCode.RESOURCE_EXHAUSTED


@ENCODINGS
def test_a_compressed_message_stays_small_until_it_is_read(encoding: bytes) -> None:
    data = packed(encoding, b"x" * LIMIT)
    (message,) = MessageReader(LIMIT, encoding).read(framed(data, 1))
    assert len(message) == len(data)


@ENCODINGS
def test_a_bomb_is_refused_without_being_expanded(encoding: bytes) -> None:
    bomb = framed(packed(encoding, bytes(64 * 1024 * 1024)), 1)
    reader = MessageReader(1024 * 1024, encoding)
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as refused:
            read_all(reader, [bomb])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.code is StatusCode.RESOURCE_EXHAUSTED
    assert peak < 8 * 1024 * 1024


@ENCODINGS
def test_a_truncated_compressed_message_is_an_error_at_each_length(encoding: bytes) -> None:
    whole = packed(encoding, b"some text that is worth compressing, text, text, text")
    for length in range(len(whole)):
        with pytest.raises(WireError) as refused:
            read_all(MessageReader(LIMIT, encoding), [framed(whole[:length], 1)])
        assert refused.value.code is StatusCode.INTERNAL, length


@ENCODINGS
@pytest.mark.parametrize("garbage", [b"\x00" * 20, b"certainly not compressed", b"\xff\xfe\xfd"])
def test_garbage_for_a_compressed_message_is_an_error(encoding: bytes, garbage: bytes) -> None:
    with pytest.raises(WireError) as refused:
        read_all(MessageReader(LIMIT, encoding), [framed(garbage, 1)])
    assert refused.value.code is StatusCode.INTERNAL


@ENCODINGS
def test_a_damaged_message_is_an_error(encoding: bytes) -> None:
    """The checksum at the end is there to be looked at."""
    whole = bytearray(packed(encoding, b"x" * 100))
    whole[-5 if encoding == b"gzip" else -1] ^= 1
    with pytest.raises(WireError) as refused:
        read_all(MessageReader(LIMIT, encoding), [framed(bytes(whole), 1)])
    assert refused.value.code is StatusCode.INTERNAL


@pytest.mark.parametrize("encoding", [b"identity", b"snappy", b""])
def test_a_message_said_to_be_compressed_by_nothing_known_is_an_error(encoding: bytes) -> None:
    with pytest.raises(WireError) as refused:
        read_all(MessageReader(LIMIT, encoding), [framed(gzip.compress(b"x"), 1)])
    assert refused.value.code is StatusCode.INTERNAL


@pytest.mark.parametrize("flag", [2, 3, 128, 255])
def test_a_flag_that_is_neither_0_nor_1_is_an_error(flag: int) -> None:
    with pytest.raises(WireError) as refused:
        read_all(MessageReader(LIMIT, b"gzip"), [framed(gzip.compress(b"x"), flag)])
    assert refused.value.code is StatusCode.INTERNAL


def test_what_is_said_to_be_accepted_is_known() -> None:
    assert all(
        wire.is_known_encoding(name.encode()) for name in dict(wire.HTTP_HEADERS)["grpc-accept-encoding"].split(",")
    )
    assert not wire.is_known_encoding(b"snappy")
    assert not wire.is_known_encoding(b"")


# --- timeouts


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"1H", 3600.0),
        (b"2M", 120.0),
        (b"30S", 30.0),
        (b"250m", 0.25),
        (b"250u", 0.00025),
        (b"250n", 0.00000025),
        (b"99999999H", 99999999 * 3600.0),
        (b"99999999n", 0.099999999),
        (b"00000001S", 1.0),
        (b"0S", 0.0),
    ],
)
def test_every_unit_of_a_timeout_is_read(text: bytes, seconds: float) -> None:
    assert wire.read_timeout(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [b"", b"1", b"S", b"123456789S", b"1s", b"1h", b"-1S", b"+1S", b"1.5S", b" 1S", b"1S ", b"1S\n", b"1SS", b"1_0S"]
    + ["\u0661S".encode(), b"1\x00S"],
)
def test_what_is_no_timeout_is_refused(text: bytes) -> None:
    with pytest.raises(WireError) as refused:
        wire.read_timeout(text)
    assert refused.value.code is StatusCode.INTERNAL


@settings(deadline=None)
@given(st.floats(min_value=1e-3, max_value=99_999_999.0))
def test_a_timeout_written_and_read_is_what_was_asked_for(seconds: float) -> None:
    text = wire.write_timeout(seconds)
    read = wire.read_timeout(text.encode())
    assert seconds * 0.999 <= read <= seconds * 1.001, text
    assert len(text) <= 9


@settings(deadline=None)
@given(st.floats(min_value=0.0, max_value=1e-3))
def test_a_tiny_timeout_is_still_a_positive_one(seconds: float) -> None:
    read = wire.read_timeout(wire.write_timeout(seconds).encode())
    assert 0.0 < read <= max(seconds, 1e-6)
    assert seconds - read <= 1e-6 + 1e-12


@pytest.mark.parametrize("seconds", [-1.0, -1e9, 0.0])
def test_a_timeout_that_is_over_is_written_as_nearly_nothing(seconds: float) -> None:
    """TimeoutValue is a positive integer."""
    assert 0.0 < wire.read_timeout(wire.write_timeout(seconds).encode()) <= 1e-3


@pytest.mark.parametrize("seconds", [1e8, 1e12, 1e300])
def test_a_timeout_that_no_eight_digits_of_seconds_hold_is_the_longest_there_is(seconds: float) -> None:
    text = wire.write_timeout(seconds)
    assert len(text) <= 9
    assert wire.read_timeout(text.encode()) >= 99_999_999.0


# --- metadata


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(
                NAMES.map(lambda name: f"x-{name}.").map(str),
                st.text([chr(code) for code in range(0x21, 0x7F)], min_size=1, max_size=20),
            ),
            st.tuples(NAMES.map(lambda name: f"x-{name}-bin"), st.binary(max_size=20)),
        ),
        max_size=6,
    )
)
def test_metadata_written_and_read_is_the_same(metadata: list[tuple[str, str | bytes]]) -> None:
    headers = [
        (name.encode() if isinstance(name, str) else name, value.encode() if isinstance(value, str) else value)
        for name, value in wire.write_metadata(metadata)
    ]
    assert wire.read_metadata(headers) == tuple(metadata)


@settings(deadline=None)
@given(st.binary(max_size=30))
def test_binary_metadata_is_read_padded_and_unpadded(value: bytes) -> None:
    padded = base64.b64encode(value)
    assert wire.read_metadata([(b"a-bin", padded)]) == (("a-bin", value),)
    assert wire.read_metadata([(b"a-bin", padded.rstrip(b"="))]) == (("a-bin", value),)


def test_binary_metadata_is_written_unpadded() -> None:
    assert wire.write_metadata([("a-bin", b"\xff")]) == [("a-bin", b"/w")]


@pytest.mark.parametrize("value", [b"!", b"a", b"ab-_", b"YW Jj", b"YW\nJj", b"=", b"\xff\xff"])
def test_binary_metadata_that_is_no_base64_is_refused(value: bytes) -> None:
    with pytest.raises(WireError) as refused:
        wire.read_metadata([(b"a-bin", value)])
    assert refused.value.code is StatusCode.INTERNAL


@pytest.mark.parametrize(("joined"), [b"YQ,YmM", b"YQ==,YmM=", b"YQ==,YmM"])
def test_binary_values_joined_by_a_comma_are_told_apart(joined: bytes) -> None:
    """Whoever stands between may join them: "Implementations must split Binary-Headers on ','"."""
    assert wire.read_metadata([(b"a-bin", joined)]) == (("a-bin", b"a"), ("a-bin", b"bc"))


def test_order_and_repetition_are_kept() -> None:
    headers = [(b"a", b"2"), (b"b", b"x"), (b"a", b"1"), (b"a", b"2")]
    assert wire.read_metadata(headers) == (("a", "2"), ("b", "x"), ("a", "1"), ("a", "2"))


@pytest.mark.parametrize(
    "name",
    [":method", ":scheme", ":path", ":authority", ":status", "te", "content-type", "content-length", "host"]
    + ["grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "grpc-status", "grpc-message"],
)
def test_the_headers_of_http_and_grpc_are_no_metadata(name: str) -> None:
    assert wire.read_metadata([(name.encode(), b"x"), (b"own", b"y")]) == (("own", "y"),)


def test_the_details_of_a_status_are_metadata() -> None:
    """What reads the rich error looks for them there."""
    assert wire.read_metadata([(b"grpc-status-details-bin", b"CAU")]) == (("grpc-status-details-bin", b"\x08\x05"),)


@pytest.mark.parametrize("value", [b"caf\xc3\xa9", b"caf\xe9", b"a\tb"])
def test_a_value_beyond_ascii_neither_fails_nor_cannot_be_echoed(value: bytes) -> None:
    """Lawful in HTTP, not in gRPC: it may be thrown away or accepted, but then the application may send it back."""
    wire.write_metadata(wire.read_metadata([(b"a", value)]))


@pytest.mark.parametrize(
    "name",
    ["", "Upper", "Upper-bin", "a b", "a b-bin", "a:b", ":path", ":path-bin", "a\n", "a\x00", "a\r\nb-bin", "naïve"]
    + ["naïve-bin", "a/b", "a\x7f"],
)
def test_a_name_that_no_header_has_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="metadata"):
        wire.write_metadata([(name, b"value")])


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x00b", "\x7f", "é", b"\xff", "a\tb", "\r\n"])
def test_a_value_that_no_header_has_is_refused(value: str | bytes) -> None:
    with pytest.raises(ValueError, match="metadata"):
        wire.write_metadata([("name", value)])


def test_any_bytes_may_be_binary_metadata() -> None:
    value = bytes(range(256))
    ((name, text),) = wire.write_metadata([("all-bin", value)])
    assert name == "all-bin"
    assert isinstance(text, bytes)
    assert text.isascii()
    assert wire.read_metadata([(b"all-bin", text)]) == (("all-bin", value),)


# --- status


def as_headers(written: list[tuple[str | bytes, str | bytes]]) -> list[tuple[bytes, bytes]]:
    return [
        (name.encode() if isinstance(name, str) else name, value.encode() if isinstance(value, str) else value)
        for name, value in written
    ]


@settings(deadline=None)
@given(code=st.sampled_from(list(StatusCode)), details=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_status_written_and_read_is_the_same(code: StatusCode, details: str) -> None:
    trailers = as_headers(wire.write_status(code.value[0], details))
    assert wire.read_status(trailers) == (code, details)
    # Nothing but what a header may hold, whatever the text.
    assert all(0x20 <= byte <= 0x7E for _, value in trailers for byte in value)


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ("100%", b"100%25"),
        ("%41", b"%2541"),
        ("a\nb", b"a%0Ab"),
        ("é", b"%C3%A9"),
        ("😀", b"%F0%9F%98%80"),
        ("plain ~ text!", b"plain ~ text!"),
        ("\x7f\x00", b"%7F%00"),
    ],
)
def test_details_are_percent_encoded(details: str, text: bytes) -> None:
    assert (b"grpc-message", text) in as_headers(wire.write_status(2, details))


@pytest.mark.parametrize(
    ("text", "details"),
    [
        (b"%", "%"),
        (b"%4", "%4"),
        (b"%zz ok", "%zz ok"),
        (b"%e2%82%ac", "€"),
        (b"100%25 %", "100% %"),
        (b"%FF", "\ufffd"),
        (b"caf\xc3\xa9", "café"),
    ],
)
def test_details_encoded_badly_are_read_as_far_as_they_go(text: bytes, details: str) -> None:
    assert wire.read_status([(b"grpc-status", b"2"), (b"grpc-message", text)]) == (StatusCode.UNKNOWN, details)


def test_details_that_are_no_unicode_do_not_stop_the_status() -> None:
    trailers = as_headers(wire.write_status(13, "lone \ud800 half"))
    found = wire.read_status(trailers)
    assert found is not None
    assert found[0] is StatusCode.INTERNAL
    assert found[1].startswith("lone ")


def test_no_details_are_no_header() -> None:
    assert wire.write_status(0, "") == [("grpc-status", "0")]
    assert wire.read_status([(b"grpc-status", b"0")]) == (StatusCode.OK, "")


def test_metadata_goes_with_the_status() -> None:
    trailers = as_headers(wire.write_status(5, "gone", [("a", "b"), ("c-bin", b"\x00")]))
    assert wire.read_status(trailers) == (StatusCode.NOT_FOUND, "gone")
    assert wire.read_metadata(trailers) == (("a", "b"), ("c-bin", b"\x00"))


@pytest.mark.parametrize("code", list(StatusCode))
def test_every_code_is_known(code: StatusCode) -> None:
    assert wire.read_status([(b"grpc-status", str(code.value[0]).encode())]) == (code, "")


@pytest.mark.parametrize(
    "text", [b"17", b"99", b"999999999999", b"", b"-1", b"+1", b"x", b"1.0", b" 1", b"0x1", b"\xb2"]
)
def test_an_unknown_or_malformed_code_is_unknown(text: bytes) -> None:
    assert wire.read_status([(b"grpc-status", text)]) == (StatusCode.UNKNOWN, "")


def test_a_code_of_thousands_of_digits_is_unknown() -> None:
    """Python refuses to make a number of so many digits; a header may hold 64 KiB of them."""
    assert wire.read_status([(b"grpc-status", b"1" * 5000)]) == (StatusCode.UNKNOWN, "")


@pytest.mark.parametrize("headers", [[], [(b"grpc-message", b"x")], [(b":status", b"200"), (b"a", b"b")]])
def test_no_status_is_none(headers: list[tuple[bytes, bytes]]) -> None:
    assert wire.read_status(headers) is None


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (b"400", StatusCode.INTERNAL),
        (b"401", StatusCode.UNAUTHENTICATED),
        (b"403", StatusCode.PERMISSION_DENIED),
        (b"404", StatusCode.UNIMPLEMENTED),
        (b"429", StatusCode.UNAVAILABLE),
        (b"431", StatusCode.INTERNAL),
        (b"502", StatusCode.UNAVAILABLE),
        (b"503", StatusCode.UNAVAILABLE),
        (b"504", StatusCode.UNAVAILABLE),
        (b"200", StatusCode.UNKNOWN),
        (b"302", StatusCode.UNKNOWN),
        (b"500", StatusCode.UNKNOWN),
        (b"", StatusCode.UNKNOWN),
        (b"abc", StatusCode.UNKNOWN),
    ],
)
def test_http_statuses_mean_what_grpc_says(status: bytes, code: StatusCode) -> None:
    assert wire.status_of_http(status) is code
