"""The group committer with a writer that does as it is told: every item is told once what became of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from services.router.application.commit_group import GroupCommitter
from services.router.application.group import CommitItem, FenceLost, Group, GroupRejected, GroupResult, StoreLost
from services.router.domain.partition import Partition
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import NOTHING, a_partition, inbound, ingest


@dataclass(slots=True, eq=False)
class Item:
    """Writes its name as a dead letter and remembers what it was told."""

    partition: Partition
    name: str = ""
    told: list[str] = field(default_factory=list)

    def write(self, group: Group) -> None:
        group.move(self.partition).head += 1
        group.tenants.add("demo")
        group.add(group.dead, ("demo", self.name, self.partition.id, b"", 0, "", b""))

    def committed(self, result: GroupResult) -> None:
        self.told.append("committed")

    def abandoned(self) -> None:
        self.told.append("abandoned")


class Writer:
    """Answers each group by the script, then with success; remembers what was written."""

    def __init__(self) -> None:
        self.script: list[BaseException | Callable[[Group], None]] = []
        self.groups: list[list[str]] = []
        self.written: list[str] = []
        self.gate: asyncio.Event | None = None
        self.writing = 0

    async def commit(self, group: Group) -> GroupResult:
        self.writing += 1
        assert self.writing == 1, "groups are written one at a time"
        try:
            names = [row[1] for row in group.dead]
            self.groups.append(names)
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
            step = self.script.pop(0) if self.script else None
            if isinstance(step, BaseException):
                raise step
            if step is not None:
                step(group)
            self.written += names
            return NOTHING
        finally:
            self.writing -= 1


class World:
    def __init__(self) -> None:
        self.partitions = {number: a_partition(number) for number in range(3)}
        self.writer = Writer()
        self.fenced: list[frozenset[int]] = []
        self.composed: list[int] = []
        self.extra: list[CommitItem] = []
        self.store_lost = 0
        self.committer = GroupCommitter(self.writer, self.compose, self.on_fenced, self.on_store_lost)

    def compose(self, items: list[CommitItem]) -> None:
        self.composed.append(len(items))
        items += self.extra
        self.extra = []

    def on_fenced(self, numbers: frozenset[int]) -> None:
        self.fenced.append(numbers)
        for number in numbers:
            self.partitions[number].lost = True

    def on_store_lost(self) -> None:
        self.store_lost += 1
        for partition in self.partitions.values():
            partition.lost = True

    def put(self, *places: int) -> list[Item]:
        items = [Item(self.partitions[number], f"{number}.{n}") for n, number in enumerate(places)]
        for item in items:
            self.committer.put(item)
        return items

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.committer.run())
        try:
            yield
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


@pytest.fixture
def world() -> World:
    return World()


async def told(items: list[Item]) -> list[str]:
    """What each item was told, once all were told something; nobody may be told twice."""
    await eventually(lambda: all(item.told for item in items))
    await asyncio.sleep(0.01)
    assert all(len(item.told) == 1 for item in items), [item.told for item in items]
    return [item.told[0] for item in items]


async def test_what_is_there_goes_in_one_group_in_order(world: World) -> None:
    items = world.put(0, 1, 0, 2)
    async with world.running():
        assert await told(items) == ["committed"] * 4
    assert world.writer.groups == [["0.0", "1.1", "0.2", "2.3"]]
    assert [p.head for p in world.partitions.values()] == [2, 1, 1]


async def test_what_comes_while_a_group_is_written_goes_in_the_next(world: World) -> None:
    world.writer.gate = asyncio.Event()
    async with world.running():
        first = world.put(0)
        await eventually(lambda: world.writer.groups)
        later = world.put(1, 2)
        world.writer.gate.set()
        assert await told(first + later) == ["committed"] * 3
    assert [len(group) for group in world.writer.groups] == [1, 2]


async def test_a_lost_fence_gives_up_that_partition_and_tries_the_rest_again(world: World) -> None:
    world.writer.script = [FenceLost(frozenset({1}))]
    items = world.put(0, 1, 2, 1)
    async with world.running():
        assert await told(items) == ["committed", "abandoned", "committed", "abandoned"]
    assert world.writer.written == ["0.0", "2.2"]
    assert world.fenced == [frozenset({1})]
    assert [p.head for p in world.partitions.values()] == [1, 0, 1]


async def test_fences_lost_one_after_the_other(world: World) -> None:
    world.writer.script = [FenceLost(frozenset({0})), FenceLost(frozenset({2}))]
    items = world.put(0, 1, 2)
    async with world.running():
        assert await told(items) == ["abandoned", "committed", "abandoned"]


async def test_all_fences_lost(world: World) -> None:
    world.writer.script = [FenceLost(frozenset({0, 1}))]
    async with world.running():
        assert await told(world.put(0, 1)) == ["abandoned"] * 2
        assert await told(world.put(2)) == ["committed"], "the committer goes on"


async def test_a_lost_store_abandons_everything(world: World) -> None:
    """It is not known whether the group was written: nothing is tried again, the terms end."""
    world.writer.script = [StoreLost("gone")]
    world.writer.gate = asyncio.Event()
    async with world.running():
        items = world.put(0, 1)
        await eventually(lambda: world.writer.groups)
        items += world.put(2, 0)  # these wait
        world.writer.gate.set()
        assert await told(items) == ["abandoned"] * 4
    assert world.store_lost == 1
    assert world.writer.written == []
    assert [p.head for p in world.partitions.values()] == [0, 0, 0]


async def test_a_refused_item_does_not_stop_the_others(world: World) -> None:
    def refuse_the_bad_one(group: Group) -> None:
        if "1.1" in [row[1] for row in group.dead]:
            raise GroupRejected("something is wrong with 1.1")

    world.writer.script = [refuse_the_bad_one] * 20
    items = world.put(0, 1, 2, 0)
    async with world.running():
        assert await told(items) == ["committed", "abandoned", "committed", "committed"]
    assert sorted(world.writer.written) == ["0.0", "0.3", "2.2"]
    assert world.fenced == [frozenset({1})], "its term ends: memory and store may differ"


async def test_items_of_a_partition_lost_while_the_group_was_written_are_abandoned(world: World) -> None:
    """The group is in the store; acting on it is for the new owner, who has read it there."""
    world.writer.gate = asyncio.Event()
    async with world.running():
        items = world.put(0, 1)
        await eventually(lambda: world.writer.groups)
        world.partitions[1].lost = True
        world.writer.gate.set()
        assert await told(items) == ["committed", "abandoned"]
    assert world.writer.written == ["0.0", "1.1"]


async def test_an_item_for_a_lost_partition_is_abandoned_at_once(world: World) -> None:
    world.partitions[0].lost = True
    [item] = world.put(0)
    assert item.told == ["abandoned"]
    assert len(world.committer) == 0


async def test_an_item_whose_partition_is_lost_while_it_waits_is_not_written(world: World) -> None:
    items = world.put(0, 1)
    world.partitions[0].lost = True
    async with world.running():
        assert await told(items) == ["abandoned", "committed"]
    assert world.writer.written == ["1.1"]


async def test_what_compose_adds_is_in_the_same_group(world: World) -> None:
    extra = Item(world.partitions[2], "extra")
    world.extra = [extra]
    items = world.put(0)
    async with world.running():
        assert await told([*items, extra]) == ["committed"] * 2
    assert world.writer.groups == [["0.0", "extra"]]


async def test_a_nudge_composes_and_writes_nothing_if_there_is_nothing(world: World) -> None:
    async with world.running():
        for _ in range(3):
            world.committer.nudge()
        await eventually(lambda: world.composed)
        assert world.composed == [0]
        extra = Item(world.partitions[0], "extra")
        world.extra = [extra]
        world.committer.nudge()
        assert await told([extra]) == ["committed"]
    assert world.writer.groups == [["extra"]]


async def test_a_group_is_cut_before_its_answer_gets_too_long(world: World) -> None:
    """After an outage thousands of messages have gathered; each cut is composed for itself, so that turns start in the
    group of their message.
    """
    p = world.partitions[0]
    mails = [ingest(p, seq, *(inbound(f"{seq}-{n}") for n in range(1000))) for seq in range(1, 6)]
    mails.append(ingest(p, 6, *(inbound(f"6-{n}") for n in range(5000))))
    for mail in mails:
        world.committer.put(mail)
    last = world.put(0)
    async with world.running():
        assert await told(last) == ["committed"]
    assert world.composed == [2, 2, 1, 1, 1]
    assert p.mail_head == 10_000
    assert p.cursor.seq == 6


@pytest.mark.parametrize("count", [1, 64])
async def test_of_a_lane_message_only_what_the_database_refuses_is_set_aside(world: World, count: int) -> None:
    """Ending the term would have the partition read it again, for ever."""
    p = world.partitions[0]
    bad = inbound(key="k0", content=b"bad")
    told: list[tuple[int, bool]] = []
    mail = ingest(p, 7, bad, *(inbound(key=f"k{n}") for n in range(1, count)))
    mail.done = lambda item, result: told.append((len(item.entries), item.cursor is not None))
    after = Item(p, "after")

    def refuse(group: Group) -> None:
        stored = [row[13] for row in group.messages]
        if b"bad" in stored:
            raise GroupRejected("something nobody thought of")
        contents.extend(stored)
        payloads.extend(row[6] for row in group.dead)

    contents: list[object] = []
    payloads: list[object] = []
    world.writer.script = [refuse] * 200
    world.committer.put(mail)
    world.committer.put(after)
    async with world.running():
        await eventually(lambda: after.told == ["committed"])
    assert contents == [b"hi"] * (count - 1)
    assert payloads[0] == bad.SerializeToString()
    assert world.fenced == []
    assert p.cursor.seq == 7
    assert [with_cursor for _, with_cursor in told].count(True) == 1, "the lane message is done with once"


async def test_what_nobody_waits_for_rides_with_the_next_group() -> None:
    world = World()
    later, now = Item(world.partitions[0], "later"), Item(world.partitions[1], "now")
    async with world.running():
        world.committer.put_later(later)
        await asyncio.sleep(0.01)
        assert world.writer.groups == []
        world.committer.put(now)
        await eventually(lambda: later.told == ["committed"])
    assert world.writer.groups == [["now", "later"]]


async def test_what_nobody_waits_for_is_written_soon_all_the_same() -> None:
    world = World()
    later = Item(world.partitions[0], "later")
    async with world.running():
        world.committer.put_later(later)
        await eventually(lambda: later.told == ["committed"])
    assert world.writer.groups == [["later"]]


async def test_what_nobody_waits_for_is_abandoned_with_its_partition() -> None:
    world = World()
    later = Item(world.partitions[0], "later")
    async with world.running():
        world.committer.put_later(later)
        world.partitions[0].lost = True
        await eventually(lambda: later.told == ["abandoned"])
    assert world.writer.groups == []
