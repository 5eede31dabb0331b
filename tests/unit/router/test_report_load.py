"""What the gateways are told of waiting messages: exact numbers, little news, at once where a bound is reached."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from soma.router.v1.outbound_pb2 import MailboxLoad

from services.router.application.report_load import LAST_WORDS, ReportLoad
from services.router.application.state import QUEUED_CONTENT_BYTES, RouterState
from services.router.domain.session import QueuedMessage, Session
from soma_common.layout import LaneLayout
from tests.unit.router.builders import a_partition, a_session

SESSION_BOUND = 3
TENANT_BOUND = 1000
"""A hundredth of it, 10 messages, is what a router speaks of."""


class World:
    """A router's state and what it has said."""

    def __init__(self) -> None:
        self.state = RouterState(LaneLayout(8, 1), cast(Any, None), 100, 100, SESSION_BOUND, TENANT_BOUND)
        self.said: list[tuple[str, MailboxLoad]] = []
        self.in_time = True
        self.partitions = [a_partition(0), a_partition(1)]
        self.state.partitions = {partition.id: partition for partition in self.partitions}
        self.reports = ReportLoad(self.state, "router-0", self.send, lambda: self.in_time, tenant_bound=TENANT_BOUND)

    async def send(self, tenant: str, load: MailboxLoad) -> None:
        self.said.append((tenant, load))

    def waits(self, session: Session, count: int = 1) -> None:
        for _ in range(count):
            self.state.enqueue(session, QueuedMessage(1, b"m" * 16, True, 0, "", b"content"))


def waiting(load: MailboxLoad) -> dict[int, int]:
    return {said.partition: said.waiting for said in load.partitions}


async def test_a_tenant_for_which_little_waits_is_not_spoken_of() -> None:
    world = World()
    for n in range(9):
        world.waits(a_session(world.partitions[0], f"s{n}"))
    await world.reports.report_all()
    assert not world.said


async def test_a_tenant_for_which_much_waits_is_spoken_of_until_it_is_small_again() -> None:
    world = World()
    sessions = [a_session(world.partitions[n % 2], f"s{n}") for n in range(10)]
    for session in sessions:
        world.waits(session)
    await world.reports.report_all()
    [(tenant, load)] = world.said
    assert (tenant, load.router, waiting(load)) == ("demo", "router-0", {0: 5, 1: 5})
    for session in sessions:
        world.state.dequeue(session)
    world.said.clear()
    for _ in range(LAST_WORDS + 2):
        await world.reports.report_all()
    assert [waiting(load) for _, load in world.said] == [{0: 0, 1: 0}] * LAST_WORDS


async def test_a_session_at_its_bound_is_named_at_once_and_when_it_is_not_any_more() -> None:
    world = World()
    session = a_session(world.partitions[1])
    world.waits(session, SESSION_BOUND - 1)
    assert not world.state.mailbox.crossed
    world.waits(session)
    await world.reports.report_crossed()
    world.state.dequeue(session)
    await world.reports.report_crossed()
    named = [[list(said.full_sessions) for said in load.partitions] for _, load in world.said]
    assert named == [[[], [session.id]], [[], []]]
    assert world.said[0][1].partitions[1].epoch == world.partitions[1].epoch


async def test_a_tenant_that_comes_closer_to_its_bound_is_spoken_of_at_once() -> None:
    world = World()
    sessions = [a_session(world.partitions[0], f"s{n}") for n in range(100)]
    for session in sessions[:49]:
        world.waits(session)
    assert not world.state.mailbox.crossed
    world.waits(sessions[49])
    await world.reports.report_crossed()
    assert [waiting(load)[0] for _, load in world.said] == [50]
    assert not world.state.mailbox.crossed


async def test_a_router_whose_lease_is_overdue_says_nothing() -> None:
    world = World()
    world.waits(a_session(world.partitions[0]), SESSION_BOUND)
    world.in_time = False
    await world.reports.report_crossed()
    await world.reports.report_all()
    assert not world.said
    world.in_time = True
    await world.reports.report_crossed()
    assert world.said, "what it kept to itself is not forgotten"


async def test_what_left_with_a_partition_is_not_counted_any_more() -> None:
    world = World()
    world.waits(a_session(world.partitions[0], "s0"), 20)
    world.waits(a_session(world.partitions[1], "s1"), 2)
    world.state.forget_partition(world.partitions[0])
    assert world.state.mailbox.waiting == 2
    await world.reports.report_all()
    assert not world.said


async def test_controls_that_wait_fill_their_session_as_messages_do_and_take_none_of_their_places() -> None:
    world = World()
    session = a_session(world.partitions[1])
    mailbox = world.state.mailbox
    world.waits(session, SESSION_BOUND - 1)
    for _ in range(SESSION_BOUND - 1):
        mailbox.control_added(session)
    assert not mailbox.crossed
    mailbox.control_added(session)
    await world.reports.report_crossed()
    mailbox.controls_taken(session, SESSION_BOUND)
    await world.reports.report_crossed()
    [full, free] = [load.partitions[1] for _, load in world.said]
    assert (list(full.full_sessions), full.waiting) == ([session.id], 2 * SESSION_BOUND - 1)
    assert (list(free.full_sessions), free.waiting) == ([], SESSION_BOUND - 1)


async def test_a_session_stays_full_until_it_is_neither_of_messages_nor_of_controls() -> None:
    world = World()
    session = a_session(world.partitions[1])
    mailbox = world.state.mailbox
    world.waits(session, SESSION_BOUND)
    for _ in range(SESSION_BOUND):
        mailbox.control_added(session)
    world.state.dequeue(session)
    assert session.id in mailbox.tenant("demo").full
    mailbox.controls_taken(session, 1)
    assert not mailbox.tenant("demo").full


def test_content_of_a_tenant_that_has_little_waiting_stays_in_memory_beside_a_flood() -> None:
    world = World()
    flood = a_session(world.partitions[0], "flood", tenant="flood")
    quiet = a_session(world.partitions[0], "quiet", tenant="quiet")
    size = 16 * 1024
    for _ in range(2 * QUEUED_CONTENT_BYTES // size):
        world.state.enqueue(flood, QueuedMessage(1, b"m" * 16, True, 0, "", b"x" * size))
    for _ in range(8):
        world.state.enqueue(quiet, QueuedMessage(1, b"m" * 16, True, 0, "", b"x" * size))
    kept = QUEUED_CONTENT_BYTES // size
    assert sum(message.content is not None for message in flood.queue) == kept
    assert sum(message.content is not None for message in quiet.queue) == 4, "its share, a 64th"
    for session in (flood, quiet):
        while session.queue:
            world.state.dequeue(session)
    assert world.state._queued_bytes == 0
    assert not world.state._tenant_bytes


class AnyOrder(RuleBasedStateMachine):
    """Messages come, are taken and put back, controls wait and are done with, partitions are lost: the counts are those
    of the queues.
    """

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.sessions = [
            a_session(partition, f"s{partition.id}-{n}", tenant=tenant)
            for partition in self.world.partitions
            for tenant in ("a", "b")
            for n in range(2)
        ]

    @rule(number=st.integers(0, 7), count=st.integers(1, 4))
    def comes(self, number: int, count: int) -> None:
        session = self.sessions[number]
        if not session.partition.lost:
            self.world.waits(session, count)

    @precondition(lambda self: any(session.queue for session in self.sessions))
    @rule(data=st.data(), back=st.booleans())
    def is_taken(self, data: st.DataObject, back: bool) -> None:
        session = data.draw(st.sampled_from([session for session in self.sessions if session.queue]))
        message = self.world.state.dequeue(session)
        if back:
            self.world.state.requeue(session, message)

    @rule(number=st.integers(0, 7), count=st.integers(1, 4))
    def controls_wait(self, number: int, count: int) -> None:
        session = self.sessions[number]
        if not session.partition.lost:
            for _ in range(count):
                self.world.state.mailbox.control_added(session)

    @precondition(lambda self: any(session.waiting_controls for session in self.sessions))
    @rule(data=st.data())
    def controls_are_done_with(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from([session for session in self.sessions if session.waiting_controls]))
        count = data.draw(st.integers(1, session.waiting_controls))
        self.world.state.mailbox.controls_taken(session, count)

    @rule(number=st.integers(0, 1))
    def partition_is_lost(self, number: int) -> None:
        partition = self.world.partitions[number]
        if not partition.lost:
            self.world.state.forget_partition(partition)
            for session in self.sessions:
                if session.partition is partition:
                    session.queue.clear()

    @invariant()
    def the_counts_are_those_of_the_queues(self) -> None:
        mailbox = self.world.state.mailbox
        waits = {session: len(session.queue) + session.waiting_controls for session in self.sessions}
        assert mailbox.waiting == sum(waits.values())
        for tenant in ("a", "b"):
            of_tenant = [session for session in self.sessions if session.key.tenant == tenant and waits[session]]
            mail = mailbox.tenant(tenant)
            assert mail.waiting == sum(waits[session] for session in of_tenant)
            by_partition: dict[int, int] = {}
            for session in of_tenant:
                number = session.partition.id
                by_partition[number] = by_partition.get(number, 0) + waits[session]
            assert mail.partitions == by_partition
            full = {s.id for s in of_tenant if max(len(s.queue), s.waiting_controls) >= SESSION_BOUND}
            assert set(mail.full) == full
        assert {t for t, _ in mailbox} == {s.key.tenant for s in self.sessions if waits[s]}, "an idle one costs nothing"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
