"""A store loses what it had, goes back to an older copy, stands still or has no room: nothing is acknowledged that it
does not have, what can be known is answered once, and what is lost is told.
"""

from __future__ import annotations

import asyncio
import resource
import shutil
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import pytest
from nats.js import JetStreamContext
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import Delivery

from soma_common.client.channel_client import ChannelClient
from soma_common.embedded.process import descendants
from soma_common.errors import Unavailable
from soma_common.nats.connection import connect_nats
from soma_common.nats.lanes import stream_name
from soma_common.testing.eventually import eventually
from somastack.parts import NatsPart, Unresponsive
from tests.chaos.load import Load, Mix
from tests.chaos.stack import ECHO, FaultyStack, faulty_stack

LANE: Final = stream_name(0)
GAPS: Final = "soma_router_ingest_gaps_total"
SESSIONS: Final = 8
WITHOUT_WAITING: Final = Mix(echo=4, slow=2, clerk=2, pause_s=0.25, ahead=100)


@dataclass
class Talk:
    """An adapter that keeps its messages: what nobody knows any more it can send again, with the same keys."""

    stack: FaultyStack
    tenant: str = "demo"
    sent: dict[bytes, tuple[str, str, str]] = field(default_factory=dict)
    """By message id: session, key and text of what was accepted."""
    answers: list[Delivery] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self.channel = f"stores-{uuid.uuid4().hex[:8]}"
        self._exit = AsyncExitStack()
        self._client = await self._exit.enter_async_context(
            ChannelClient(
                self.stack.gateways,
                token=self.stack.token(self.tenant),
                tenant=self.tenant,
                channel=self.channel,
                instance=f"{self.channel}-1",
                on_delivery=self.answers.append,
            )
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exit.aclose()

    async def say(self, each: int = 3, patience_s: float = 20.0) -> None:
        """Sends some messages in each session, in order, and waits for the receipts."""
        await asyncio.gather(*(self._say(f"s{number}", each, patience_s) for number in range(SESSIONS)))

    async def _say(self, session: str, each: int, patience_s: float) -> None:
        for _ in range(each):
            key = uuid.uuid4().hex
            receipt = await self._client.send(ECHO, session, f"say {key}", idempotency_key=key, patience_s=patience_s)
            self.sent[receipt.message_id] = (session, key, f"say {key}")

    @property
    def open(self) -> list[bytes]:
        """Accepted messages without an answer."""
        answered = {message_id for delivery in self.answers for message_id in delivery.message_ids}
        return [message_id for message_id in self.sent if message_id not in answered]

    async def all_answered(self, timeout_s: float = 20.0) -> None:
        """Wait for every answer, and hold it to the promises: one each, the right one."""
        await eventually(lambda: not self.open, timeout_s, "an answer to each accepted message")
        times = Counter(message_id for delivery in self.answers for message_id in delivery.message_ids)
        assert set(times) <= set(self.sent)
        assert set(times.values()) == {1}
        for delivery in self.answers:
            [message_id] = delivery.message_ids
            assert delivery.message.parts[0].text == self.sent[message_id][2]

    async def lost(self) -> list[bytes]:
        """What nobody answers any more."""
        seen, since = self.open, time.monotonic()
        while time.monotonic() < since + 2.0:
            await asyncio.sleep(0.1)
            if self.open != seen:
                seen, since = self.open, time.monotonic()
        return seen

    async def say_again(self, lost: list[bytes]) -> None:
        """Sends lost messages again, as an adapter does that keeps them."""
        for message_id in lost:
            session, key, text = self.sent[message_id]
            receipt = await self._client.send(ECHO, session, text, idempotency_key=key, patience_s=20)
            assert receipt.message_id == message_id


# ---- a lane


async def test_a_lane_is_deleted(stack: FaultyStack) -> None:
    """Idle, and then with messages that nobody has read."""
    async with Talk(stack) as talk, jetstream(stack) as js:
        await talk.say()
        await talk.all_answered()
        before = await gaps(stack)
        await js.delete_stream(LANE)
        await talk.say()
        await talk.all_answered()
        assert await gaps(stack) > before, "it is told"

        async with accepted_and_not_read(stack, talk):
            await js.delete_stream(LANE)
        await lost_and_said_again(stack, talk)
    assert not stack.deaths


async def test_a_lane_is_purged_beyond_the_cursor(stack: FaultyStack) -> None:
    """Idle, and then with messages that nobody has read."""
    async with Talk(stack) as talk, jetstream(stack) as js:
        await talk.say()
        await talk.all_answered()
        await js.purge_stream(LANE)
        await talk.say()
        await talk.all_answered()

        async with accepted_and_not_read(stack, talk):
            await js.purge_stream(LANE)
        await lost_and_said_again(stack, talk)
    assert not stack.deaths


async def test_the_bus_is_restored_from_an_older_copy(stack: FaultyStack, tmp_path: Path) -> None:
    """Everything since was taken in, so nothing is lost, and what is read again is known."""
    async with Talk(stack) as talk:
        await talk.say()
        await talk.all_answered()
        async with stopped(stack, "nats") as directory:
            shutil.copytree(directory / "data", tmp_path / "copy")
        await talk.say(each=6)
        await talk.all_answered()
        before = await gaps(stack)
        async with stopped(stack, "nats") as directory:
            put_back(tmp_path / "copy", directory / "data")
        await talk.say(each=2)
        await talk.all_answered()
        assert await gaps(stack) > before, "it is told"
    assert not stack.deaths


@asynccontextmanager
async def accepted_and_not_read(stack: FaultyStack, talk: Talk) -> AsyncIterator[None]:
    """No router runs, and messages are accepted."""
    stack.hold_down("router-0")
    await stack.kill9("router-0")
    await talk.say(each=2)
    yield
    stack.let_up("router-0")
    await stack.is_up("router-0")


async def lost_and_said_again(stack: FaultyStack, talk: Talk) -> None:
    """The router is there again: what was lost is told, and comes back with the same keys; the rest goes on."""
    await eventually(lambda: rises(stack, 0), 10, "it is told")
    lost = await talk.lost()
    assert len(lost) == SESSIONS * 2
    await talk.say_again(lost)
    await talk.say()
    await talk.all_answered()


# ---- the database


async def test_the_database_is_restored_from_a_copy_within_the_window(stack: FaultyStack, tmp_path: Path) -> None:
    """All accepted since the copy is still on the lanes: it is taken in and answered again, and adapters that had an
    answer drop its repetition.
    """
    async with Talk(stack) as talk:
        await talk.say()
        await talk.all_answered()
        await copied(stack, tmp_path / "copy")
        await talk.say(each=6)
        await talk.all_answered()
        before = await gaps(stack)
        async with stopped(stack, "postgres") as directory:
            await talk.say(each=2)
            put_back(tmp_path / "copy", directory / "data")
        await talk.all_answered()
        await talk.say(each=2)
        await talk.all_answered()
        assert await gaps(stack) == before, "no gap: the lane had everything"
    assert not stack.deaths


@pytest.mark.soak
async def test_the_database_is_restored_from_a_copy_older_than_the_window(tmp_path: Path) -> None:
    """What was purged since is gone, and that is told; all else goes on."""
    short = {"SOMA_LANE_PURGE_LAG_S": "1", "SOMA_PURGE_EVERY_S": "0.3"}
    async with faulty_stack(environment={"router": short}) as stack, Talk(stack) as talk, jetstream(stack) as js:
        await talk.say()
        await talk.all_answered()
        await copied(stack, tmp_path / "copy")
        await talk.say(each=6)
        await talk.all_answered()

        async def purged() -> bool:
            return (await js.stream_info(LANE)).state.messages == 1

        await eventually(purged, 10, "the lane is purged")
        before = await gaps(stack)
        async with stopped(stack, "postgres") as directory:
            put_back(tmp_path / "copy", directory / "data")
        await eventually(lambda: rises(stack, before), 15, "it is told")
        told = stack.logged("router-0", "router.ingest_gap")[-1]
        assert int(str(told["first"])) > int(str(told["cursor"])) + 1, "what lies between is gone"
        assert not stack.deaths


async def copied(stack: FaultyStack, copy: Path) -> None:
    """A backup of the database."""
    async with stopped(stack, "postgres") as directory:
        shutil.copytree(directory / "data", copy)


# ---- no room


async def test_the_disk_of_the_bus_is_full(stack: FaultyStack) -> None:
    """Nothing is acknowledged, senders are told; the server is started anew, as its supervisor does, and all that has
    a receipt is answered.
    """
    async with Talk(stack) as talk:
        await talk.say()
        with no_room(stack, "nats"):
            with pytest.raises(Unavailable) as refused:
                await talk.say(each=1, patience_s=0)
            assert refused.value.reason == ErrorReason.ERROR_REASON_BUS_UNAVAILABLE
            with pytest.raises(Unresponsive, match="write error"):
                await stack.parts["nats"].check()
        with pytest.raises(Unresponsive, match="write error"):
            await stack.parts["nats"].check()  # It needs a new start, room or not.
        await stack.kill9("nats")
        await stack.is_up("nats")
        await talk.say()
        await talk.all_answered()
    assert not stack.deaths


async def test_the_database_cannot_write_its_log(stack: FaultyStack) -> None:
    """It ends at once, and cannot start before there is room. Accepts go on; everything is answered then."""
    async with Load(stack, WITHOUT_WAITING) as load:
        await load.flows(each=1)
        stack.hold_down("postgres")
        stack.expect_death("postgres")
        with no_room(stack, "postgres"):
            async with asyncio.timeout(15):
                await stack.process("postgres").ended()
        accepted = load.story.counts()["accepted"]
        await eventually(lambda: load.story.counts()["accepted"] > accepted + 20, 10, "accepts go on")
        stack.let_up("postgres")
        await stack.is_up("postgres")
        await load.flows(each=2)
        await load.finish()
    assert not stack.deaths


@pytest.mark.soak
async def test_the_disk_of_the_database_is_full(stack: FaultyStack) -> None:
    """A real disk, so it needs root. Tables cannot grow: nothing is set aside for it, all waits on the lanes."""
    dead = "SELECT count(*) FROM router.dead_letters"
    with small_disk(stack.home.path / "disk") as disk:
        postgres = stack.home.postgres
        async with stopped(stack, "postgres"):
            shutil.copytree(postgres / "data", disk / "data", symlinks=True)
            (postgres / "data").rename(postgres / "on-the-large-disk")
            (postgres / "data").symlink_to(disk / "data")
        database = await stack.database()
        letters = await database.fetchval(dead)
        await database.close()
        async with Load(stack, WITHOUT_WAITING) as load:
            await load.flows(each=1)
            refusals = len(stack.logged("router-0", "router.store_lost"))
            filler = fill(disk)
            await eventually(
                lambda: len(stack.logged("router-0", "router.store_lost")) > refusals + 1, 20, "nothing is stored"
            )
            accepted = load.story.counts()["accepted"]
            await eventually(lambda: load.story.counts()["accepted"] > accepted + 20, 10, "accepts go on")
            filler.unlink()
            await load.flows(each=2, timeout_s=30)
            await load.finish()
        database = await stack.database()
        assert await database.fetchval(dead) == letters
        await database.close()
        async with stopped(stack, "postgres"):
            (postgres / "data").unlink()
            shutil.copytree(disk / "data", postgres / "data", symlinks=True)
    assert not stack.deaths


@contextmanager
def no_room(stack: FaultyStack, part: str) -> Iterator[None]:
    """For the processes of a part all disks are full: no file of theirs grows."""
    pids = [stack.process(part).pid, *(child.pid for child in descendants(stack.process(part).pid))]
    _limit(pids, 0)
    try:
        yield
    finally:
        _limit(pids, resource.RLIM_INFINITY)


def _limit(pids: list[int], size: int) -> None:
    for pid in pids:
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        except ProcessLookupError:
            continue


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of little size."""
    place.mkdir()
    size = 512 * 1024 * 1024
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=False)
    if mounted.returncode:
        pytest.skip("only root can make a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> Path:
    """Uses what is left of a disk up; returns what is to be removed."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        while shutil.disk_usage(disk).free:
            with suppress(OSError):
                file.write(bytes(64 * 1024))
    return filler


# ---- hands


@asynccontextmanager
async def stopped(stack: FaultyStack, part: str) -> AsyncIterator[Path]:
    """A store of which nothing runs any more: its directory."""
    stack.hold_down(part)
    stack.expect_death(part)
    await stack.parts[part].stop()
    yield {"nats": stack.home.nats, "postgres": stack.home.postgres}[part]
    stack.let_up(part)
    await eventually(lambda: stack.process(part).exit_code is None, 10, f"{part} is started")
    await stack.is_up(part)


def put_back(copy: Path, data: Path) -> None:
    """What is there gives way to an older copy."""
    shutil.rmtree(data)
    shutil.copytree(copy, data, symlinks=True)


@asynccontextmanager
async def jetstream(stack: FaultyStack) -> AsyncIterator[JetStreamContext]:
    """The hands of somebody with access to the bus."""
    nats = stack.parts["nats"]
    assert isinstance(nats, NatsPart)
    client = await connect_nats(nats.server.url, nats.server.token_file, "operator")
    try:
        yield client.jetstream(timeout=5)
    finally:
        await client.close()


async def gaps(stack: FaultyStack) -> float:
    """Gaps told by the router's present life."""
    return (await stack.metrics("router-0")).get(GAPS, 0.0)


async def rises(stack: FaultyStack, before: float) -> bool:
    """Whether another gap was told."""
    return await gaps(stack) > before
