"""The network between two processes, to be broken on purpose: a proxy on the loopback with a control for each link.

    async with FaultProxy() as proxy:
        link = await proxy.open("router-0", "postgres", Address(path="/run/pg/.s.PGSQL.5432"))
        ...                                     # router-0 connects to link.port instead
        link.blackhole()                        # connections stay open, nothing comes through
        link.heal()                             # what was held back arrives now, late and in order
        link.delay(300)                         # each piece of either direction takes 300 ms longer
        link.cut(refuse=True)                   # every connection is reset, and so is each new one

A healed blackhole delivers what was sent meanwhile, as TCP does after a partition of the network: a commit sent by an
owner that was cut off arrives after another one took over. What is not read is not lost but held in the sender, so a
link holds a bounded number of bytes.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

HOST: Final = "127.0.0.1"
MAX_HELD_BYTES: Final = 1024 * 1024
"""Of one direction of a connection; beyond it the proxy does not read on."""
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER that makes a close a reset."""


Tap = Callable[[object, bool, bytes], None]
"""Told of a piece of a connection: which one (its client's end), whether the client's side sent it, and the bytes."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a link leads: a port of the loopback, or a Unix socket."""

    port: int = 0
    path: str = ""


class _End(asyncio.Protocol):
    """One end of a connection: what it receives goes to the other end, when and if the link lets it."""

    def __init__(self, link: FaultLink, *, is_client: bool) -> None:
        self.link, self.is_client = link, is_client
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None
        self._held: deque[tuple[float, bytes]] = deque()
        """What came from this end and is not with the other: when it is due, and the bytes; none: the end itself."""
        self._held_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.is_client:
            self.link.accepted(self)

    def data_received(self, data: bytes) -> None:
        if self.link.tap is not None:
            self.link.tap(self if self.is_client else self.other, self.is_client, data)
        self._held.append((asyncio.get_running_loop().time() + self.link.delay_s, data))
        self._held_bytes += len(data)
        self.pass_on()
        if self._held_bytes > MAX_HELD_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self.connection_lost(None)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self.link.is_hole(self.is_client):
            self.reset()
            return
        self._held.append((asyncio.get_running_loop().time() + self.link.delay_s, b""))
        self.pass_on()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def pass_on(self) -> None:
        """Gives the other end what is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        out = self.other.transport if self.other is not None else None
        if out is None or self.link.is_hole(self.is_client):
            return
        loop = asyncio.get_running_loop()
        while self._held:
            due, data = self._held[0]
            if self.link.delay_s and due > loop.time():
                self._timer = loop.call_at(due, self.pass_on)
                break
            self._held.popleft()
            self._held_bytes -= len(data)
            if data:
                out.write(data)
            else:
                out.close()
                # Known until both ends are closed: heal and cut reach what the other direction holds back.
                if self.transport is None or self.transport.is_closing():
                    self.link.forget(self)
        if self._held_bytes <= MAX_HELD_BYTES and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def reset(self) -> None:
        """Both ends see a reset."""
        for end in (self, self.other):
            if end is None or end.transport is None:
                continue
            if end._timer is not None:
                end._timer.cancel()
            end._held.clear()
            sock = end.transport.get_extra_info("socket")
            if sock is not None and sock.family == socket.AF_INET and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.transport.abort()
        self.link.forget(self)


class FaultLink:
    """The connections of one process to another. Made by `FaultProxy.open`; `port` is where the former connects."""

    def __init__(self, source: str, server: str, target: Address) -> None:
        self.source, self.server, self.target = source, server, target
        self.port = 0
        self.tap: Tap | None = None
        """Is shown every piece that comes from either side, before any fault."""
        self.delay_s = 0.0
        self._there_is_hole = self._back_is_hole = self._refuses = False
        self._clients: set[_End] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def __str__(self) -> str:
        return f"{self.source}->{self.server}"

    @property
    def address(self) -> str:
        """Where to connect instead of the target."""
        return f"{HOST}:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._clients)

    # ---- faults

    def cut(self, *, refuse: bool = False) -> None:
        """Reset every connection; with `refuse` each new one too, until `heal`."""
        self._refuses = refuse
        for client in list(self._clients):
            client.reset()

    def delay(self, milliseconds: float) -> None:
        """Each piece takes so much longer, in either direction."""
        self.delay_s = milliseconds / 1000

    def blackhole(self, *, there: bool = True, back: bool = True) -> None:
        """Connections stay open and new ones are accepted, but nothing passes: to the server, or back from it."""
        self._there_is_hole, self._back_is_hole = there, back

    def heal(self) -> None:
        """A perfect link again. What was held back is delivered now, in order."""
        self.delay_s = 0.0
        self._there_is_hole = self._back_is_hole = self._refuses = False
        for client in list(self._clients):
            client.pass_on()
            if client.other is not None:
                client.other.pass_on()

    def is_hole(self, from_client: bool) -> bool:
        """Whether what this side sends is held back."""
        return self._there_is_hole if from_client else self._back_is_hole

    # ---- connections

    async def start(self) -> None:
        """Listen on a free port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _End(self, is_client=True), HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        self.cut(refuse=True)

    def accepted(self, client: _End) -> None:
        """A connection has come: make the one that it stands for."""
        self._clients.add(client)
        if self._refuses:
            client.reset()
            return
        task = asyncio.get_running_loop().create_task(self._connect(client))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, client: _End) -> None:
        loop = asyncio.get_running_loop()
        server = _End(self, is_client=False)
        server.other = client
        try:
            if self.target.path:
                await loop.create_unix_connection(lambda: server, self.target.path)
            else:
                await loop.create_connection(lambda: server, HOST, self.target.port)
        except OSError:
            client.reset()
            return
        if client not in self._clients:  # It was cut meanwhile.
            server.reset()
            return
        client.other = server
        client.pass_on()

    def forget(self, end: _End) -> None:
        """A connection is over."""
        for each in (end, end.other):
            if each is not None:
                self._clients.discard(each)


class FaultProxy:
    """All links of a stack. An async context manager."""

    def __init__(self) -> None:
        self.links: dict[tuple[str, str], FaultLink] = {}
        self.taps: dict[tuple[str, str], Tap] = {}
        """Who is shown what passes a link; for links that are opened later."""

    async def __aenter__(self) -> FaultProxy:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def open(self, source: str, server: str, target: Address) -> FaultLink:
        """The link from a process to another; made at the first call."""
        link = self.links.get((source, server))
        if link is None:
            link = self.links[source, server] = FaultLink(source, server, target)
            link.tap = self.taps.get((source, server))
            await link.start()
        return link

    def link(self, source: str, server: str) -> FaultLink:
        """A link that is open."""
        return self.links[source, server]

    def heal(self) -> None:
        """Every link is perfect again."""
        for link in self.links.values():
            link.heal()

    async def stop(self) -> None:
        """End every connection of every link."""
        for link in self.links.values():
            await link.stop()
