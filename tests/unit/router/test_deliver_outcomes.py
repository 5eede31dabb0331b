"""The delivery desk, between an outbox, a table and adapters that a test plays."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, cast

import pytest
from soma.common.v1.turn_pb2 import Delivery, LiveEvent
from soma.router.v1.outbound_pb2 import AckBatch, Presence, Return

from services.router.application import deliver_outcomes, read_backlogs
from services.router.application.deliver_outcomes import DeliveryDesk
from services.router.application.delivery_lines import Line
from services.router.application.group import CommitItem
from services.router.application.outcomes import AckItem, EndItem
from services.router.application.ports import StoredDelivery
from services.router.application.state import RouterState
from services.router.domain.adapters import AdapterStream as AdapterStreamState
from services.router.domain.adapters import choose
from services.router.domain.delivery_room import DeliveryRoom
from services.router.domain.partition import Partition
from services.router.domain.session import QueuedMessage, Session, SessionKey
from services.router.domain.turn import Outcome
from soma_common import ids
from soma_common.layout import LaneLayout
from tests.unit.router.builders import CHANNEL, TENANT, a_partition, a_session, a_turn

KEY = (TENANT, CHANNEL)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A desk, what it handed over and committed, and the table of deliveries behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(deliver_outcomes, "monotonic", self.clock)
        self.state = RouterState(LaneLayout(8, 1), cast(Any, None), 100, 100)
        self.partitions = [a_partition(0), a_partition(1)]
        for partition in self.partitions:
            self.state.partitions[partition.id] = partition
        self.sent: list[tuple[int, bytes, int]] = []
        """(stream, delivery id, attempt) in the order handed over."""
        self.table: dict[tuple[int, int], tuple[Session, bytes]] = {}
        self.reading = self.most_read = 0
        """How many deliveries the pages that are being read may have, now and at most."""
        self.dead: list[AckItem] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.turns = 0
        self.bound()

    # ---- ports

    losses = 0

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    async def settle(self) -> None:
        """Lets pages be read."""
        while self.tasks:
            await self.settle_once()

    async def settle_once(self) -> None:
        """Lets those pages be read that are being read."""
        tasks, self.tasks = self.tasks, []
        await asyncio.gather(*tasks)

    def hand_over(self, tenant: str, gateway: str, stream: int, delivery: Delivery) -> None:
        self.sent.append((stream, delivery.delivery_id, delivery.attempt))

    def show(self, tenant: str, gateway: str, stream: int, event: LiveEvent) -> None:
        raise AssertionError

    def put_later(self, item: CommitItem) -> None:
        assert isinstance(item, AckItem)
        self.table.pop((item.partition.id, item.position), None)
        if item.dead is not None:
            self.dead.append(item)

    async def deliveries(
        self, tenant: str, partition: int, channel: str, after: int, limit: int
    ) -> list[StoredDelivery]:
        self.reading += limit
        self.most_read = max(self.most_read, self.reading)
        rows = [
            StoredDelivery(position, session.id, payload)
            for (number, position), (session, payload) in sorted(self.table.items(), key=lambda row: row[0])
            if number == partition and position > after
            if (session.key.tenant, session.key.channel) == (tenant, channel)
        ]
        await asyncio.sleep(0)
        self.reading -= limit
        return rows[:limit]

    # ---- what happens

    def bound(self, items: int = 20_000, size: int = 64 << 20, channel_items: int = 4096) -> None:
        """Memory has these bounds; called before anything else."""
        self.room = DeliveryRoom(items, size, channel_items)
        self.desk = DeliveryDesk(
            self.state,
            cast(Any, self),
            cast(Any, self),
            self.spawn,
            ack_wait_s=30.0,
            max_tries=3,
            retry_s=1.0,
            room=self.room,
        )
        self.desk.committer = cast(Any, self)

    def session(self, name: str = "s", partition: int = 0, *, channel: str = CHANNEL, tenant: str = TENANT) -> Session:
        session = a_session(self.partitions[partition], name, tenant=tenant)
        session.key = SessionKey(tenant, "echo", channel, name)
        session.id = ids.session_id(tenant, "echo", channel, name)
        return session

    def store(self, session: Session, size: int = 0) -> EndItem:
        """An outcome of the session becomes durable."""
        self.turns += 1
        partition = session.partition
        partition.head += 1
        message = QueuedMessage(1, ids.content_hash(b"%d" % self.turns), True, 0, "", b"")
        turn = a_turn(session, message)
        answer = Delivery(delivery_id=turn.id, turn_id=turn.id)
        if size:
            answer.message.parts.add(text="x" * size)
        item = EndItem(partition, turn, Outcome.FINAL, [], answer, lambda _: None, position=partition.head)
        self.table[partition.id, partition.head] = session, answer.SerializeToString()
        return item

    def outcome(self, session: Session, size: int = 0) -> bytes:
        """An outcome is durable and the desk is told; returns its id."""
        item = self.store(session, size)
        self.desk.add(item)
        return item.turn.id

    def adapter(
        self,
        stream: int = 1,
        instance: str = "a",
        window: int = 10,
        gateway: str = "g",
        processed: Sequence[bytes] = (),
        losses: int = 0,
        channel: str = CHANNEL,
        tenant: str = TENANT,
    ) -> None:
        """A gateway announces one stream: all it has."""
        presence = Presence(gateway=gateway, losses=losses)
        presence.streams.add(
            stream=stream, channel=channel, instance=instance, window=window, live=True, processed=processed
        )
        self.desk.on_presence(tenant, presence)

    def gone(self, gateway: str = "g") -> None:
        self.desk.on_presence(TENANT, Presence(gateway=gateway))

    def ack(self, *deliveries: bytes) -> None:
        self.desk.on_acks(TENANT, AckBatch(acks=deliveries))

    def nack(self, delivery: bytes, delay_ms: int = 0, *, counts: bool = True) -> None:
        returned = Return(delivery_id=delivery, delay_ms=delay_ms, counts=counts, cause="because")
        self.desk.on_acks(TENANT, AckBatch(returns=[returned]))

    def sweep_after(self, seconds: float, *gateways: str) -> None:
        """Time passes; these gateways go on announcing themselves."""
        self.clock.now += seconds
        for gateway, tenant in list(self.desk._gateways):
            if gateway in gateways:
                self.desk._gateways[gateway, tenant] = self.clock.now
        self.desk.sweep()

    @property
    def ids(self) -> list[bytes]:
        return [delivery for _, delivery, _ in self.sent]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


# ---- order


async def test_an_answer_goes_to_the_adapter_of_its_channel(world: World) -> None:
    world.adapter(7)
    one = world.outcome(world.session())
    assert world.sent == [(7, one, 1)]
    world.ack(one)
    assert world.table == {}


async def test_the_next_goes_after_the_acknowledgement_of_the_former(world: World) -> None:
    world.adapter()
    session = world.session()
    one, two, three = (world.outcome(session) for _ in range(3))
    assert world.ids == [one]
    world.ack(one)
    world.ack(one)
    assert world.ids == [one, two]
    world.ack(two)
    assert world.ids == [one, two, three]


@pytest.mark.parametrize("whose", ["the gateway's", "the router's"])
async def test_what_a_lost_connection_may_have_swallowed_is_handed_over_again(world: World, whose: str) -> None:
    world.adapter()
    one, two = world.outcome(world.session("s1")), world.outcome(world.session("s2"))
    world.ack(one)
    world.adapter()
    assert world.ids == [one, two]
    world.losses = int(whose == "the router's")
    for _ in range(2):
        world.adapter(losses=int(whose == "the gateway's"))
    assert world.sent[2:] == [(1, two, 1)], "once, to the same stream, and not counted as a try"


async def test_sessions_do_not_wait_for_each_other(world: World) -> None:
    world.adapter()
    first = [world.outcome(world.session(f"s{n}")) for n in range(5)]
    assert world.ids == first


async def test_a_session_that_is_not_delivered_is_not_handed_over(world: World) -> None:
    world.adapter()
    item = world.store(world.session())
    item.turn.deliver = False
    world.desk.add(item)
    assert world.sent == []


async def test_acks_of_another_tenant_are_nothing(world: World) -> None:
    world.adapter()
    one = world.outcome(world.session())
    world.desk.on_acks("other", AckBatch(acks=[one], returns=[Return(delivery_id=one, counts=True)]))
    assert len(world.table) == 1
    world.sweep_after(5, "g")
    assert world.ids == [one]


async def test_unknown_acks_are_nothing(world: World) -> None:
    world.adapter()
    world.ack(b"?" * 16, b"")
    world.nack(b"?" * 16)


# ---- the window


async def test_no_more_than_the_window_is_in_hand(world: World) -> None:
    world.adapter(window=2)
    deliveries = [world.outcome(world.session(f"s{n}")) for n in range(5)]
    assert world.ids == deliveries[:2]
    world.ack(deliveries[1])
    assert world.ids == deliveries[:3]
    world.ack(deliveries[0], deliveries[2])
    assert world.ids == deliveries


async def test_a_larger_window_is_used_at_once(world: World) -> None:
    world.adapter(window=1)
    deliveries = [world.outcome(world.session(f"s{n}")) for n in range(3)]
    world.adapter(window=3)
    assert world.ids == deliveries


async def test_sessions_waiting_for_room_go_elsewhere_when_the_window_closes(world: World) -> None:
    """The stream they waited at takes nothing any more, and another one serves the channel."""
    world.adapter(1, "a", window=1, gateway="g1")
    deliveries = [world.outcome(world.session(f"s{n}")) for n in range(3)]
    world.adapter(2, "b", window=10, gateway="g2")
    world.adapter(1, "a", window=0, gateway="g1")
    assert set(world.ids) == set(deliveries)


async def test_a_lost_partition_gives_its_places_in_the_window_back(world: World) -> None:
    """The acks of what it had in hand will find nobody, and other partitions' sessions wait for the places."""
    world.adapter(window=1)
    world.outcome(world.session("lost", partition=0))
    waiting = world.outcome(world.session("waits", partition=1))
    world.desk.drop(world.partitions[0])
    assert world.ids[-1] == waiting


# ---- returned, late, dead


async def test_a_returned_delivery_comes_again_after_its_delay(world: World) -> None:
    world.adapter()
    one = world.outcome(world.session())
    world.nack(one, 5000)
    world.sweep_after(4.9, "g")
    assert world.sent == [(1, one, 1)]
    world.sweep_after(0.2, "g")
    assert world.sent == [(1, one, 1), (1, one, 2)]


async def test_without_a_delay_of_its_own_it_waits_the_usual_one(world: World) -> None:
    world.adapter()
    one = world.outcome(world.session())
    world.nack(one)
    world.sweep_after(0.5, "g")
    assert len(world.sent) == 1
    world.sweep_after(0.6, "g")
    assert len(world.sent) == 2


async def test_a_returned_delivery_keeps_its_place_before_the_next(world: World) -> None:
    world.adapter()
    session = world.session()
    one, two = world.outcome(session), world.outcome(session)
    world.nack(one, 1000)
    assert world.ids == [one]
    world.sweep_after(1.1, "g")
    world.ack(one)
    assert world.ids == [one, one, two]


async def test_a_returned_delivery_frees_its_place_in_the_window(world: World) -> None:
    world.adapter(window=1)
    one, other = world.outcome(world.session("a")), world.outcome(world.session("b"))
    world.nack(one, 60_000)
    assert world.ids == [one, other]


async def test_after_so_many_tries_it_is_a_dead_letter_and_the_next_goes(world: World) -> None:
    world.adapter()
    session = world.session()
    one, two = world.outcome(session), world.outcome(session)
    for _ in range(3):
        world.nack(one)
        world.sweep_after(1.1, "g")
    assert [(item.dead.delivery_id, item.cause) for item in world.dead if item.dead] == [(one, "because")]
    assert world.ids == [one] * 3 + [two]


async def test_a_return_that_is_nobodys_fault_does_not_count(world: World) -> None:
    """The stream was full or gone, says the gateway."""
    world.adapter()
    one = world.outcome(world.session())
    for _ in range(10):
        world.nack(one, counts=False)
        world.sweep_after(1.1, "g")
    assert world.dead == []
    assert world.sent == [(1, one, 1)] * 11


async def test_what_is_not_acknowledged_in_time_is_sent_again_and_dies_in_the_end(world: World) -> None:
    world.adapter()
    one = world.outcome(world.session())
    for attempt in (2, 3):
        world.sweep_after(30.1, "g")
        world.sweep_after(0.5, "g")
        assert world.sent[-1] == (1, one, attempt)
    world.sweep_after(30.1, "g")
    assert len(world.dead) == 1


async def test_a_late_ack_still_counts(world: World) -> None:
    world.adapter()
    session = world.session()
    one, two = world.outcome(session), world.outcome(session)
    world.sweep_after(30.1, "g")
    world.ack(one)
    assert world.ids == [one, two]


# ---- adapters come and go


async def test_what_a_stream_had_in_hand_goes_to_another_without_counting(world: World) -> None:
    world.adapter(1, "a", gateway="g1")
    one = world.outcome(world.session())
    world.adapter(2, "b", gateway="g2")
    world.gone("g1")
    assert world.sent == [(1, one, 1)], "its instance may have processed it and be about to come back"
    world.sweep_after(1.1, "g2")
    assert world.sent == [(1, one, 1), (2, one, 1)]


async def test_what_a_stream_had_in_hand_waits_for_its_instance(world: World) -> None:
    """Another instance that comes first does not get it: it would be shown twice."""
    world.adapter(1, "a", gateway="g1")
    one = world.outcome(world.session())
    world.adapter(2, "b", gateway="g2")
    world.gone("g1")
    world.adapter(3, "c", gateway="g3")
    assert world.sent == [(1, one, 1)]
    world.adapter(4, "a", gateway="g4")
    assert world.sent == [(1, one, 1), (4, one, 1)]


async def test_answers_wait_for_an_adapter(world: World) -> None:
    session = world.session()
    deliveries = [world.outcome(session) for _ in range(3)]
    assert world.desk._by_id == {}, "without an adapter nothing is held in memory"
    world.adapter()
    await world.settle()
    for one in deliveries:
        world.ack(one)
    assert world.ids == deliveries
    assert world.table == {}


async def test_an_adapter_that_leaves_and_comes_back_gets_what_it_did_not_acknowledge(world: World) -> None:
    world.adapter(1)
    session = world.session()
    one, two = world.outcome(session), world.outcome(session)
    world.gone()
    world.adapter(2)
    assert world.sent == [(1, one, 1), (2, one, 1)]
    world.ack(one)
    assert world.ids[-1] == two


async def test_a_silent_gateway_has_no_adapters(world: World) -> None:
    world.adapter(1, "a", gateway="g1")
    one = world.outcome(world.session())
    world.adapter(2, "b", gateway="g2")
    world.sweep_after(3.1, "g2")
    assert world.sent == [(1, one, 1)], "the instance is given time to find another gateway"
    world.sweep_after(3.1, "g2")
    assert world.sent[-1] == (2, one, 1)


async def test_a_newer_stream_of_an_instance_takes_the_place_of_its_older_one(world: World) -> None:
    """It reconnected at another gateway before the first one noticed."""
    world.adapter(1, "a", gateway="g1")
    one = world.outcome(world.session())
    world.adapter(2, "a", gateway="g2")
    assert world.sent == [(1, one, 1), (2, one, 1)]
    world.adapter(1, "a", gateway="g1")  # still announced
    two = world.outcome(world.session("t"))
    assert world.sent[-1] == (2, two, 1)


async def test_one_gateway_speaks_only_for_its_own_streams(world: World) -> None:
    world.adapter(1, "a", gateway="g1")
    world.adapter(2, "b", gateway="g2")
    world.gone("g2")
    one = world.outcome(world.session())
    assert world.sent == [(1, one, 1)]


# ---- what was processed already


async def test_what_an_adapter_says_it_has_processed_is_not_sent_again(world: World) -> None:
    """The ack was lost with the gateway or the router; the adapter names it when it comes back."""
    world.adapter(1)
    session = world.session()
    one, two = world.outcome(session), world.outcome(session)
    world.gone()
    world.adapter(2, processed=[one])
    assert world.ids == [one, two] or world.ids == [one, one, two]
    assert [position for _, position in world.table] == [2]


async def test_processed_deliveries_that_are_still_in_the_table_are_acknowledged_from_there(world: World) -> None:
    session = world.session()
    one, two = world.outcome(session), world.outcome(session)
    world.adapter(processed=[one])
    await world.settle()
    assert world.ids == [two]
    assert [position for _, position in world.table] == [2]


async def test_what_another_tenants_adapter_says_it_has_processed_changes_nothing(world: World) -> None:
    """Ids are derived from names and keys that a stranger may guess, before the delivery is even made."""
    session = world.session()
    message = QueuedMessage(1, ids.content_hash(b"1"), True, 0, "", b"")
    guessed = a_turn(session, message).id
    presence = Presence(gateway="g")
    presence.streams.add(stream=9, channel=CHANNEL, instance="x", window=10, processed=[guessed])
    world.desk.on_presence("other", presence)
    world.adapter(1)
    assert world.outcome(session) == guessed
    world.desk.on_presence("other", presence)
    world.desk.on_acks("other", AckBatch(acks=[guessed], returns=[Return(delivery_id=guessed, counts=True)]))
    assert world.ids == [guessed]
    assert world.table, "it waits for its own adapter's ack"


async def test_processed_deliveries_may_be_named_in_any_order(world: World) -> None:
    """A new owner has the session's deliveries in line; the adapter had processed two, and names the second first."""
    world.adapter(1)
    session = world.session()
    one, two, three = (world.outcome(session) for _ in range(3))
    world.adapter(1, processed=[two])
    world.adapter(1, processed=[one])
    assert world.ids == [one, three]
    world.ack(three)
    assert world.table == {}
    four = world.outcome(session)
    assert world.ids == [one, three, four]


async def test_what_is_remembered_of_processed_deliveries_is_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver_outcomes, "_RECENT_PROCESSED", 10)
    world.adapter(processed=[ids.content_hash(b"%d" % n) for n in range(50)])
    assert len(world.desk._processed) == 10


# ---- the backlog


async def test_a_backlog_larger_than_memory_is_delivered_in_order(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_backlogs, "_PAGE", 4)
    world.bound(10)
    session, others = world.session(), [world.session(f"o{n}") for n in range(3)]
    expected = [world.outcome(session) for _ in range(25)]
    for other in others:
        world.outcome(other)
    world.adapter()
    for _ in range(200):
        await world.settle()
        assert len(world.desk._by_id) <= 10
        if not world.table:
            break
        world.ack(*{delivery for _, delivery, _ in world.sent})
        world.sweep_after(0.5, "g")
    assert world.table == {}
    assert [delivery for delivery in world.ids if delivery in expected] == expected


async def test_memory_is_bounded_while_an_adapter_acknowledges_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_backlogs, "_PAGE", 4)
    world.bound(20)
    world.adapter(window=3)
    for n in range(200):
        world.outcome(world.session(f"s{n}"))
        await world.settle()
    assert len(world.desk._by_id) <= 20
    assert len(world.sent) == 3


async def test_a_channel_whose_adapter_acknowledges_nothing_costs_no_other_channel_its_memory(world: World) -> None:
    world.bound(6400, channel_items=400)
    for number, channel in enumerate((CHANNEL, "c2", "c3", "c4", "c5"), 1):
        world.adapter(number, gateway=f"g{number}", window=3, channel=channel)
        for n in range(500):
            world.outcome(world.session(f"s{n}", channel=channel))
        assert len(world.desk._by_id) == 400 * min(number, 4), "a bound of its own, and one of its tenant"
        if number == 4:
            assert world.room.items == 6400 // 4
            break
    world.adapter(9, gateway="g9", channel="good")
    good = world.session("good", channel="good")
    for _ in range(20):
        world.ack(world.outcome(good))
    assert [stream for stream, _, _ in world.sent].count(9) == 20, "memory that others fill is no bound for it"
    world.desk.drop(world.partitions[0])
    assert (world.room.items, world.room.size, world.desk._by_id) == (0, 0, {})


async def test_channels_without_end_whose_adapters_acknowledge_nothing_keep_within_the_bounds(world: World) -> None:
    """Of one tenant they take half of the memory, and cost no other tenant its deliveries."""
    world.bound(2048)
    for number in range(1, 300):
        world.adapter(number, gateway=f"g{number}", window=1, channel=f"c{number}")
        for n in range(20):
            world.outcome(world.session(f"s{n}", channel=f"c{number}"))
    assert world.room.items == len(world.desk._by_id) <= 1024
    world.adapter(900, gateway="other", tenant="other")
    session = world.session(tenant="other")
    for _ in range(20):
        one = world.outcome(session)
        assert world.sent[-1] == (900, one, 1)
        world.desk.on_acks("other", AckBatch(acks=[one]))


async def test_what_large_outcomes_take_of_memory_is_bounded(world: World) -> None:
    """A thousand of 64 KiB that nobody acknowledges: what does not fit waits in the table."""
    world.bound(size=16 << 20)
    world.adapter(window=3)
    for n in range(1000):
        world.outcome(world.session(f"s{n}"), 64 << 10)
        await world.settle()
    held = sum(pending.delivery.ByteSize() for pending in world.desk._by_id.values())
    assert 3 << 20 < held <= 4 << 20, "a quarter"
    assert held == pytest.approx(world.room.size, abs=len(world.desk._by_id) * 16), "attempts are not counted"
    for _ in range(1000):
        await world.settle()
        if not world.table:
            break
        world.ack(*world.ids[-3:])
    assert world.table == {}
    assert sorted(set(world.ids)) == sorted(world.ids), "each once"
    assert (world.room.items, world.room.size) == (0, 0)


async def test_outcomes_larger_than_any_share_are_delivered_one_by_one(world: World) -> None:
    world.bound(size=1 << 20)
    session = world.session()
    expected = [world.outcome(session, 300 << 10) for _ in range(5)]
    world.adapter()
    for one in expected:
        await world.settle()
        assert world.ids[-1] == one
        assert len(world.desk._by_id) == 1
        world.ack(one)
    await world.settle()
    assert world.table == {}


async def test_pages_that_are_being_read_count_for_memory(world: World) -> None:
    """Two partitions with twenty channels each are taken over: they are not all read at once."""
    world.bound(size=16 << 20)
    channels = [f"c{n}" for n in range(20)]
    presence = Presence(gateway="g")
    for number, channel in enumerate(channels, 1):
        presence.streams.add(stream=number, channel=channel, instance="i", window=99)
    world.desk.on_presence(TENANT, presence)
    for channel in channels:
        for n in range(20):
            world.store(world.session(f"s{n}", n % 2, channel=channel), 250 << 10)
    for partition in world.partitions:
        world.desk.adopt(partition, [(TENANT, channel) for channel in channels])
    for _ in range(2000):
        assert world.room.size <= 8 << 20, "half of the memory is the most for a tenant"
        await world.settle_once()
        world.ack(*{delivery for _, delivery, _ in world.sent})
        if not world.table:
            break
    assert world.table == {}, "and nobody starves, though nothing but room that comes again has them read"
    assert 8 <= world.most_read <= 32
    await world.settle()
    assert (world.room.items, world.room.size) == (0, 0)


async def test_a_page_that_turns_out_too_large_is_taken_as_far_as_it_fits(world: World) -> None:
    """The first outcomes of the backlog were small, so many were read at once."""
    world.bound(size=4 << 20)
    session = world.session()
    expected = [world.store(session).turn.id for _ in range(40)]
    expected += [world.store(session, 200 << 10).turn.id for _ in range(20)]
    world.adapter()
    world.desk.adopt(world.partitions[0], [KEY])
    for one in expected:
        await world.settle()
        assert world.room.size <= 1 << 20
        assert world.ids[-1] == one
        world.ack(one)
    await world.settle()
    assert world.ids == expected
    assert world.table == {}
    assert (world.room.items, world.room.size) == (0, 0)


async def test_a_channel_that_found_no_room_is_looked_at_when_another_gives_some(world: World) -> None:
    world.bound(size=1 << 20)
    world.adapter(1, channel="c1", gateway="g1")
    world.adapter(2, channel="c2", gateway="g2")
    first = [world.outcome(world.session(f"s{n}", channel="c1"), 120 << 10) for n in range(2)]
    full = world.outcome(world.session("t", channel="c2"), 380 << 10)
    assert world.ids == first, "a quarter of the memory is taken, and with this it would be more than a half"
    world.ack(first[0])
    await world.settle()
    assert world.ids == [*first, full]


async def test_channels_of_which_there_is_nothing_are_forgotten(world: World) -> None:
    world.adapter()
    world.ack(world.outcome(world.session()))
    world.gone()
    world.sweep_after(1)
    assert world.desk._channels == {}
    assert world.room._tenants == {}
    assert (world.desk._streams, world.desk._streams_at) == ({}, {})


class Watched(dict[bytes, Line]):
    """Lines that must not be looked at."""

    looks = 0

    def __getitem__(self, key: bytes) -> Line:
        self.looks += 1
        return super().__getitem__(key)

    def get(self, key: bytes, default: Any = None) -> Any:
        self.looks += 1
        return super().get(key, default)

    def values(self) -> Any:
        self.looks += 1
        return super().values()

    def items(self) -> Any:
        self.looks += 1
        return super().items()


async def test_streams_that_come_move_and_go_cost_no_look_at_lines_of_others(world: World) -> None:
    """Neither of other channels nor, where they move or go, of those that other streams of the channel have."""
    world.adapter(1, gateway="g1", window=1, channel="stalled")
    for n in range(50):
        world.outcome(world.session(f"s{n}", channel="stalled"))
    stalled = world.desk._channels[TENANT, "stalled"]
    stalled.lines = watched = Watched(stalled.lines)
    for window in (1, 0, 1, 2):
        world.adapter(2, "b", gateway="g2", window=window)
        world.outcome(world.session(f"t{window}"))
    world.adapter(3, "b", gateway="g3", window=1)
    world.adapter(3, "b", gateway="g3", window=1, losses=1)
    world.gone("g3")
    world.adapter(4, "c", gateway="g4")
    world.sweep_after(1.1, "g1", "g2", "g4")
    assert watched.looks == 1, "the sweep's one for the delivery in hand there"
    assert {stream for stream, _, _ in world.sent} == {1, 2, 3, 4}


async def test_a_stream_that_leaves_has_only_its_own_sessions_looked_at(world: World) -> None:
    world.adapter(1, "a", gateway="g1", window=60)
    for n in range(60):
        world.outcome(world.session(f"s{n}"))
    world.adapter(2, "b", gateway="g2", window=0)
    channel = world.desk._channels[KEY]
    channel.lines = watched = Watched(channel.lines)
    world.gone("g2")
    assert watched.looks == 0
    world.ack(*world.ids[:57])
    watched.looks = 0
    world.gone("g1")
    assert watched.looks == 3, "those that it had in hand"


async def test_streams_that_go_together_are_given_nothing_of_each_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway dies with all its streams: what waits is not passed on from one to the next."""
    presence = Presence(gateway="g")
    for number in range(1, 31):
        presence.streams.add(stream=number, channel=CHANNEL, instance=f"i{number}", window=1)
    world.desk.on_presence(TENANT, presence)
    for n in range(300):
        world.outcome(world.session(f"s{n}"))
    choices = []

    def counted(session_id: bytes, streams: Any) -> AdapterStreamState | None:
        choices.append(session_id)
        return choose(session_id, streams)

    monkeypatch.setattr(deliver_outcomes, "choose", counted)
    world.gone()
    assert len(world.sent) == 30
    assert choices == []
    world.adapter(40, "new", gateway="g2", window=300)
    assert len(world.sent) == 300, "30 wait for the instances that had them"
    assert len(choices) == 270
    world.sweep_after(1.1, "g2")
    assert len(world.sent) == 330


async def test_outcomes_that_come_while_the_backlog_is_read_keep_their_order(world: World) -> None:
    session = world.session()
    expected = [world.outcome(session) for _ in range(3)]
    world.adapter()  # reading begins
    expected += [world.outcome(session) for _ in range(3)]
    await world.settle()
    expected.append(world.outcome(session))
    for one in expected:
        world.ack(one)
        await world.settle()
    assert world.ids == expected
    assert world.table == {}


async def test_an_outcome_that_is_read_before_the_desk_is_told_of_it_is_delivered_once(world: World) -> None:
    """It is durable before its group's answer comes back, so a page may bring it first."""
    session = world.session()
    one = world.outcome(session)
    item = world.store(session)
    world.adapter()
    await world.settle()
    world.desk.add(item)
    world.ack(one)
    world.ack(item.turn.id)
    three = world.outcome(session)
    assert world.ids == [one, item.turn.id, three]


async def test_a_partition_taken_over_delivers_what_is_in_the_table(world: World) -> None:
    session = world.session()
    items = [world.store(session) for _ in range(3)]
    world.adapter()
    world.desk.adopt(world.partitions[0], [KEY])
    await world.settle()
    for item in items:
        world.ack(item.turn.id)
    assert world.ids == [item.turn.id for item in items]


async def test_a_partition_lost_while_its_page_is_read_delivers_nothing(world: World) -> None:
    world.store(world.session())
    world.adapter()
    world.desk.adopt(world.partitions[0], [KEY])
    lost = world.partitions[0]
    lost.lost = True
    world.desk.drop(lost)
    await world.settle()
    assert world.sent == []


async def test_a_lost_partition_leaves_nothing_behind(world: World) -> None:
    world.adapter(window=1)
    for n in range(5):
        world.outcome(world.session(f"s{n}"))
    lost: Partition = world.partitions[0]
    lost.lost = True
    del world.state.partitions[0]
    world.desk.drop(lost)
    world.ack(*world.ids)
    world.sweep_after(40, "g")
    assert world.desk._by_id == {}
    assert [channel.lines for channel in world.desk._channels.values()] == [{}]
    assert len(world.sent) == 1
    for streams in world.desk._streams.values():
        assert [stream.in_hand for stream in streams.values()] == [{}]


async def test_a_partition_lost_and_taken_again_begins_from_the_table(world: World) -> None:
    world.adapter()
    session = world.session()
    one = world.outcome(session)
    world.desk.drop(world.partitions[0])
    world.desk.adopt(world.partitions[0], [KEY])
    await world.settle()
    assert world.ids == [one, one]
    world.ack(one)
    assert world.table == {}
