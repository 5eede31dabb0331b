"""Header blocks: written without a state, read with one, and the rules of HTTP/2 for what they may hold.

What is written refers to the static table of HPACK alone (RFC 7541), so a block is the same on every connection and may
be made once. What repeats in our headers is short, or a secret that belongs in no table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from hpack import Decoder, Encoder, HPACKError, NeverIndexedHeaderTuple
from hpack.exceptions import OversizedHeaderListError

from soma_common.http2.frames import ConnectionFault, ErrorCode, StreamFault

Headers = list[tuple[bytes, bytes]]

MAX_BLOCK_BYTES: Final = 64 * 1024
"""Of a header block on the wire, and of what it decodes to (SETTINGS_MAX_HEADER_LIST_SIZE)."""
FIELD_OVERHEAD: Final = 32
"""Bytes that a field counts beyond its name and value (RFC 9113, 6.5.2)."""
TABLE_EMPTIED: Final = b"\x20"
"""Begins the next block after the peer has changed the size of its table: none of it is used (RFC 7541, 4.2, 6.3)."""

_CONNECTION_SPECIFIC: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_LONGEST_LENGTH: Final = 18
"""Digits of a content-length."""
_MAX_TABLE_UPDATES: Final = 2
"""Changes of the table's size that a block may begin with (RFC 7541, 4.2)."""
_LONGEST_UPDATE: Final = 6
"""Bytes of one."""
_TABLE_UPDATES: Final = re.compile(rb"(?:\x3f[\x80-\xff]*[\x00-\x7f]|[\x20-\x3e])*")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE: Final = re.compile(rb"(?![ \t])[^\0\r\n]*(?<![ \t])")
_REQUEST_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
_REQUEST_NEEDS: Final = (b":method", b":scheme", b":path")
_RESPONSE_PSEUDO: Final = frozenset((b":status",))

_encoder: Final = Encoder()


def encode(headers: Iterable[tuple[str | bytes, str | bytes]]) -> bytes:
    """A header block that any peer reads in any state."""
    return bytes(_encoder.encode([NeverIndexedHeaderTuple(_bytes(name), _bytes(value)) for name, value in headers]))


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8") if isinstance(text, str) else text


class HeaderReader:
    """Decodes the header blocks of one connection, in the order they came."""

    __slots__ = ("_decoder",)

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MAX_BLOCK_BYTES)

    def read(self, block: bytes) -> Headers:
        """The headers of a block. Raises ConnectionFault if it is none: the tables of both ends differ from then on."""
        if block[:1] >= b"\x20" and block[:1] <= b"\x3f":
            updates = _TABLE_UPDATES.match(block[:64])
            if updates is not None and len(updates[0]) > _MAX_TABLE_UPDATES * _LONGEST_UPDATE:
                raise ConnectionFault(
                    ErrorCode.COMPRESSION_ERROR, "a header block that goes on changing the table's size"
                )
        try:
            return [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError:
            raise ConnectionFault(
                ErrorCode.ENHANCE_YOUR_CALM, f"headers of more than {MAX_BLOCK_BYTES} bytes"
            ) from None
        except (HPACKError, IndexError, ValueError) as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, f"a header block that cannot be read: {error}") from None


def list_size(headers: Headers) -> int:
    """Bytes of decoded headers, as SETTINGS_MAX_HEADER_LIST_SIZE counts them (RFC 9113, 6.5.2)."""
    return sum([len(name) + len(value) for name, value in headers]) + FIELD_OVERHEAD * len(headers)


def check_request(stream: int, headers: Headers) -> None:
    """Raises StreamFault for a request that is malformed (RFC 9113, section 8.2 and 8.3)."""
    seen = _check(stream, headers, _REQUEST_PSEUDO)
    for name in _REQUEST_NEEDS:
        if name not in seen:
            raise _malformed(stream, f"a request without {name.decode()}")


def check_response(stream: int, headers: Headers) -> None:
    """Raises StreamFault for a response that is malformed."""
    if b":status" not in _check(stream, headers, _RESPONSE_PSEUDO):
        raise _malformed(stream, "a response without :status")


def check_trailers(stream: int, headers: Headers) -> None:
    """Raises StreamFault for trailers that are malformed."""
    _check(stream, headers, frozenset())


def content_length(stream: int, headers: Headers) -> int | None:
    """How many bytes the message says it has. Raises StreamFault for what is no number."""
    values = {value for name, value in headers if name == b"content-length"}
    if not values:
        return None
    value = values.pop()
    if values or not value.isdigit() or len(value) > _LONGEST_LENGTH:
        raise _malformed(stream, "a content-length that is no number, or are several")
    return int(value)


def _check(stream: int, headers: Headers, allowed: frozenset[bytes]) -> set[bytes]:
    """Returns which pseudo-headers there are, none of them empty."""
    pseudo: set[bytes] = set()
    regular = False
    for name, value in headers:
        if _VALUE.fullmatch(value) is None:
            raise _malformed(stream, f"a header value with a line break, a zero or space around it: {name!r}")
        if name[:1] == b":":
            if regular or name not in allowed or name in pseudo or not value:
                raise _malformed(stream, f"a pseudo-header that may not be here: {name!r}")
            pseudo.add(name)
            continue
        regular = True
        if _NAME.fullmatch(name) is None:
            raise _malformed(stream, f"a header name that is none, or not in lower case: {name!r}")
        if name in _CONNECTION_SPECIFIC or (name == b"te" and value != b"trailers"):
            raise _malformed(stream, f"a header of HTTP/1: {name!r}")
    return pseudo


def _malformed(stream: int, why: str) -> StreamFault:
    return StreamFault(stream, ErrorCode.PROTOCOL_ERROR, why)
