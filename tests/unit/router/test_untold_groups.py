"""A group that is durable and whose items were not told: the next one is on its way and must know of it."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.router.application import commit_group
from services.router.application.commit_group import GroupCommitter
from services.router.application.group import Group, GroupResult
from services.router.domain.partition import Partition
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import NOTHING, a_partition, inbound, ingest
from tests.unit.router.engine import Engine, running_engine

CROWD = 40
"""More than has to wait for a group to be sent before the one before is told."""


class GatedWriter:
    """Each group is written when the test says so."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.fences: list[list[tuple[object, ...]]] = []
        self.may_end = asyncio.Semaphore(0)

    async def commit(self, group: Group) -> GroupResult:
        self.groups.append(group)
        self.fences.append([tuple(row) for row in group.fence()])
        await self.may_end.acquire()
        return NOTHING

    async def sees(self, count: int) -> None:
        await eventually(lambda: len(self.groups) == count, what=f"{count} groups, there are {len(self.groups)}")


class Told:
    """Says in which order items were told."""

    def __init__(self, partition: Partition, name: str, heard: list[str]) -> None:
        self.partition, self.name, self.heard = partition, name, heard

    def write(self, group: Group) -> None:
        group.move(self.partition)

    def committed(self, result: GroupResult) -> None:
        self.heard.append(self.name)

    def abandoned(self) -> None:
        self.heard.append(f"{self.name} abandoned")


@pytest.fixture
async def writer() -> GatedWriter:
    return GatedWriter()


@pytest.fixture
async def committer(writer: GatedWriter) -> AsyncIterator[GroupCommitter]:
    made = GroupCommitter(writer, lambda items: None, lambda lost: None, lambda: None)
    task = asyncio.create_task(made.run())
    yield made
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_next_group_is_sent_before_the_last_one_is_told(
    committer: GroupCommitter, writer: GatedWriter
) -> None:
    partition, heard = a_partition(), list[str]()
    committer.put(Told(partition, "first", heard))
    await writer.sees(1)
    for _ in range(CROWD):
        committer.put(Told(partition, "second", heard))
    writer.may_end.release()
    await eventually(lambda: heard == ["first"])
    assert len(writer.groups) == 2, "the second group was sent first"
    writer.may_end.release()
    await eventually(lambda: len(heard) == CROWD + 1)
    assert heard == ["first"] + ["second"] * CROWD


async def test_a_group_that_nothing_follows_is_told_at_once(committer: GroupCommitter, writer: GatedWriter) -> None:
    heard: list[str] = []
    committer.put(Told(a_partition(), "only", heard))
    await writer.sees(1)
    assert heard == []
    writer.may_end.release()
    await eventually(lambda: heard == ["only"])
    assert len(writer.groups) == 1


async def test_a_term_that_ends_before_its_items_are_told_abandons_them(
    committer: GroupCommitter, writer: GatedWriter
) -> None:
    lost, kept, heard = a_partition(0), a_partition(1), list[str]()
    committer.put(Told(lost, "lost", heard))
    committer.put(Told(kept, "kept", heard))
    await writer.sees(1)
    for _ in range(CROWD):
        committer.put(Told(kept, "next", heard))
    lost.lost = True
    writer.may_end.release()
    await eventually(lambda: len(heard) == 2)
    assert heard == ["lost abandoned", "kept"]


async def test_the_floor_stays_below_messages_that_were_not_told(
    committer: GroupCommitter, writer: GatedWriter
) -> None:
    """Were it above them, a new owner would not look for them."""
    partition = a_partition()
    mail = ingest(partition, 1, inbound(key="a"), inbound(key="b"))
    told: list[int] = []
    mail.done = lambda item, result: told.append(len(writer.groups))
    committer.put(mail)
    await writer.sees(1)
    for _ in range(CROWD):
        committer.put(Told(partition, "next", []))
    writer.may_end.release()
    await writer.sees(2)
    floor, mail_head = writer.fences[1][0][6], writer.fences[1][0][4]
    assert (mail_head, floor) == (2, 1)
    await eventually(lambda: told == [2])
    assert partition.floor == 3, "told, and none of them waits: this test keeps no mailbox"


async def test_what_is_untold_is_not_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message finds no room and waits; before it is told, another of its session comes, and there is room."""
    monkeypatch.setattr(commit_group, "_SENT_FIRST", 1)
    async with running_engine() as engine:
        await _make_known(engine)
        engine.brain.credit = 0
        engine.store.gate = asyncio.Event()
        groups = engine.store.groups
        engine.accept(inbound(key="first", content=b"first"))
        await eventually(lambda: len(engine.committer) == 0)
        engine.brain.credit = 5
        engine.accept(inbound(key="second", content=b"second"))
        engine.store.gate.set()
        (start,) = await engine.started(1)
        assert list(start.inputs) == [b"first"]
        assert engine.store.groups - groups >= 2
        engine.answer(start, "hello")
        assert [list(start.inputs) for start in await engine.started(2)] == [[b"first"], [b"second"]]


async def test_turns_that_start_and_are_not_told_take_up_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_group, "_SENT_FIRST", 1)
    async with running_engine() as engine:
        for name in ("a", "b"):
            await _make_known(engine, name)
        engine.brain.credit = 1
        engine.store.gate = asyncio.Event()
        engine.accept(inbound("a", key="first"))
        await eventually(lambda: len(engine.committer) == 0)
        engine.accept(inbound("b", key="second"))
        engine.store.gate.set()
        (start,) = await engine.started(1)
        await engine.quiet()
        assert len(engine.store.turns) == 3, "the second turn is not even stored: no brain has room for it"
        engine.brain.credit += 1
        engine.answer(start, "hello")
        await engine.started(2)


async def _make_known(engine: Engine, session: str = "s") -> None:
    """Has a session in memory, idle."""
    ended = len(engine.ended)
    engine.accept(inbound(session, key="before"))
    (start,) = await engine.started(1)
    engine.answer(start, "hello")
    await engine.outcomes(ended + 1)
    engine.brain.starts.clear()
