"""The proxy that stands for the network does to a connection what it says."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from soma_common.testing.eventually import eventually
from tests.chaos.fault_proxy import Address, FaultLink, FaultProxy


class Peer:
    """A server that keeps what it hears, and says it back."""

    def __init__(self) -> None:
        self.heard = b""
        self.begun = self.ended = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.begun += 1
        try:
            while data := await reader.read(65536):
                self.heard += data
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.ended += 1
            writer.close()


@dataclass
class Caller:
    """A connection over the link."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def say(self, data: bytes) -> bytes:
        """What the peer says back."""
        self.writer.write(data)
        return await self.reader.readexactly(len(data))


@asynccontextmanager
async def call(link: FaultLink) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Peer, FaultLink]]:
    peer = Peer()
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    async with FaultProxy() as proxy:
        yield peer, await proxy.open("here", "there", Address(server.sockets[0].getsockname()[1]))
    server.close()
    await eventually(lambda: peer.ended == peer.begun, 5, "nothing is left open")


async def test_passes_both_ways_and_ends_when_one_side_does() -> None:
    async with linked() as (peer, link):
        async with call(link) as caller:
            assert await caller.say(b"x" * 3_000_000) == b"x" * 3_000_000
        await eventually(lambda: peer.ended == 1 and not link.connections, 5, "the other side is told")


async def test_a_blackhole_holds_and_a_healed_one_delivers_in_order() -> None:
    numbers = [b"%02d" % number for number in range(100)]
    async with linked() as (peer, link), call(link) as late:
        async with call(link) as early:
            await early.say(b">")
            link.blackhole()
            early.writer.writelines(numbers)
            await early.writer.drain()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(late.say(b"late"), 0.2)
        assert peer.heard == b">"
        assert peer.ended == 0
        link.heal()
        assert await late.reader.readexactly(4) == b"late"
        await eventually(lambda: peer.ended == 1, 5, "the end comes after what was said")
        assert b"".join(numbers) in peer.heard.replace(b"late", b"")


async def test_a_blackhole_of_one_direction_lets_the_other_through() -> None:
    async with linked() as (peer, link), call(link) as caller:
        link.blackhole(there=False)
        caller.writer.write(b"heard")
        await eventually(lambda: peer.heard == b"heard", 5, "what goes there arrives")
        link.heal()
        assert await caller.reader.readexactly(5) == b"heard"


@pytest.mark.parametrize("healed", [True, False], ids=["healed", "stopped"])
async def test_a_connection_whose_end_is_held_back_is_closed_too(healed: bool) -> None:
    """If not, the warning of a socket that nobody closed fails the test."""
    async with linked() as (peer, link):
        async with call(link) as caller:
            await caller.say(b"x")
            link.blackhole(there=False)
        await eventually(lambda: peer.ended == 1, 5, "the end of the caller arrives")
        assert link.connections == 1
        if healed:
            link.heal()
            await eventually(lambda: not link.connections, 5, "so does the other's")
    gc.collect()


async def test_a_cut_resets_what_there_is_and_refuses_what_comes() -> None:
    async with linked() as (_, link):
        async with call(link) as caller:
            await caller.say(b"a")
            link.cut(refuse=True)
            with pytest.raises(ConnectionResetError):
                await caller.reader.read(1)
        async with call(link) as refused:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await refused.say(b"b")
        link.heal()
        async with call(link) as again:
            assert await again.say(b"c") == b"c"


async def test_a_delay_keeps_the_order() -> None:
    async with linked() as (_, link), call(link) as caller:
        began = time.monotonic()
        link.delay(100)
        caller.writer.write(b"first")
        await asyncio.sleep(0.05)
        link.delay(1)
        caller.writer.write(b"second")
        assert await caller.reader.readexactly(11) == b"firstsecond"
        assert time.monotonic() - began >= 0.1
