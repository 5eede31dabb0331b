"""gRPC over HTTP/2: messages, metadata, timeouts and statuses as they stand on the wire.

Source: PROTOCOL-HTTP2.md of gRPC. Nothing here knows a connection.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterable
from struct import Struct
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

import structlog
from grpc import StatusCode

from soma_common.http2.headers import Headers

Metadata = tuple[tuple[str, str | bytes], ...]

LEAST_HEADERS: Final = 8 * 1024
"""Bytes of headers that peers take who do not say how many."""
CUT_DETAILS: Final = 512
"""Characters that are left of a status' text that is too long for its peer."""
_HEADER_OVERHEAD: Final = 32
"""Of each header, as RFC 9113, 6.5.2 counts."""
_FIRST_HEADERS: Final = 512
"""Room for the headers of a response that has no more than them."""

CONTENT_TYPE: Final = "application/grpc"
HTTP_HEADERS: Final = (
    (":status", "200"),
    ("content-type", CONTENT_TYPE),
    ("grpc-accept-encoding", "identity,deflate,gzip"),
)
"""What a response begins with."""

PREFIX: Final = Struct(">BI")
"""Whether the message is compressed, and its length."""
PREFIX_BYTES: Final = PREFIX.size

_log = structlog.get_logger(__name__)

_WINDOW_BITS: Final = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_RESERVED: Final = frozenset(
    (b"te", b"content-type", b"content-length", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding", b"host")
)
_STATUS_HEADERS: Final = frozenset((b"grpc-status", b"grpc-message"))
_CODES: Final = {b"%d" % code.value[0]: code for code in StatusCode}
_NAME: Final = re.compile(r"[0-9a-z_.-]+")
_VALUE: Final = re.compile(rb"[ -~]*")
_PLAIN: Final = bytes(range(0x20, 0x7F)).replace(b"%", b"").decode()
_HTTP_STATUS: Final = {
    b"400": StatusCode.INTERNAL,
    b"401": StatusCode.UNAUTHENTICATED,
    b"403": StatusCode.PERMISSION_DENIED,
    b"404": StatusCode.UNIMPLEMENTED,
    b"429": StatusCode.UNAVAILABLE,
    b"431": StatusCode.INTERNAL,
    b"502": StatusCode.UNAVAILABLE,
    b"503": StatusCode.UNAVAILABLE,
    b"504": StatusCode.UNAVAILABLE,
}
"""What a response that is not gRPC's means (http-grpc-status-mapping.md)."""


class WireError(Exception):
    """What came is not what gRPC allows; `code` is the status to end the call with."""

    def __init__(self, code: StatusCode, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why


class Packed(bytes):
    """A message that is compressed. It is expanded when it is read: what nobody reads stays small."""


class MessageReader:
    """Puts the messages of a stream together from its bytes. At most one message is held that is not whole yet."""

    __slots__ = ("_encoding", "_held", "_max_bytes", "_needed")

    def __init__(self, max_bytes: int, encoding: bytes = b"identity") -> None:
        """`encoding` is what compressed messages are compressed by."""
        self._max_bytes = max_bytes
        self._encoding = encoding
        self._held = bytearray()
        self._needed = PREFIX_BYTES

    def read(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes. Raises WireError for one that is too large."""
        if not self._held and len(data) >= PREFIX_BYTES:
            compressed, size = PREFIX.unpack_from(data)
            if size == len(data) - PREFIX_BYTES and not compressed and size <= self._max_bytes:
                return [data[PREFIX_BYTES:]]  # nearly always
        held = self._held
        held += data
        if len(held) < self._needed:
            return []
        messages: list[bytes] = []
        at = 0
        while True:
            self._needed = PREFIX_BYTES
            if len(held) - at < PREFIX_BYTES:
                break
            compressed, size = PREFIX.unpack_from(held, at)
            if size > self._max_bytes:
                raise _too_large(size, self._max_bytes)
            if compressed > 1:
                raise WireError(StatusCode.INTERNAL, f"a message with the flag {compressed}, which is neither 0 nor 1")
            self._needed += size
            if len(held) - at < self._needed:
                break
            message = held[at + PREFIX_BYTES : at + self._needed]
            at += self._needed
            messages.append(Packed(message) if compressed else bytes(message))
        del held[:at]
        return messages

    @property
    def is_between_messages(self) -> bool:
        """Whether nothing is held of a message that is not whole."""
        return not self._held

    @property
    def held(self) -> int:
        """Bytes of a message that is not whole."""
        return len(self._held)

    def expanded(self, message: bytes) -> bytes:
        """A message as it was before it was compressed. Raises WireError if it is too large or cannot be expanded."""
        if type(message) is not Packed:
            return message
        bits = _WINDOW_BITS.get(self._encoding)
        if bits is None:
            raise WireError(StatusCode.INTERNAL, "a message is said to be compressed, but not how")
        expander = zlib.decompressobj(bits)
        try:
            whole = expander.decompress(message, self._max_bytes + 1)
        except zlib.error as error:
            raise WireError(StatusCode.INTERNAL, f"a message cannot be expanded: {error}") from None
        if len(whole) > self._max_bytes:
            raise _too_large(len(whole), self._max_bytes)
        if not expander.eof:
            raise WireError(StatusCode.INTERNAL, "a compressed message ends too early")
        return whole


def _too_large(size: int, most: int) -> WireError:
    return WireError(StatusCode.RESOURCE_EXHAUSTED, f"received message larger than max ({size} vs. {most})")


def is_known_encoding(encoding: bytes) -> bool:
    """Whether messages compressed so can be read."""
    return encoding == b"identity" or encoding in _WINDOW_BITS


def read_timeout(value: bytes) -> float:
    """The seconds of a `grpc-timeout`. Raises WireError for what is none."""
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        raise WireError(StatusCode.INTERNAL, f"grpc-timeout cannot be read: {value!r}")
    return int(found[1]) * _SECONDS[found[2]]


def write_timeout(seconds: float) -> str:
    """A `grpc-timeout`, of at most eight digits, not shorter than asked for by more than a thousandth."""
    micros = max(int(seconds * 1e6), 1)
    if micros < 10**8:
        return f"{micros}u"
    millis = micros // 1000
    return f"{millis}m" if millis < 10**8 else f"{min(millis // 1000, 10**8 - 1)}S"


def read_metadata(headers: Headers) -> Metadata:
    """What the application may know of the headers: all but those of HTTP and of gRPC itself."""
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name[:1] == b":" or name in _RESERVED or name in _STATUS_HEADERS:
            continue
        if name.endswith(b"-bin"):  # several values may come as one, with commas between them
            metadata += [(name.decode("latin-1"), _read_binary(part)) for part in value.split(b",")]
        elif _VALUE.fullmatch(value):  # what is none could not be sent on
            metadata.append((name.decode("latin-1"), value.decode("latin-1")))
    return tuple(metadata)


def _read_binary(value: bytes) -> bytes:
    value = value.strip()
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise WireError(StatusCode.INTERNAL, "binary metadata that is no base64") from None


def write_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[str | bytes, str | bytes]]:
    """Metadata as headers. Raises ValueError for what cannot be one."""
    headers: list[tuple[str | bytes, str | bytes]] = []
    for name, value in metadata:
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"metadata {name!r} is no header: lower-case letters, digits and `_.-`")
        if name.endswith("-bin"):
            raw = value if isinstance(value, bytes) else value.encode()
            headers.append((name, base64.b64encode(raw).rstrip(b"=")))
            continue
        text = value.encode() if isinstance(value, str) else value
        if _VALUE.fullmatch(text) is None:
            raise ValueError(f"the value of metadata {name!r} is no header: printable ASCII, or end its name in -bin")
        headers.append((name, text))
    return headers


def write_status(
    code: int, details: str, metadata: Iterable[tuple[str, str | bytes]] = (), most: int = LEAST_HEADERS
) -> list[tuple[str | bytes, str | bytes]]:
    """The trailers that end a call. Metadata that is no header is left out; so is all of it, and most of a long text,
    where the peer takes no more than `most` bytes of headers.
    """
    status: list[tuple[str | bytes, str | bytes]] = [("grpc-status", str(code))]
    try:
        given = write_metadata(metadata)
    except ValueError:
        _log.exception("grpc.bad_trailers")
        given = []
    trailers = [*status, *_written_details(details), *given]
    if sum(len(name) + len(value) + _HEADER_OVERHEAD for name, value in trailers) <= most - _FIRST_HEADERS:
        return trailers
    _log.warning("grpc.trailers_cut", code=code)
    return [*status, *_written_details(details[:CUT_DETAILS])]


def _written_details(details: str) -> list[tuple[str | bytes, str | bytes]]:
    return [("grpc-message", quote_from_bytes(details.encode(errors="replace"), safe=_PLAIN))] if details else []


def read_status(headers: Headers) -> tuple[StatusCode, str] | None:
    """The status among headers; None: there is none."""
    code: StatusCode | None = None
    details = ""
    for name, value in headers:
        if name == b"grpc-status":
            code = _CODES.get(value, StatusCode.UNKNOWN)
        elif name == b"grpc-message":
            details = unquote_to_bytes(value).decode(errors="replace")
    return None if code is None else (code, details)


def status_of_http(status: bytes) -> StatusCode:
    """What a response that is not gRPC's means."""
    return _HTTP_STATUS.get(status, StatusCode.UNKNOWN)
