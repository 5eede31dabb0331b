"""Counts what processes say to each other: statements, publishes, frames. They are read off the wire, so whatever code
makes them, they are counted.

A counter is the tap of a link of the fault proxy; it sees each connection from its first byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA_FRAME: Final = 0
_PADDED: Final = 0x8


class _Bytes:
    """The bytes of one direction of a connection that are not understood yet."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def take(self, count: int) -> bytes:
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken


class PostgresStatements:
    """What clients ask of PostgreSQL: counts by (application name, type of message), such as `("router-0 writer", "E")`
    for an execution and `"S"` for a sync, the end of a round trip; `"Q"` is a simple query.
    """

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self._open: dict[object, _Bytes] = {}
        self._names: dict[object, str] = {}

    def __call__(self, connection: object, from_client: bool, data: bytes) -> None:
        """The tap."""
        if not from_client:
            return
        came = self._open.setdefault(connection, _Bytes())
        came.buffer += data
        while True:
            typed = connection in self._names
            if len(came.buffer) < 4 + typed:
                return
            length = int.from_bytes(came.buffer[typed : 4 + typed], "big") + typed
            if len(came.buffer) < length:
                return
            message = came.take(length)
            if typed:
                self.seen[self._names[connection], chr(message[0])] += 1
                continue
            words = message[8:].split(b"\0")
            options = dict(zip(words[::2], words[1::2], strict=False))
            if options:  # else it asks for encryption first
                self._names[connection] = options.get(b"application_name", b"").decode()


class NatsPublishes:
    """What a client publishes: counts by subject."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._open: dict[object, _Bytes] = {}

    def __call__(self, connection: object, from_client: bool, data: bytes) -> None:
        """The tap."""
        if not from_client:
            return
        came = self._open.setdefault(connection, _Bytes())
        came.buffer += data
        while (end := came.buffer.find(b"\r\n")) >= 0:
            words = came.buffer[:end].split()
            length = end + 2
            if words and bytes(words[0]) in (b"PUB", b"HPUB"):
                length += int(words[-1]) + 2
                if len(came.buffer) < length:
                    return
                self.seen[words[1].decode()] += 1
            came.take(length)

    def of(self, kind: str) -> int:
        """Publishes to subjects one of whose words is `kind`."""
        return sum(count for subject, count in self.seen.items() if kind in subject.split("."))


class GrpcMessages:
    """Messages of all calls of a link: `there` from the client, `back` from the server."""

    def __init__(self) -> None:
        self.there = self.back = 0
        self._open: dict[tuple[object, bool], _Bytes] = {}
        self._streams: dict[tuple[object, bool, int], _Bytes] = {}

    def __call__(self, connection: object, from_client: bool, data: bytes) -> None:
        """The tap."""
        side = (connection, from_client)
        came = self._open.get(side)
        if came is None:
            came = self._open[side] = _Bytes()
            came.buffer += data
            if from_client:
                assert came.buffer.startswith(_PREFACE), "gRPC without encryption"
                came.take(len(_PREFACE))
        else:
            came.buffer += data
        for stream, payload in _data_frames(came):
            count = self._messages(self._streams.setdefault((*side, stream), _Bytes()), payload)
            if from_client:
                self.there += count
            else:
                self.back += count

    def _messages(self, stream: _Bytes, payload: bytes) -> int:
        stream.buffer += payload
        count = 0
        while len(stream.buffer) >= 5:
            length = 5 + int.from_bytes(stream.buffer[1:5], "big")
            if len(stream.buffer) < length:
                break
            stream.take(length)
            count += 1
        return count


def _data_frames(came: _Bytes) -> Iterator[tuple[int, bytes]]:
    """Complete HTTP/2 frames that hold data: their streams and payloads."""
    while len(came.buffer) >= 9:
        length = int.from_bytes(came.buffer[:3], "big")
        if len(came.buffer) < 9 + length:
            return
        head, payload = came.take(9), came.take(length)
        if head[3] == _DATA_FRAME:
            if head[4] & _PADDED:
                payload = payload[1 : len(payload) - payload[0]]
            yield int.from_bytes(head[5:9], "big"), payload
