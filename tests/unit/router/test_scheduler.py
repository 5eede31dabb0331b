"""Fairness: tenants share by weight, sessions of a tenant in turn, nobody starves, nobody passes a bound."""

from collections import Counter
from collections.abc import Callable
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.router.domain.scheduler import Scheduler
from services.router.domain.session import Session
from tests.unit.router.builders import a_partition, a_session

Limits = Callable[[str], tuple[int, int]]


def free_for_all(_: str) -> tuple[int, int]:
    return 100, 1000


def sessions(tenant: str, count: int) -> list[Session]:
    partition = a_partition()
    return [a_session(partition, f"{tenant}-{n}", tenant=tenant) for n in range(count)]


def started(scheduler: Scheduler, room: int) -> list[Session]:
    """Picks as the turn runner does: each turn is counted in before the next is taken."""
    picked = []
    for session in scheduler.pick(room):
        scheduler.started(session.key.tenant)
        picked.append(session)
    return picked


def tenants(picked: list[Session]) -> Counter[str]:
    return Counter(session.key.tenant for session in picked)


def scheduler_with(limits: Limits, max_running: int = 10_000, **counts: int) -> Scheduler:
    scheduler = Scheduler(max_running, limits)
    for tenant, count in counts.items():
        for session in sessions(tenant, count):
            scheduler.add(session)
    return scheduler


def test_sessions_of_a_tenant_go_in_the_order_they_became_ready() -> None:
    scheduler = scheduler_with(free_for_all, a=20)
    assert [session.key.session for session in started(scheduler, 20)] == [f"a-{n}" for n in range(20)]


def test_a_session_that_is_ready_twice_runs_once() -> None:
    scheduler = Scheduler(10, free_for_all)
    [session] = sessions("a", 1)
    scheduler.add(session)
    scheduler.add(session)
    assert scheduler.waiting == 1
    assert started(scheduler, 10) == [session]
    assert not session.ready


def test_a_flood_of_one_tenant_takes_one_turn_in_two() -> None:
    scheduler = scheduler_with(free_for_all, flood=1000, small=10)
    assert tenants(started(scheduler, 20)) == {"flood": 10, "small": 10}


def test_tenants_share_by_weight() -> None:
    weights = {"gold": 300, "silver": 100, "half": 50}
    scheduler = scheduler_with(lambda t: (weights[t], 10_000), gold=1000, silver=1000, half=1000)
    counts = tenants(started(scheduler, 900))
    assert abs(counts["gold"] - 600) <= 6
    assert abs(counts["silver"] - 200) <= 6
    assert abs(counts["half"] - 100) <= 6


def test_weights_hold_over_many_small_picks() -> None:
    """Brains give room for a turn or two at a time: a tenant's share does not start anew with every pick."""
    weights = {"gold": 300, "silver": 100}
    scheduler = scheduler_with(lambda t: (weights[t], 10_000), gold=1000, silver=1000)
    picked = [session for _ in range(400) for session in started(scheduler, 1)]
    assert tenants(picked) == {"gold": 300, "silver": 100}


def test_a_tenant_that_was_idle_has_saved_nothing_up() -> None:
    scheduler = scheduler_with(lambda t: (1000, 10_000), a=1)
    started(scheduler, 1)
    for tenant in ("a", "b"):
        for session in sessions(tenant, 100):
            scheduler.add(session)
    assert tenants(started(scheduler, 20)) == {"a": 10, "b": 10}


def test_a_tenants_bound_holds_and_frees_with_an_end() -> None:
    scheduler = scheduler_with(lambda _: (100, 3), a=10, b=1)
    assert tenants(started(scheduler, 100)) == {"a": 3, "b": 1}
    assert started(scheduler, 100) == []
    scheduler.ended("a")
    assert tenants(started(scheduler, 100)) == {"a": 1}


def test_the_bound_of_all_holds() -> None:
    scheduler = scheduler_with(free_for_all, max_running=5, a=10, b=10)
    assert len(started(scheduler, 100)) == 5
    assert scheduler.running == 5
    scheduler.ended("a")
    assert len(started(scheduler, 100)) == 1


def test_a_tenant_at_its_bound_does_not_hold_up_a_light_one() -> None:
    """The light one needs several visits for a turn, and between them comes, each time, the one that may not run."""
    limits = {"full": (100, 1), "light": (10, 100)}
    scheduler = scheduler_with(lambda t: limits[t], full=5, light=5)
    assert tenants(started(scheduler, 100)) == {"full": 1, "light": 5}


def test_starting_at_once_overtakes_nobody() -> None:
    scheduler = Scheduler(2, lambda _: (100, 1))
    assert scheduler.may_start("a")
    scheduler.started("a")
    assert not scheduler.may_start("a"), "its tenant is at its bound"
    assert scheduler.may_start("b")
    [waiting] = sessions("a", 1)
    scheduler.add(waiting)
    assert not scheduler.may_start("b"), "somebody waits"
    scheduler.drop(lambda session: session is waiting)
    scheduler.started("b")
    assert not scheduler.may_start("c"), "everything is taken"


def test_dropping_forgets_what_is_lost_and_nothing_else() -> None:
    scheduler = Scheduler(100, free_for_all)
    lost, kept = a_partition(0), a_partition(1)
    for n in range(5):
        scheduler.add(a_session(lost, f"lost-{n}"))
        scheduler.add(a_session(kept, f"kept-{n}"))
    scheduler.drop(lambda session: session.partition is lost)
    assert scheduler.waiting == 5
    assert [session.partition for session in started(scheduler, 100)] == [kept] * 5


class AnyOrder(RuleBasedStateMachine):
    """Sessions come, turns start and end, partitions are lost, in any order, for tenants of all sizes."""

    LIMITS: ClassVar = {"a": (100, 3), "b": (30, 2), "c": (1000, 1), "d": (1, 5)}
    MAX_RUNNING = 6

    @initialize()
    def begin(self) -> None:
        self.scheduler = Scheduler(self.MAX_RUNNING, self.LIMITS.__getitem__)
        self.partitions = [a_partition(0), a_partition(1)]
        self.ready: list[Session] = []
        self.running: Counter[str] = Counter()
        self.made = 0

    @rule(tenant=st.sampled_from("abcd"), partition=st.integers(0, 1))
    def arrives(self, tenant: str, partition: int) -> None:
        session = a_session(self.partitions[partition], f"s{self.made}", tenant=tenant)
        self.made += 1
        self.scheduler.add(session)
        self.ready.append(session)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def is_ready_again(self, data: st.DataObject) -> None:
        self.scheduler.add(data.draw(st.sampled_from(self.ready)))

    @rule(room=st.integers(0, 10))
    def picks(self, room: int) -> None:
        picked = started(self.scheduler, room)
        assert len(picked) <= room
        for session in picked:
            first = next(s for s in self.ready if s.key.tenant == session.key.tenant)
            assert session is first, "sessions of a tenant go in order"
            self.ready.remove(session)
            self.running[session.key.tenant] += 1
        if len(picked) < room and self.running.total() < self.MAX_RUNNING:
            startable = [s for s in self.ready if self.running[s.key.tenant] < self.LIMITS[s.key.tenant][1]]
            assert not startable, "there is room, and somebody who may start was left waiting"

    @precondition(lambda self: self.running.total())
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        tenant = data.draw(st.sampled_from(sorted(t for t, count in self.running.items() if count)))
        self.scheduler.ended(tenant)
        self.running[tenant] -= 1

    @rule(partition=st.integers(0, 1))
    def loses_a_partition(self, partition: int) -> None:
        lost = self.partitions[partition]
        self.scheduler.drop(lambda session: session.partition is lost)
        self.ready = [session for session in self.ready if session.partition is not lost]
        self.partitions[partition] = a_partition(partition)

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.waiting == len(self.ready)
        assert self.scheduler.running == self.running.total() <= self.MAX_RUNNING
        for tenant, count in self.running.items():
            assert count <= self.LIMITS[tenant][1]
        known = {session.key.tenant for session in self.ready} | {t for t, count in self.running.items() if count}
        assert set(self.scheduler._tenants) == known, "a tenant with nothing to do costs memory"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
