"""The lease keeper against a database whose clock and delays a test sets."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, Self, cast
from uuid import UUID, uuid4

import pytest

from services.router.application import own_partitions
from services.router.application.group import FenceLost, StoreLost
from services.router.application.own_partitions import GIVE_UP_EVERY_S, LEASE_S, SETTLED_S, OwnPartitions
from services.router.application.ports import AcquiredRow, LeaseRow, PendingRow
from services.router.application.state import RouterState
from services.router.domain.partition import Partition
from services.router.domain.session import QueuedMessage, Session, Turn
from services.router.domain.turn import TurnStatus
from soma_common import ids
from soma_common.layout import LaneLayout
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import AGENT, CHANNEL, TENANT

ME = "router-0"
PAGE = 100
ROUNDS = 100
"""Of the event loop in which eight partitions are taken."""


class Lease:
    def __init__(self) -> None:
        self.owner: str | None = None
        self.term: UUID | None = None
        self.expires_at = float("-inf")


class World:
    """Everything around the lease keeper; time passes only where a test says so."""

    def __init__(self, partitions: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(own_partitions, "monotonic", lambda: self.now)
        monkeypatch.setattr(own_partitions, "_FIRST_TAKES_S", 0.1)
        self.rows = [Lease() for _ in range(partitions)]
        self.routers = 1
        self.down = False
        self.beat_takes_s = 0.0
        self.acquire_takes_s: Callable[[int], float] = lambda _: 0.0
        self.acquire_fails: set[int] = set()
        self.load_takes_s: Callable[[int], float] = lambda _: 0.0
        self.load_fails: BaseException | None = None
        self.loads: list[int] = []
        """Partitions whose load has begun; again for each time."""
        self.pending: dict[int, list[PendingRow]] = {}
        self.strikes: dict[int, bool] = {}
        self.asked_strikes = 0
        self.channels_fail = 0
        """How often the next questions for channels lose the store."""
        self.events: list[str] = []
        self.state = RouterState(LaneLayout(partitions, 1), cast(Any, None), 100, 100)
        self.keeper = OwnPartitions(
            self.state, cast(Any, self), cast(Any, self), cast(Any, self), cast(Any, self), ME
        )  # fmt: skip
        self.always_in_time = True

    # ---- the database

    def check(self) -> None:
        if self.down:
            raise StoreLost("down")

    async def beat(self, terms: Sequence[UUID]) -> frozenset[int]:
        self.now += self.beat_takes_s
        self.check()
        held = {n for n, row in enumerate(self.rows) if row.owner == ME and row.term in terms}
        for number in held:
            self.rows[number].expires_at = self.now + LEASE_S
        return frozenset(held)

    async def leases(self) -> tuple[list[LeaseRow], frozenset[str]]:
        self.check()
        rows = [
            LeaseRow(n, row.owner, row.term, row.expires_at < self.now, row.expires_at)
            for n, row in enumerate(self.rows)
        ]
        return rows, frozenset(f"router-{number}" for number in range(self.routers))

    async def acquire(self, partition: int, term: UUID, seen: UUID | None) -> AcquiredRow | None:
        self.check()
        await self.lasts(self.acquire_takes_s(partition))
        if partition in self.acquire_fails:
            return None
        row = self.rows[partition]
        former = row.owner
        row.owner, row.term, row.expires_at = ME, term, self.now + LEASE_S
        return AcquiredRow(1, 0, 0, 1, "", 0, "", former)

    async def load(self, partition: int, term: UUID, strike: bool, found: Callable[[list[PendingRow]], None]) -> None:
        self.loads.append(partition)
        if self.load_fails is not None:
            raise self.load_fails
        await self.lasts(self.load_takes_s(partition))
        rows = self.pending.get(partition, [])
        for first in range(0, len(rows), PAGE):
            found(rows[first : first + PAGE])
            await asyncio.sleep(0)
        self.check()
        self.strikes[partition] = strike
        self.asked_strikes += strike

    async def undelivered_channels(self, partition: int) -> list[tuple[str, str]]:
        if self.channels_fail:
            self.channels_fail -= 1
            raise StoreLost("the connection broke")
        return []

    async def release(self, terms: Sequence[UUID]) -> None:
        for row in self.rows:
            if row.term in terms:
                row.owner, row.expires_at = None, float("-inf")

    async def leave(self, terms: Sequence[UUID]) -> None:
        await self.release(terms)

    # ---- lanes, runner, desk

    def attach(self, partition: Partition) -> None:
        self.events.append(f"attach {partition.id}")

    def detach(self, partition: Partition) -> None:
        self.events.append(f"detach {partition.id}")

    def resume(self, turn: Turn) -> None:
        self.events.append(f"resume {turn.session.key.session}")
        self.state.running[turn.id] = turn
        self.state.scheduler.started(turn.session.key)

    @property
    def arrivals(self) -> Self:
        return self

    @property
    def controls(self) -> Self:
        return self

    def restore(self, session: Session, message: QueuedMessage, came_later: bool) -> None:
        self.state.enqueue(session, message)

    def meet(self, session: Session) -> None:
        pass

    def ready(self, session: Session) -> None:
        if session.turn is None and session.queue:
            self.state.scheduler.add(session)

    def apply(self, session: Session, kind: int, position: int, target: bytes | None, *, came_later: bool) -> None:
        self.events.append(f"cancel {session.key.session} {position}")

    def assign(self) -> None:
        pass

    def end_terms(self, turns: Sequence[Turn]) -> None:
        pass

    def adopt(self, partition: Partition, channels: list[tuple[str, str]]) -> None:
        self.events.append(f"adopt {partition.id}")

    def drop(self, partition: Partition) -> None:
        self.events.append(f"drop {partition.id}")

    # ---- what happens

    async def lasts(self, seconds: float) -> None:
        """Something takes so long; meanwhile others do what they do."""
        until = self.now + seconds
        while self.now < until:
            await asyncio.sleep(0)

    async def settles(self) -> None:
        """What is to be done at once is done."""
        for _ in range(ROUNDS):
            await asyncio.sleep(0)

    def pass_(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        if self.state.partitions and not self.keeper.in_time:
            self.always_in_time = False

    async def rounds(self, count: int = 1, each_s: float = 0.25) -> None:
        """The keeper's loop goes round."""
        for _ in range(count):
            try:
                await self.keeper._beat_if_due()
                await self.keeper._balance()
            except StoreLost:
                pass
            await self.settles()
            self.pass_(each_s)

    async def goes_on(self, for_s: float) -> None:
        """Time passes for a keeper that runs."""
        until = self.now + for_s
        while self.now < until:
            self.keeper.lease_freed()
            await self.settles()
            self.pass_(0.25)

    def held_by(self, router: str, *numbers: int, for_s: float = LEASE_S) -> None:
        """Another router takes or renews."""
        for number in numbers:
            row = self.rows[number]
            if row.owner != router:
                row.owner, row.term = router, uuid4()
            row.expires_at = self.now + for_s

    @property
    def owned(self) -> set[int]:
        return set(self.state.partitions)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(8, monkeypatch)


async def test_alone_it_takes_everything(world: World) -> None:
    assert not world.keeper.in_time
    await world.rounds()
    assert world.owned == set(range(8))
    assert world.keeper.in_time


async def test_it_takes_its_share_and_leaves_the_rest(world: World) -> None:
    world.routers = 2
    await world.rounds(3)
    assert len(world.owned) == 4


async def settled(world: World, routers: int) -> None:
    """Other routers come and stay for long enough to be given something."""
    world.routers = routers
    await world.rounds(int(SETTLED_S / 0.25))


async def test_a_router_that_stays_is_given_its_share_one_partition_after_the_other(world: World) -> None:
    await world.rounds()
    await settled(world, 2)
    assert len(world.owned) == 8, "not before it has been there for a while"
    gave_up_at = []
    while len(world.owned) > 4:
        await world.rounds()
        for number, row in enumerate(world.rows):
            if row.owner is None:
                gave_up_at.append(world.now)
                world.held_by("router-1", number, for_s=60)
    assert len(gave_up_at) == 4
    assert all(b - a >= GIVE_UP_EVERY_S for a, b in pairwise(gave_up_at))
    await world.rounds(20)
    assert len(world.owned) == 4


async def test_a_router_that_leaves_and_comes_back_quickly_is_given_nothing(world: World) -> None:
    await world.rounds()
    for _ in range(10):
        world.routers = 2
        await world.rounds(int(SETTLED_S / 0.25) - 1)
        world.routers = 1
        await world.rounds()
    assert len(world.owned) == 8


async def test_nothing_is_given_up_while_something_waits_to_be_taken(world: World) -> None:
    await world.rounds()
    await settled(world, 2)
    await world.rounds(40)
    assert len(world.owned) == 7, "what it gave up was not taken"


async def test_of_two_that_hold_too_many_one_gives_up_at_a_time(world: World) -> None:
    world.routers = 2
    world.held_by("router-1", 0, 1, 2, 3, for_s=1e6)
    await world.rounds(20)
    await settled(world, 3)
    world.held_by("router-1", 0, 1, 2, 3, for_s=1e6)
    await world.rounds(4)
    assert len(world.owned) == 3, "router-0 is the first"
    taken = next(number for number, row in enumerate(world.rows) if row.owner is None)
    world.held_by("router-2", taken, for_s=1e6)
    await world.rounds(20)
    assert len(world.owned) == 3, "the next one is router-1's"


async def test_the_partition_that_costs_least_is_given_up(world: World) -> None:
    for number in range(8):
        if number != 5:
            world.pending[number] = [pending(1, f"s{number}", (bytes([number]) * 16, 1, 1))]
    await world.rounds()
    await settled(world, 2)
    await world.rounds()
    assert world.owned == {0, 1, 2, 3, 4, 6, 7}


async def test_what_is_left_over_stays_where_it_is(world: World) -> None:
    world.routers = 3
    world.held_by("router-1", 0, 1, 2, for_s=1e6)
    world.held_by("router-2", 3, 4, for_s=1e6)
    await world.rounds(30)
    assert world.owned == {5, 6, 7}, "8 over 3: no 3-3-2 is better than another"


async def test_nobody_keeps_two_more_than_another(world: World) -> None:
    """9 over 4 is 3-2-2-2: a router with 3 is not over the larger share, but the fourth is under the smaller one."""
    world.rows.append(Lease())
    for number, router in enumerate(["router-1"] * 4 + ["router-2"] * 2):
        world.held_by(router, number, for_s=1e6)
    world.routers = 3
    await world.rounds(20)
    assert world.owned == {6, 7, 8}
    await settled(world, 4)
    await world.rounds(5)
    assert len(world.owned) == 2


async def test_a_freed_lease_is_taken_at_once(world: World) -> None:
    world.routers = 2
    world.held_by("router-1", *range(8), for_s=1e6)
    async with running(world):
        assert not world.owned
        world.rows[3].owner = None
        world.keeper.lease_freed()
        await eventually(lambda: world.owned == {3}, 0.2, interval_s=0.005)


async def test_what_another_holds_is_left_alone_while_it_is_renewed(world: World) -> None:
    world.routers = 2
    for _ in range(40):
        world.held_by("router-1", 0, 1, 2, 3, 4)
        await world.rounds()
    assert world.owned == {5, 6, 7}, "router-1 has one more than its share: it is for router-1 to give it up"


async def test_a_lease_that_ran_out_is_taken_after_it_was_seen_so_for_a_while(world: World) -> None:
    world.held_by("router-1", 0)
    await world.rounds()
    died = world.now
    while 0 not in world.owned:
        await world.rounds()
        assert world.now - died < 3.6, "the recovery of a killed router takes less than 5 s"
    assert world.now - died >= LEASE_S


async def test_a_stall_of_the_database_robs_nobody(world: World) -> None:
    """All leases run out while it is away, and no other router counts as alive: whoever wakes first must give the
    others a heartbeat's time.
    """
    world.routers = 2
    world.held_by("router-1", 0, 1, 2, 3)
    await world.rounds(4)
    assert world.owned == {4, 5, 6, 7}
    world.down = True
    world.pass_(5)
    await world.rounds()
    world.down = False
    world.routers = 1
    await world.rounds()
    assert world.owned == {4, 5, 6, 7}
    world.routers = 2
    world.held_by("router-1", 0, 1, 2, 3)
    await world.rounds(8)
    assert world.owned == {4, 5, 6, 7}


async def test_a_router_that_does_not_come_back_from_a_stall_is_taken_over(world: World) -> None:
    world.routers = 2
    world.held_by("router-1", 0, 1, 2, 3)
    await world.rounds(4)
    world.pass_(5)
    world.routers = 1
    await world.rounds(14)
    assert world.owned == set(range(8))


async def test_a_lease_that_changed_hands_is_waited_for_anew(world: World) -> None:
    world.held_by("router-1", 0, for_s=0.1)
    await world.rounds(6)
    world.held_by("router-2", 0, for_s=0.0)
    world.rows[0].expires_at = world.now - 1
    await world.rounds()
    assert 0 not in world.owned
    await world.rounds(14)
    assert 0 in world.owned


async def test_what_it_owned_before_a_crash_is_its_own_at_once(world: World) -> None:
    world.held_by(ME, 0, 1)
    await world.rounds()
    assert {0, 1} <= world.owned


async def test_a_take_over_counts_a_strike_but_not_for_itself_again(world: World) -> None:
    world.held_by("router-1", 0, for_s=-1)
    await world.rounds(14)
    assert world.strikes == {0: True, **dict.fromkeys(range(1, 8), False)}
    world.keeper.end_all("database away")
    await world.rounds()
    assert world.strikes == dict.fromkeys(range(8), False)


async def test_a_strike_is_counted_once_however_often_a_take_over_is_begun(world: World) -> None:
    world.held_by("router-1", 0, for_s=-1)
    world.channels_fail = 3
    await world.rounds(30)
    assert 0 in world.owned
    assert world.asked_strikes == 1


async def test_losing_a_lease_ends_the_term(world: World) -> None:
    await world.rounds()
    partition = world.state.partitions[3]
    world.routers = 2
    world.held_by("router-1", 3)
    await world.rounds(5)
    assert partition.lost
    assert 3 not in world.owned


async def test_frozen_for_longer_than_a_lease_it_ends_all_terms_before_it_beats_again(world: World) -> None:
    await world.rounds()
    old = list(world.state.partitions.values())
    world.pass_(LEASE_S + 0.1)
    await world.rounds()
    assert all(partition.lost for partition in old)
    assert world.owned == set(range(8)), "nobody had taken them: it has them under new terms"


async def test_a_beat_that_took_too_long_ends_all_terms(world: World) -> None:
    """While it was not in time, what it had to say was held back: confirmations, starts, deliveries. Nobody says them
    again, so the terms cannot just go on.
    """
    await world.rounds()
    old = list(world.state.partitions.values())
    world.pass_(0.9)
    world.beat_takes_s = 2.5  # since the last beat 3.65 s; the answer's own deadline is still ahead
    await world.rounds()
    assert all(partition.lost for partition in old)


async def test_waiting_for_blocked_partitions_does_not_cost_it_its_own(world: World) -> None:
    """A frozen owner's commits hold the rows: each try waits two seconds, for four partitions, again and again."""
    world.held_by("router-1", 4, 5, 6, 7, for_s=-1)
    world.routers = 2
    await world.rounds(2)
    assert world.owned == {0, 1, 2, 3}
    own = list(world.state.partitions.values())
    world.routers = 1
    world.acquire_fails = {4, 5, 6, 7}
    world.acquire_takes_s = lambda number: 2.0 if number in world.acquire_fails else 0.0
    await world.rounds(10)
    assert world.always_in_time
    assert not any(partition.lost for partition in own)


async def test_a_partition_lost_again_while_it_was_loaded_is_not_taken(world: World) -> None:
    world.load_fails = FenceLost(frozenset({0}))
    await world.rounds()
    assert world.owned == set()


async def test_a_database_lost_while_loading_is_tried_again(world: World) -> None:
    world.load_fails = StoreLost("gone")
    await world.rounds()
    assert world.owned == set()
    world.load_fails = None
    await world.rounds()
    assert world.owned == set(range(8))


async def test_a_partition_that_is_taken_is_read_and_delivered_for(world: World) -> None:
    await world.rounds()
    assert sorted(event for event in world.events if event.endswith(" 3")) == ["adopt 3", "attach 3"]


async def test_ending_a_term_forgets_all_of_it(world: World) -> None:
    await world.rounds()
    world.events.clear()
    world.keeper.end_fenced(frozenset({2, 99}))
    assert world.events == ["detach 2", "drop 2"]
    world.keeper.end_fenced(frozenset({2}))
    assert world.events == ["detach 2", "drop 2"]


async def test_shutdown_frees_all_leases_and_takes_none_again(world: World) -> None:
    await world.rounds()
    await world.keeper.release_all()
    assert [row.owner for row in world.rows] == [None] * 8
    assert world.owned == set()
    async with running(world):
        await asyncio.sleep(0)
    assert world.owned == set()


async def test_a_lease_that_is_being_asked_for_at_the_shutdown_is_freed_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, may_go_on = asyncio.Event(), asyncio.Event()
    acquire = world.acquire

    async def waits(partition: int, term: UUID, seen: UUID | None) -> AcquiredRow | None:
        asking.set()
        await may_go_on.wait()
        return await acquire(partition, term, seen)

    monkeypatch.setattr(world, "acquire", waits)
    async with asyncio.TaskGroup() as group:
        group.create_task(world.keeper._look())
        await asking.wait()
        release = group.create_task(world.keeper.release_all())
        await world.settles()
        assert not release.done()
        may_go_on.set()
    assert world.owned == set()
    assert world.loads == []
    assert [row.owner for row in world.rows] == [None] * 8


@asynccontextmanager
async def running(world: World) -> AsyncIterator[None]:
    task = asyncio.create_task(world.keeper.run())
    try:
        await world.keeper.ready.wait()
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# ---- putting back what the store has


def pending(position: int, session: str, turn: tuple[bytes, int, int] | None = None, kind: int = 1) -> PendingRow:
    """A message without an outcome; `turn` is the session's running turn as (id, first, last)."""
    session_id = ids.session_id(TENANT, AGENT, CHANNEL, session)
    message = (position, b"m%d" % position, kind, True, 0, None, "")
    running = (turn[0], TurnStatus.RUNNING, 2, 0, turn[1], turn[2], "r1") if turn else (None,) * 7
    later = (1, 0, 0, 1000, False, None, None, False, False)
    fields: list[Any] = [*message, session_id, TENANT, AGENT, CHANNEL, session, 4, 3, *running, *later]
    return PendingRow(*fields)


async def test_turns_queues_and_cancels_are_as_they_were(world: World) -> None:
    turn = (b"t" * 16, 2, 3)
    world.pending[5] = [
        pending(2, "runs", turn),
        pending(3, "runs", turn),
        pending(4, "waits"),
        pending(5, "runs", turn),
        pending(6, "runs", turn, kind=2),
        pending(7, "waits"),
    ]
    await world.rounds()
    partition = world.state.partitions[5]
    runs, waits = partition.sessions.values()
    assert runs.turn is not None
    assert [message.position for message in runs.turn.inputs] == [2, 3]
    assert (runs.turn.number, runs.turn.dispatch, runs.turn.journal_loaded) == (5, 2, False)
    assert [message.position for message in runs.queue] == [5]
    assert [message.position for message in waits.queue] == [4, 7]
    assert list(partition.pending) == [2, 3, 4, 5, 6, 7]
    assert partition.floor == 2
    mine = [event for event in world.events if not event.startswith(("adopt", "attach"))]
    assert mine == ["resume runs", "cancel runs 6"]
    assert world.state.scheduler.waiting == 1
