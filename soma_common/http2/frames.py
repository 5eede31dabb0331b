"""The frames of HTTP/2 as bytes (RFC 9113, section 4 and 6), and what is wrong with one."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client says first (section 3.4)."""

HEADER: Final = Struct(">IBI")
"""Length and type together, flags, and the stream with a reserved bit."""
HEADER_BYTES: Final = HEADER.size

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

LARGEST_WINDOW: Final = 2**31 - 1
LARGEST_STREAM: Final = 2**31 - 1
FIRST_WINDOW: Final = 65_535
"""Of a connection, and of a stream unless the settings say another."""
MAX_SETTINGS: Final = 64
"""In one frame. There are six, and some more by extensions."""
SMALLEST_MAX_FRAME: Final = 16_384
LARGEST_MAX_FRAME: Final = 2**24 - 1

_SETTING: Final = Struct(">HI")
_WORD: Final = Struct(">I")
_TWO_WORDS: Final = Struct(">II")


class ErrorCode(IntEnum):
    """Why a stream or a connection ends (section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class ConnectionFault(Exception):
    """The peer broke the protocol in a way that ends the connection (section 5.4.1)."""

    def __init__(self, code: ErrorCode, why: str) -> None:
        super().__init__(f"{code.name}: {why}")
        self.code, self.why = code, why


class StreamFault(Exception):
    """The peer broke the protocol in a way that ends one stream (section 5.4.2)."""

    def __init__(self, stream: int, code: ErrorCode, why: str) -> None:
        super().__init__(f"stream {stream}: {code.name}: {why}")
        self.stream, self.code, self.why = stream, code, why


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return HEADER.pack(len(payload) << 8 | kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in values.items()))


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """The settings of a frame, in their order. Raises ConnectionFault for values out of range (section 6.5.2)."""
    if len(payload) % _SETTING.size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of a length that is no multiple of six")
    if len(payload) > MAX_SETTINGS * _SETTING.size:
        raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"more than {MAX_SETTINGS} settings in a frame")
    values: list[tuple[int, int]] = [_SETTING.unpack_from(payload, at) for at in range(0, len(payload), _SETTING.size)]
    for name, value in values:
        if name == ENABLE_PUSH and value > 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"SETTINGS_ENABLE_PUSH is {value}")
        if name == INITIAL_WINDOW_SIZE and value > LARGEST_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"SETTINGS_INITIAL_WINDOW_SIZE is {value}")
        if name == MAX_FRAME_SIZE and not SMALLEST_MAX_FRAME <= value <= LARGEST_MAX_FRAME:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"SETTINGS_MAX_FRAME_SIZE is {value}")
    return values


def window_update(stream: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame: so many bytes more may be sent."""
    return frame(WINDOW_UPDATE, 0, stream, _WORD.pack(increment))


def rst_stream(stream: int, code: ErrorCode) -> bytes:
    """A RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream, _WORD.pack(code))


def goaway(last_stream: int, code: ErrorCode, why: str = "") -> bytes:
    """A GOAWAY frame: streams above the last one were not acted on."""
    return frame(GOAWAY, 0, 0, _TWO_WORDS.pack(last_stream, code) + why.encode()[:1024])


def read_word(payload: bytes, what: str) -> int:
    """The one number of RST_STREAM and WINDOW_UPDATE. Raises ConnectionFault if there is not just one."""
    if len(payload) != _WORD.size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"{what} of {len(payload)} bytes")
    value: int = _WORD.unpack(payload)[0]
    return value


def read_goaway(payload: bytes) -> tuple[int, int, str]:
    """Last stream, code and text of a GOAWAY frame."""
    if len(payload) < _TWO_WORDS.size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"GOAWAY of {len(payload)} bytes")
    last, code = _TWO_WORDS.unpack_from(payload)
    return last & LARGEST_STREAM, code, payload[_TWO_WORDS.size :].decode(errors="replace")


def unpadded(payload: bytes, flags: int) -> bytes:
    """The payload of DATA or HEADERS without its padding. Raises ConnectionFault if the padding is longer than it."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "padding that is longer than its frame")
    return payload[1 : len(payload) - payload[0]]


def unprioritized(payload: bytes, flags: int, stream: int) -> bytes:
    """The header block of HEADERS without its priority, which nobody heeds any more (section 5.3.2)."""
    if not flags & WITH_PRIORITY:
        return payload
    check_priority(payload[:5], stream)
    return payload[5:]


def check_priority(payload: bytes, stream: int) -> None:
    """Raises StreamFault for a priority that no stream can have."""
    if len(payload) != 5:
        raise StreamFault(stream, ErrorCode.FRAME_SIZE_ERROR, f"a priority of {len(payload)} bytes")
    if _WORD.unpack_from(payload)[0] & LARGEST_STREAM == stream:
        raise StreamFault(stream, ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")
