"""Fairness: tenants share by weight, sessions of a tenant in turn, nobody starves, nobody passes a bound."""

from collections import Counter
from collections.abc import Callable
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.router.domain.scheduler import Scheduler
from services.router.domain.session import Session, SessionKey
from tests.unit.router.builders import AGENT, a_partition, a_session

Limits = Callable[[str], tuple[int, int]]
AgentLimit = Callable[[str, str], int]


def free_for_all(_: str) -> tuple[int, int]:
    return 100, 1000


def any_number(_tenant: str, _agent: str) -> int:
    return 1000


def key(tenant: str, agent: str = AGENT) -> SessionKey:
    return SessionKey(tenant, agent, "line", "s")


def sessions(tenant: str, count: int, agent: str = AGENT) -> list[Session]:
    partition = a_partition()
    return [a_session(partition, f"{tenant}-{agent}-{n}", tenant=tenant, agent=agent) for n in range(count)]


def names(picked: list[Session]) -> list[str]:
    return [f"{session.key.agent}{session.key.session.rpartition('-')[2]}" for session in picked]


def started(scheduler: Scheduler, room: int) -> list[Session]:
    """Picks as the turn runner does: each turn is counted in before the next is taken."""
    picked = []
    for session in scheduler.pick(room):
        scheduler.started(session.key)
        picked.append(session)
    return picked


def tenants(picked: list[Session]) -> Counter[str]:
    return Counter(session.key.tenant for session in picked)


def scheduler_with(
    limits: Limits, max_running: int = 10_000, agent_limit: AgentLimit = any_number, **counts: int
) -> Scheduler:
    scheduler = Scheduler(max_running, limits, agent_limit)
    for tenant, count in counts.items():
        for session in sessions(tenant, count):
            scheduler.add(session)
    return scheduler


def test_sessions_of_a_tenant_go_in_the_order_they_became_ready() -> None:
    scheduler = scheduler_with(free_for_all, a=20)
    assert names(started(scheduler, 20)) == [f"echo{n}" for n in range(20)]


def test_a_session_that_is_ready_twice_runs_once() -> None:
    scheduler = Scheduler(10, free_for_all, any_number)
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
    scheduler.ended(key("a"))
    assert tenants(started(scheduler, 100)) == {"a": 1}


def test_the_bound_of_all_holds() -> None:
    scheduler = scheduler_with(free_for_all, max_running=5, a=10, b=10)
    assert len(started(scheduler, 100)) == 5
    assert scheduler.running == 5
    scheduler.ended(key("a"))
    assert len(started(scheduler, 100)) == 1


def test_a_tenant_at_its_bound_does_not_hold_up_a_light_one() -> None:
    """The light one needs several visits for a turn, and between them comes, each time, the one that may not run."""
    limits = {"full": (100, 1), "light": (10, 100)}
    scheduler = scheduler_with(lambda t: limits[t], full=5, light=5)
    assert tenants(started(scheduler, 100)) == {"full": 1, "light": 5}


def test_starting_at_once_overtakes_nobody() -> None:
    scheduler = Scheduler(2, lambda _: (100, 1), any_number)
    assert scheduler.may_start(key("a"))
    scheduler.started(key("a"))
    assert not scheduler.may_start(key("a")), "its tenant is at its bound"
    assert scheduler.may_start(key("b"))
    [held_up] = sessions("a", 1)
    scheduler.add(held_up)
    assert scheduler.may_start(key("b")), "who waits could not start"
    [waiting] = sessions("c", 1)
    scheduler.add(waiting)
    assert not scheduler.may_start(key("b")), "somebody waits who could"
    scheduler.drop(lambda session: session is waiting)
    scheduler.started(key("b"))
    assert not scheduler.may_start(key("c")), "everything is taken"


def test_dropping_forgets_what_is_lost_and_nothing_else() -> None:
    scheduler = Scheduler(100, free_for_all, any_number)
    lost, kept = a_partition(0), a_partition(1)
    for n in range(5):
        scheduler.add(a_session(lost, f"lost-{n}"))
        scheduler.add(a_session(kept, f"kept-{n}"))
    scheduler.drop(lambda session: session.partition is lost)
    assert scheduler.waiting == 5
    assert [session.partition for session in started(scheduler, 100)] == [kept] * 5


def test_sessions_of_a_full_agent_let_others_pass_and_come_back_in_order() -> None:
    scheduler = Scheduler(100, free_for_all, lambda _, agent: 1 if agent == "slow" else 100)
    for session in [*sessions("a", 4, "slow"), *sessions("a", 2, "fast")]:
        scheduler.add(session)
    assert names(started(scheduler, 100)) == ["slow0", "fast0", "fast1"]
    assert scheduler.waiting == 3
    assert not scheduler.startable, "nothing to look for until a gate opens"
    for session in sessions("a", 1, "late"):
        scheduler.add(session)
    scheduler.ended(key("a", "slow"))
    assert names(started(scheduler, 100)) == ["slow1", "late0"], "before whatever became ready after it"
    scheduler.ended(key("a", "fast"))
    assert started(scheduler, 100) == []
    scheduler.ended(key("a", "slow"))
    assert names(started(scheduler, 100)) == ["slow2"]


def test_what_is_parked_goes_before_what_comes_later_of_the_agent() -> None:
    limit = {"slow": 1}
    scheduler = Scheduler(100, free_for_all, lambda _, agent: limit[agent])
    waiting = sessions("a", 5, "slow")
    for session in waiting[:3]:
        scheduler.add(session)
    assert names(started(scheduler, 100)) == ["slow0"]
    limit["slow"] = 3  # and nobody has said so
    scheduler.add(waiting[3])
    assert not scheduler.may_start(key("a", "slow"))
    assert names(started(scheduler, 100)) == ["slow1", "slow2"]


def test_a_paused_agent_waits_until_it_is_resumed_and_holds_up_nobody() -> None:
    limit = {"paused": 0, "other": 10}
    scheduler = Scheduler(100, free_for_all, lambda _, agent: limit[agent])
    for session in sessions("a", 3, "paused"):
        scheduler.add(session)
    assert not scheduler.may_start(key("a", "paused"))
    assert scheduler.may_start(key("a", "other")), "what waits could not start"
    assert started(scheduler, 100) == []
    limit["paused"] = 10
    assert started(scheduler, 100) == [], "not looked at before somebody says so"
    scheduler.gates_changed()
    assert scheduler.startable
    assert not scheduler.may_start(key("a", "other")), "somebody waits who could start"
    assert names(started(scheduler, 100)) == ["paused0", "paused1", "paused2"]


def test_a_paused_tenant_waits_until_it_is_resumed_and_holds_up_nobody() -> None:
    limits = {"a": (100, 0), "b": (100, 10)}
    scheduler = scheduler_with(lambda tenant: limits[tenant], a=3)
    assert not scheduler.may_start(key("a"))
    assert scheduler.may_start(key("b"))
    assert not scheduler.startable
    limits["a"] = (100, 2)
    scheduler.gates_changed()
    assert tenants(started(scheduler, 100)) == {"a": 2}


def test_a_tenant_held_up_by_its_agents_has_saved_nothing_up() -> None:
    """Its share of rounds that it could not use is lost: it gets no burst once the gate opens."""
    limit = {"a": 0, "b": 1000}
    scheduler = Scheduler(10_000, free_for_all, lambda tenant, _: limit[tenant])
    for session in [*sessions("a", 100), *sessions("b", 200)]:
        scheduler.add(session)
    for _ in range(10):
        started(scheduler, 10)
        scheduler.gates_changed()
    limit["a"] = 1000
    scheduler.gates_changed()
    counts = tenants(started(scheduler, 40))
    assert abs(counts["a"] - counts["b"]) <= 2


def test_a_gate_that_opens_for_sessions_that_are_lost_opens_for_nobody() -> None:
    scheduler = Scheduler(100, free_for_all, lambda *_: 1)
    partition = a_partition()
    for n in range(2):
        scheduler.add(a_session(partition, f"s{n}"))
    [running] = started(scheduler, 100)
    scheduler.gates_changed()
    scheduler.drop(lambda session: session.partition is partition)
    scheduler.ended(running.key)
    assert started(scheduler, 100) == []
    assert scheduler.may_start(running.key)
    assert not scheduler.startable


def test_a_tenant_starts_no_crowd_in_one_group_while_others_are_there() -> None:
    scheduler = Scheduler(10_000, free_for_all, any_number, crowd=4)
    for session in [*sessions("flood", 20), *sessions("small", 1)]:
        scheduler.add(session)
    assert tenants(started(scheduler, 100)) == {"flood": 4, "small": 1}
    assert scheduler.startable, "in the next group"
    assert scheduler.started_in_group == 5
    assert not scheduler.may_start(key("flood"))
    assert scheduler.may_start(key("other")), "who waits has had its crowd"
    scheduler.open_group()
    assert tenants(started(scheduler, 100)) == {"flood": 4}
    scheduler.ended(key("small"))
    scheduler.open_group()
    assert tenants(started(scheduler, 100)) == {"flood": 12}, "alone it may"


class AnyOrder(RuleBasedStateMachine):
    """Sessions come, turns start and end, gates move, partitions are lost, in any order, for tenants of all sizes."""

    WEIGHTS: ClassVar = {"a": 100, "b": 30, "c": 1000, "d": 1}
    AGENTS = ("x", "y", "z")
    MAX_RUNNING = 6
    CROWD = 2

    @initialize()
    def begin(self) -> None:
        self.tenant_limit = {"a": 3, "b": 2, "c": 1, "d": 5}
        self.agent_limit = {(t, a): 4 - n for t in "abcd" for n, a in enumerate(self.AGENTS)}
        self.scheduler = Scheduler(
            self.MAX_RUNNING,
            lambda tenant: (self.WEIGHTS[tenant], self.tenant_limit[tenant]),
            lambda *agent: self.agent_limit[agent],
            self.CROWD,
        )
        self.partitions = [a_partition(0), a_partition(1)]
        self.ready: list[Session] = []
        self.running: list[SessionKey] = []
        self.made = 0
        self.in_group: Counter[str] = Counter()
        self.told = True
        """Whether the scheduler knows of every gate that was opened."""

    def has_room(self, key: SessionKey) -> bool:
        """The model: both gates, counted anew."""
        of_tenant = [k for k in self.running if k.tenant == key.tenant]
        return (
            len(of_tenant) < self.tenant_limit[key.tenant]
            and sum(k.agent == key.agent for k in of_tenant) < self.agent_limit[key.tenant, key.agent]
        )

    def startable(self) -> list[Session]:
        """Ready sessions that a gate would let through now."""
        return [session for session in self.ready if self.has_room(session.key)]

    def is_crowd(self, tenant: str) -> bool:
        """Whether the group has started enough of a tenant that is not alone."""
        known = {session.key.tenant for session in self.ready} | {key.tenant for key in self.running}
        return self.in_group[tenant] >= self.CROWD and len(known) > 1

    @rule()
    def group_begins(self) -> None:
        self.scheduler.open_group()
        self.in_group.clear()

    @rule(tenant=st.sampled_from("abcd"), agent=st.sampled_from(AGENTS), partition=st.integers(0, 1))
    def arrives(self, tenant: str, agent: str, partition: int) -> None:
        session = a_session(self.partitions[partition], f"s{self.made}", tenant=tenant, agent=agent)
        self.made += 1
        self.scheduler.add(session)
        self.ready.append(session)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def is_ready_again(self, data: st.DataObject) -> None:
        self.scheduler.add(data.draw(st.sampled_from(self.ready)))

    @rule(room=st.integers(0, 10))
    def picks(self, room: int) -> None:
        taken = 0
        for session in self.scheduler.pick(room):
            taken += 1
            assert not session.ready
            assert len(self.running) < self.MAX_RUNNING
            assert self.has_room(session.key), "no gate is passed"
            assert not self.is_crowd(session.key.tenant)
            same = [s for s in self.ready if (s.key.tenant, s.key.agent) == (session.key.tenant, session.key.agent)]
            assert session is same[0], "sessions of an agent go in the order they became ready"
            self.ready.remove(session)
            self.scheduler.started(session.key)
            self.running.append(session.key)
            self.in_group[session.key.tenant] += 1
        assert taken <= room
        if taken < room and len(self.running) < self.MAX_RUNNING and self.told:
            left = [s for s in self.startable() if not self.is_crowd(s.key.tenant)]
            assert not left, "there is room, and somebody who may start was left waiting"

    @rule(tenant=st.sampled_from("abcd"), agent=st.sampled_from(AGENTS))
    def would_start_at_once(self, tenant: str, agent: str) -> None:
        key = SessionKey(tenant, agent, "line", "new")
        may = self.scheduler.may_start(key)
        if may:
            assert len(self.running) < self.MAX_RUNNING
            assert self.has_room(key)
            assert not any((s.key.tenant, s.key.agent) == (tenant, agent) for s in self.ready), "its agent's go first"
        if self.told:
            room = len(self.running) < self.MAX_RUNNING and self.has_room(key) and not self.is_crowd(tenant)
            before = [s for s in self.startable() if not self.is_crowd(s.key.tenant) or s.key.tenant == tenant]
            assert may == (room and not before), "at once if there is room and nobody is overtaken"

    @precondition(lambda self: len(self.running) < self.MAX_RUNNING)
    @rule(tenant=st.sampled_from("abcd"), agent=st.sampled_from(AGENTS))
    def starts_unpicked(self, tenant: str, agent: str) -> None:
        """A message that came for an idle session, if the gates let it; else a turn taken over from a dead router, for
        which no gate is asked.
        """
        key = SessionKey(tenant, agent, "line", "new")
        self.scheduler.started(key)
        self.running.append(key)
        self.in_group[tenant] += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.running))
        self.running.remove(key)
        self.scheduler.ended(key)

    @rule(tenant=st.sampled_from("abcd"), limit=st.integers(0, 4), say=st.booleans())
    def tenant_gate_moves(self, tenant: str, limit: int, say: bool) -> None:
        self.told &= limit <= self.tenant_limit[tenant]
        self.tenant_limit[tenant] = limit
        if say:
            self.says_so()

    @rule(tenant=st.sampled_from("abcd"), agent=st.sampled_from(AGENTS), limit=st.integers(0, 3), say=st.booleans())
    def agent_gate_moves(self, tenant: str, agent: str, limit: int, say: bool) -> None:
        self.told &= limit <= self.agent_limit[tenant, agent]
        self.agent_limit[tenant, agent] = limit
        if say:
            self.says_so()

    @rule()
    def says_so(self) -> None:
        self.scheduler.gates_changed()
        self.told = True

    @rule(partition=st.integers(0, 1))
    def loses_a_partition(self, partition: int) -> None:
        lost = self.partitions[partition]
        self.scheduler.drop(lambda session: session.partition is lost)
        self.ready = [session for session in self.ready if session.partition is not lost]
        self.partitions[partition] = a_partition(partition)

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.waiting == len(self.ready)
        assert self.scheduler.running == len(self.running)
        known = {session.key.tenant for session in self.ready} | {key.tenant for key in self.running}
        assert set(self.scheduler._tenants) == known, "a tenant with nothing to do costs memory"
        for tenant, ring in self.scheduler._tenants.items():
            waiting = [session for session in self.ready if session.key.tenant == tenant]
            assert ring.waiting == len(waiting)
            agents = {s.key.agent for s in waiting} | {k.agent for k in self.running if k.tenant == tenant}
            assert set(ring.agents) <= agents, "an agent with nothing to do costs memory"

    @invariant()
    def whoever_could_start_will_be_looked_at(self) -> None:
        if self.told and self.startable():
            assert self.scheduler.startable == (len(self.running) < self.MAX_RUNNING)

    def teardown(self) -> None:
        """Nobody starves: with open gates and turns that end, everybody gets a turn in a bounded number of rounds."""
        self.tenant_limit = dict.fromkeys(self.tenant_limit, 1)
        self.agent_limit = dict.fromkeys(self.agent_limit, 1)
        self.says_so()
        for _ in range(len(self.ready) + len(self.running)):
            for key in self.running:
                self.scheduler.ended(key)
            self.running.clear()
            self.group_begins()
            self.picks(self.MAX_RUNNING)
            self.counts_agree()
        assert not self.ready


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
