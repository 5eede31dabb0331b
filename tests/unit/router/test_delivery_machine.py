"""The delivery desk under everything at once: outcomes, acknowledgements, adapters that come and go, a memory that is
always full, pages that are slow or fail, partitions lost and taken again while they are read. Each outcome comes in
order and at least once until it is acknowledged, what is counted is what is held, and in the end nothing is left.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from soma.common.v1.turn_pb2 import Delivery
from soma.router.v1.outbound_pb2 import AckBatch, Presence, Return

from services.router.application import delivery_lines, read_backlogs
from services.router.application.group import CommitItem, StoreLost
from services.router.application.outcomes import AckItem, EndItem
from services.router.application.ports import StoredDelivery
from services.router.domain import delivery_room
from services.router.domain.partition import Partition
from tests.unit.router.builders import a_partition
from tests.unit.router.test_deliver_outcomes import World

TENANTS = ("a", "b", "c")
CHANNELS = ("x", "y")
PLACES = st.tuples(st.sampled_from(TENANTS), st.sampled_from(CHANNELS))
NUMBERS = st.integers(0, 1)
MAX_TRIES = 3


class Table(World):
    """A table that answers when it is told to, and acknowledgements that become durable later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.bound(24, 12_000, 8)
        self.reads: deque[tuple[asyncio.Future[bool], int]] = deque()
        """Pages that are being read, with their limit."""
        self.slow_to_answer = False
        """A page has what was in the table when it was asked for, not when it comes."""
        self.acks: list[AckItem] = []
        self.untold: dict[int, deque[EndItem]] = {0: deque(), 1: deque()}
        self.heads = {0: 0, 1: 0}
        self.order: dict[bytes, list[bytes]] = {}
        """Deliveries of each session, in order, as they became durable."""
        self.session_of: dict[bytes, bytes] = {}
        self.done: set[bytes] = set()
        """What was acknowledged or given up."""
        self.removed: set[bytes] = set()
        """What is not in the table any more."""
        self.broken: list[str] = []

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    def put_later(self, item: CommitItem) -> None:
        assert isinstance(item, AckItem)
        if item.dead is not None:
            self.done.add(item.dead.delivery_id)
            self.dead.append(item)
        if not item.partition.lost:
            self.acks.append(item)

    def store_acks(self) -> None:
        acks, self.acks = self.acks, []
        for item in acks:
            row = None if item.partition.lost else self.table.pop((item.partition.id, item.position), None)
            if row is not None:
                self.removed.add(Delivery.FromString(row[1]).delivery_id)

    def hand_over(self, tenant: str, gateway: str, stream: int, delivery: Delivery) -> None:
        super().hand_over(tenant, gateway, stream, delivery)
        id_ = delivery.delivery_id
        for before in self.order[self.session_of[id_]]:
            if before == id_:
                break
            if before not in self.done:
                self.broken.append(f"{id_.hex()} is sent before {before.hex()} is acknowledged")
        if id_ in self.removed:
            self.broken.append(f"{id_.hex()} is sent although it is not in the table any more")
        if delivery.attempt > MAX_TRIES:
            self.broken.append(f"{id_.hex()} is tried {delivery.attempt} times")

    async def deliveries(
        self, tenant: str, partition: int, channel: str, after: int, limit: int
    ) -> list[StoredDelivery]:
        reading: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        entry = (reading, limit)
        rows = await super().deliveries(tenant, partition, channel, after, limit)
        self.reads.append(entry)
        try:
            if not await reading:
                raise StoreLost
        finally:
            self.reads.remove(entry)
        if self.slow_to_answer:
            return rows
        return await super().deliveries(tenant, partition, channel, after, limit)

    def durable(self, tenant: str, channel: str, name: str, number: int, size: int) -> None:
        """An outcome is in the table, and the desk is not told."""
        partition = self.partitions[number]
        told, partition.head = partition.head, self.heads[number]
        session = self.session(name, number, channel=channel, tenant=tenant)
        item = self.store(session, size)
        self.heads[number], partition.head = partition.head, told
        id_ = item.turn.id
        self.order.setdefault(session.id, []).append(id_)
        self.session_of[id_] = session.id
        self.untold[number].append(item)

    def tell(self, number: int) -> None:
        """The desk is told of the next outcome of a partition that is durable."""
        if self.untold[number]:
            item = self.untold[number].popleft()
            self.partitions[number].head = item.position
            self.desk.add(item)

    def lose(self, number: int) -> None:
        partition = self.partitions[number]
        partition.lost = True
        self.state.partitions.pop(number, None)
        self.untold[number].clear()
        self.desk.drop(partition)

    def take(self, number: int) -> None:
        """The partition is taken again: what is durable is in the table."""
        partition: Partition = a_partition(number)
        partition.head = self.heads[number]
        self.partitions[number] = self.state.partitions[number] = partition
        rows = [session for (n, _), (session, _) in self.table.items() if n == number]
        self.desk.adopt(partition, list(dict.fromkeys((s.key.tenant, s.key.channel) for s in rows)))


class AnyOrder(RuleBasedStateMachine):
    """Everything that can happen to the desk."""

    @initialize()
    def begin(self) -> None:
        self.monkeypatch = pytest.MonkeyPatch()
        self.monkeypatch.setattr(read_backlogs, "_PAGE", 4)
        self.monkeypatch.setattr(read_backlogs, "_PAGE_BYTES", 4000)
        self.monkeypatch.setattr(delivery_room, "TENANT_SHARES", 4)
        self.monkeypatch.setattr(delivery_room, "CHANNEL_SHARES", 12)
        self.monkeypatch.setattr(delivery_lines.Backlog.__init__, "__defaults__", (500, 0, 1, False))
        self.loop = asyncio.new_event_loop()
        self.world = self.run(self.make())
        self.streams: dict[str, dict[int, tuple[str, str, str, int]]] = {"g0": {}, "g1": {}}
        """By gateway: stream -> (tenant, channel, instance, window)."""
        self.numbers = 0

    async def make(self) -> Table:
        return Table(self.monkeypatch)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def turn_loop(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    def act(self, what: Any, *args: Any) -> None:
        async def acting() -> None:
            what(*args)
            await self.turn_loop()

        self.run(acting())

    def announce(self, gateway: str, tenant: str) -> None:
        presence = Presence(gateway=gateway)
        for number, (of, channel, instance, window) in self.streams[gateway].items():
            if of == tenant:
                presence.streams.add(stream=number, channel=channel, instance=instance, window=window, live=True)
        self.act(self.world.desk.on_presence, tenant, presence)

    @rule(place=PLACES, name=st.sampled_from("st"), number=NUMBERS, size=st.sampled_from([0, 100, 700, 2500]),
          count=st.integers(1, 6), told=st.booleans())  # fmt: skip
    def outcomes(self, place: tuple[str, str], name: str, number: int, size: int, count: int, told: bool) -> None:
        if self.world.partitions[number].lost:
            return
        for _ in range(count):
            self.world.durable(*place, f"{name}{number}", number, size)
            if told:
                self.tell(number)

    @rule(number=NUMBERS)
    def tell(self, number: int) -> None:
        self.act(self.world.tell, number)

    @rule(place=PLACES, gateway=st.sampled_from(["g0", "g1"]), instance=st.sampled_from("ij"),
          window=st.sampled_from([0, 1, 3]))  # fmt: skip
    def comes(self, place: tuple[str, str], gateway: str, instance: str, window: int) -> None:
        self.numbers += 1
        for streams in self.streams.values():
            for number in [n for n, s in streams.items() if s[:3] == (*place, instance)]:
                del streams[number]
        self.streams[gateway][self.numbers] = (*place, instance, window)
        self.announce(gateway, place[0])

    @precondition(lambda self: any(self.streams.values()))
    @rule(data=st.data(), window=st.sampled_from([0, 1, 2, 5]), leaves=st.booleans())
    def changes(self, data: st.DataObject, window: int, leaves: bool) -> None:
        choices = [(g, n) for g, streams in self.streams.items() for n in streams]
        gateway, number = data.draw(st.sampled_from(choices))
        tenant, channel, instance, _ = self.streams[gateway].pop(number)
        if not leaves:
            self.streams[gateway][number] = (tenant, channel, instance, window)
        self.announce(gateway, tenant)

    @precondition(lambda self: self.world.sent)
    @rule(data=st.data(), count=st.integers(1, 5))
    def acks(self, data: st.DataObject, count: int) -> None:
        for id_ in data.draw(st.lists(st.sampled_from(self.world.ids[-12:]), min_size=1, max_size=count)):
            self.ack(id_)

    def ack(self, id_: bytes) -> None:
        pending = self.world.desk._by_id.get(id_)
        if pending is not None:
            self.world.done.add(id_)
            self.act(self.world.desk.on_acks, pending.key[0], AckBatch(acks=[id_]))

    @precondition(lambda self: self.world.sent)
    @rule(data=st.data(), delay_ms=st.sampled_from([0, 400, 30_000]), counts=st.booleans())
    def nacks(self, data: st.DataObject, delay_ms: int, counts: bool) -> None:
        id_ = data.draw(st.sampled_from(self.world.ids[-12:]))
        returned = Return(delivery_id=id_, delay_ms=delay_ms, counts=counts)
        pending = self.world.desk._by_id.get(id_)
        if pending is not None:
            self.act(self.world.desk.on_acks, pending.key[0], AckBatch(returns=[returned]))

    @rule(place=PLACES, data=st.data())
    def processed(self, place: tuple[str, str], data: st.DataObject) -> None:
        """An instance says what it has processed, in any order: it got it before."""
        got = [i for i in self.world.ids if i not in self.world.removed]
        ids = data.draw(st.lists(st.sampled_from(got), max_size=3)) if got else []
        self.world.done.update(ids)
        for gateway, streams in self.streams.items():
            presence = Presence(gateway=gateway)
            for number, (of, channel, instance, window) in streams.items():
                if of == place[0]:
                    presence.streams.add(stream=number, channel=channel, instance=instance, window=window,
                                         processed=ids)  # fmt: skip
            if presence.streams:
                self.act(self.world.desk.on_presence, place[0], presence)

    @precondition(lambda self: self.world.reads)
    @rule(works=st.sampled_from([True, True, False]), which=st.integers(0, 20), slow=st.booleans())
    def is_read(self, works: bool, which: int, slow: bool) -> None:
        self.world.slow_to_answer = slow
        self.answer(works, which)

    def answer(self, works: bool, which: int = 0) -> None:
        reading, _ = self.world.reads[which % len(self.world.reads)]
        self.act(reading.set_result, works)

    @rule()
    def acks_are_stored(self) -> None:
        self.world.store_acks()

    @rule(number=NUMBERS)
    def partition_is_lost(self, number: int) -> None:
        if not self.world.partitions[number].lost:
            self.act(self.world.lose, number)

    @rule(number=NUMBERS)
    def partition_is_taken(self, number: int) -> None:
        if self.world.partitions[number].lost:
            self.act(self.world.take, number)

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0, 31.0]), heard=st.booleans())
    def time_passes(self, seconds: float, heard: bool) -> None:
        if not heard:
            for streams in self.streams.values():
                streams.clear()
        self.act(self.world.sweep_after, seconds, *(self.streams if heard else ()))

    @invariant()
    def what_is_counted_is_what_is_held(self) -> None:
        world = self.world
        assert not world.broken, world.broken
        room, desk = world.room, world.desk
        reserved = sum(limit for _, limit in world.reads)
        assert room.items == len(desk._by_id) + reserved
        held = sum(p.size for p in desk._by_id.values())
        assert room.size >= held
        assert reserved or room.size == held
        assert room.items <= 24
        assert room.size <= 12_000 or room.items == 1
        for channel in desk._channels.values():
            share = channel.share
            lined = [p for line in channel.lines.values() for p in line.items]
            assert share.items >= len(lined)
            assert share.size >= sum(p.size for p in lined)
            assert all(line.items for line in channel.lines.values())
            assert all(desk._by_id[p.delivery.delivery_id] is p for p in lined)
            for session_id, line in channel.lines.items():
                first = line.items[0]
                assert [p.position for p in line.items] == sorted(p.position for p in line.items)
                assert all(p.stream is None for p in list(line.items)[1:])
                if first.stream is not None:
                    assert session_id in first.stream.in_hand
                assert first.not_before <= world.clock.now or session_id in desk._delayed
        lined_all = sum(len(line.items) for c in desk._channels.values() for line in c.lines.values())
        assert lined_all == len(desk._by_id)
        for streams in desk._streams.values():
            for stream in streams.values():
                lines = desk._lines(stream)
                assert all(lines[s].items[0].stream is stream for s in stream.in_hand)
        for tenant, share_ in room._tenants.items():
            of = [c.share for c in desk._channels.values() if c.key[0] == tenant]
            assert (share_.items, share_.size) == (sum(s.items for s in of), sum(s.size for s in of))
            assert share_.channels == len(of)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if not self.world.broken:
                self.drain()
        finally:
            for task in self.world.tasks:
                task.cancel()
            self.run(asyncio.sleep(0))
            self.loop.close()
            self.monkeypatch.undo()

    def drain(self) -> None:
        """Everybody is there and takes everything: in the end nothing is left."""
        world = self.world
        for number in (0, 1):
            self.partition_is_taken(number)
            while world.untold[number]:
                self.tell(number)
        for tenant in TENANTS:
            for channel in CHANNELS:
                self.comes((tenant, channel), "g0", "i", 5)
        world.desk._tried.clear()
        self.take_all()
        assert not world.table, "everything is delivered"
        assert set(world.session_of) == world.removed <= world.done
        for streams in self.streams.values():
            streams.clear()
        for gateway in ("g0", "g1"):
            for tenant in TENANTS:
                self.announce(gateway, tenant)
        while world.reads:
            self.answer(True)
        self.act(world.sweep_after, 1)
        self.act(world.sweep_after, 1)
        desk, room = world.desk, world.room
        assert (room.items, room.size, room._tenants) == (0, 0, {})
        assert (desk._channels, desk._by_id, desk._delayed, desk._served) == ({}, {}, {}, set())
        assert (desk._streams, desk._streams_at, desk._gateways, desk._backlogs._starved) == ({}, {}, {}, {})

    def take_all(self) -> None:
        """Adapters acknowledge what they are given until there is nothing more."""
        world = self.world
        world.slow_to_answer = False
        for _ in range(400):
            while world.reads:
                self.answer(True)
            for id_, pending in list(world.desk._by_id.items()):
                if pending.stream is not None:
                    self.ack(id_)
            world.store_acks()
            self.act(world.sweep_after, 0.5, "g0")
            self.what_is_counted_is_what_is_held()
            if not world.table and not world.desk._by_id and not world.reads:
                break


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
