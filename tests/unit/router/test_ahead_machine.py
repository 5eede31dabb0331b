"""The policies' machine with brains that are faster than the store: they answer, decline or die before the start of
their turn is durable, or before it is sent, and stores that take long, take nothing, or take it and do not say so.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from soma.cognition.v1.cognition_service_pb2 import StartTurn, StopTurn, TurnText
from soma.common.v1.message_pb2 import Message, Part
from soma.router.v1.inbound_pb2 import InboundKind

from services.router.application.group import FenceLost, Group, GroupRejected, GroupResult, StoreLost
from services.router.application.items import CursorItem
from services.router.domain.arrival import Policy
from services.router.domain.partition import Cursor
from services.router.domain.turn import StepKind, TurnStatus
from tests.unit.router.builders import inbound
from tests.unit.router.test_policy_machine import (
    CALL,
    CONTROLS,
    INTERIM,
    PARTITION,
    POLICY_WEIGHTS,
    ROUNDS,
    SESSION,
    DurableStore,
    Owner,
    Policies,
)

KINDS = [StepKind.FINAL, StepKind.FINAL, StepKind.MODEL_REPLY, StepKind.INTERIM_REPLY]
FAILURES = ("fenced", "lost before", "lost after")
BESIDE = (PARTITION + 1) % 8
"""A partition of others."""


class FailingStore(DurableStore):
    """Does not take its next group, or takes it and does not say so."""

    fails: str = ""

    async def commit(self, group: Group) -> GroupResult:
        fails, self.fails = self.fails, ""
        if fails:
            await asyncio.sleep(0)
        if fails == "fenced":
            raise FenceLost(frozenset({PARTITION}))
        if fails == "lost before":
            raise StoreLost("not written")
        result = await super().commit(group)
        if fails:
            raise StoreLost("written")
        return result


class Ahead(Policies):
    """One session whose turns are given ahead."""

    store: FailingStore

    def __init__(self) -> None:
        super().__init__()
        self.said_ahead = 0
        self.declined: set[tuple[bytes, int]] = set()

    @initialize()
    def begin(self) -> None:
        async def work() -> None:
            self.store = FailingStore()
            self.owner = Owner(self.store)

        self.run(work())

    def held(self) -> StartTurn | None:
        """The turn that was given last, if its start is not durable as far as the brain can know."""
        brain = self.owner.brain
        if not brain.starts:
            return None
        start = brain.starts[-1]
        over = (start.turn_id, start.dispatch) in brain.stops or start.turn_id in self.store.turns
        return None if over or start.turn_id in self.owner.state.running else start

    @rule(kind=st.sampled_from(KINDS), texts=st.booleans(), rounds=ROUNDS)
    def the_brain_is_faster(self, kind: StepKind, texts: bool, rounds: int) -> None:
        async def work() -> None:
            if start := self.held():
                self.said_ahead += 1
                self._say(start, kind, texts)
            await self._pass(rounds)

        self.run(work())

    def _say(self, start: StartTurn, kind: StepKind, texts: bool) -> None:
        if texts:
            said = TurnText(turn_id=start.turn_id, dispatch=start.dispatch, step=1, offset=0, text="so far")
            self.owner.runner.on_texts(self.owner.brain, [said])
        seen = len(start.inputs)
        if kind is StepKind.FINAL:
            self.seen.setdefault(start.turn_id, []).append(seen)
            self.owner.propose(start, kind, 1, answer=Message(parts=[Part(text="answer")]), inputs_seen=seen)
        else:
            body = CALL if kind is StepKind.MODEL_REPLY else INTERIM
            self.owner.propose(start, kind, 1, body=body, inputs_seen=seen)

    @rule(really=st.sampled_from([True, False]), rounds=ROUNDS)
    def the_brain_declines(self, really: bool, rounds: int) -> None:
        async def work() -> None:
            start = self.held() or self._running()
            if really and start is not None:
                declined = StopTurn(turn_id=start.turn_id, dispatch=start.dispatch)
                self.declined.add((start.turn_id, start.dispatch))
                self.owner.runner.on_declined(self.owner.brain, [declined])
            await self._pass(rounds)

        self.run(work())

    @rule(which=st.integers(0, 100), rounds=ROUNDS)
    def a_message_comes_again(self, which: int, rounds: int) -> None:
        if not self.accepted:
            return

        async def work() -> None:
            again = [self.accepted[which % len(self.accepted)]]
            self.sent.append(again)
            self.owner.seq = len(self.sent) - 1
            self.owner.accept(*again)
            await self._pass(rounds)

        self.run(work())

    @rule(slow=st.sampled_from([0, 3, 10, 30]), apart=st.booleans(), waits=st.booleans())
    def the_store_changes(self, slow: int, apart: bool, waits: bool) -> None:
        def refuse(group: Group) -> BaseException | None:
            return GroupRejected("not together") if apart and group.messages and group.turns else None

        async def work() -> None:
            self.store.slow, self.store.refuse = slow, refuse
            self._open()
            if waits:
                self.store.gate = asyncio.Event()

        self.run(work())

    def _open(self) -> None:
        if self.store.gate is not None:
            self.store.gate.set()
            self.store.gate = None

    @rule(rounds=ROUNDS)
    def somebody_else_is_written(self, rounds: int) -> None:
        """What comes while a group is written that is about others is looked at before that group is done."""

        async def work() -> None:
            partition = self.owner.state.partitions.get(BESIDE)
            if partition is not None:
                cursor = Cursor(partition.cursor.stream, partition.cursor.seq + 1, "b")
                self.owner.committer.put(CursorItem(partition, cursor))
            await self._pass(rounds)

        self.run(work())

    @rule(how=st.sampled_from([*FAILURES, *[""] * 3]), rounds=ROUNDS)
    def the_store_fails(self, how: str, rounds: int) -> None:
        """The former owner, which lives, has no turn with a brain once it knows."""
        if not how:
            return

        async def work() -> None:
            self.store.fails = how
            await self._pass(rounds)
            self._open()
            await self._pass(30)
            self.store.fails = ""
            if PARTITION not in self.owner.state.partitions:
                assert self.owner.brain.credit == 100
                assert self.owner.state.running == {}
            await self._take_over()

        self.run(work())

    async def _take_over(self) -> None:
        self._open()
        await super()._take_over()

    def teardown(self) -> None:
        """The last owner comes to an end by itself, before another takes over what it may have forgotten."""
        if hasattr(self, "store"):
            try:
                self.run(self._settle())
            except BaseException:
                self.runner.close()
                raise
        super().teardown()

    async def _settle(self) -> None:
        self.store.slow, self.store.refuse = 0, lambda _: None
        self._open()
        resume = inbound(SESSION, "control at rest", b"")
        resume.kind = InboundKind.INBOUND_KIND_RESUME
        self.sent.append([resume])
        self.owner.seq = len(self.sent) - 1
        self.owner.accept(resume)
        for _ in range(4000):
            start = self._running()
            turn = self.owner.state.running.get(start.turn_id) if start is not None else None
            if start is not None and turn is not None and turn.status is TurnStatus.RUNNING:
                kind = StepKind.TOOL_RESULTS if int(turn.state) == 3 else StepKind.FINAL
                self._propose(start, kind, turn.step_count + 1, len(turn.inputs))
            await self._pass(30)
            if not self.store.load():
                break
            await asyncio.sleep(0.001)
        assert not self.store.load(), "the owner goes on by itself"
        brain = self.owner.brain
        assert brain.credit == 100
        heard = {(turn, dispatch) for turn, dispatch, _ in brain.confirms} | set(brain.stops) | self.declined
        assert {(start.turn_id, start.dispatch) for start in brain.starts} <= heard, "a brain runs it for nobody"

    def outcomes_of_all(self) -> None:
        super().outcomes_of_all()
        assert self.owner.brain.credit == 100
        assert self.owner.state.scheduler.running == 0


WALKS, STEPS = 100, 80
DEEDS = {
    "message": 30, "brain": 40, "again": 6, "decline": 3, "control": 4, "death": 3, "undo": 2, "store": 16,
    "failure": 2, "takeover": 1, "others": 20,
}  # fmt: skip


@pytest.mark.parametrize("walk", range(WALKS))
def test_a_long_walk(walk: int) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    story = Ahead()
    story.begin()
    try:
        for _ in range(STEPS):
            _step(story, chance)
            if story.held():
                _something_ahead(story, chance)
            story.outcomes_are_right_so_far()
    except BaseException:
        print(f"seed {seed}")
        story.runner.close()
        raise
    story.teardown()
    print(f"seed {seed}, {story.said_ahead} said ahead")


def _something_ahead(story: Ahead, chance: random.Random) -> None:
    match chance.choices(["says", "dies", "declines", ""], [60, 15, 5, 20]):
        case ["says"]:
            story.the_brain_is_faster(chance.choice(KINDS), chance.random() < 0.5, chance.choice([0, 1, 30]))
        case ["dies"]:
            story.the_brain_dies(True)
        case ["declines"]:
            story.the_brain_declines(True, chance.choice([0, 1, 30]))


def _step(story: Ahead, chance: random.Random) -> None:
    rounds = chance.choice([0, 1, 2, 3, 4, 30])
    kind = chance.choice(KINDS)
    match chance.choices(list(DEEDS), list(DEEDS.values())):
        case ["message"]:
            story.messages_come(chance.choices(list(Policy), POLICY_WEIGHTS, k=chance.randint(1, 3)), rounds)
        case ["brain"]:
            story.the_brain_goes_on(kind, chance.random() < 0.3, rounds)
        case ["again"]:
            story.a_message_comes_again(chance.choice([0, chance.randint(0, 100)]), rounds)
        case ["decline"]:
            story.the_brain_declines(True, rounds)
        case ["control"]:
            story.somebody_controls(chance.choice([*CONTROLS, *CONTROLS[-1:] * 3]), chance.random() < 0.5, rounds)
        case ["death"]:
            story.the_brain_dies(True)
        case ["undo"]:
            story.tools_can_or_cannot_be_undone(chance.random() < 0.5)
        case ["store"]:
            story.the_store_changes(chance.choice([0, 3, 10, 30]), chance.random() < 0.2, chance.random() < 0.4)
        case ["others"]:
            story.somebody_else_is_written(chance.choice([2, 3]))
        case ["failure"]:
            story.the_store_fails(chance.choice(FAILURES), rounds)
        case _:
            story.another_router_takes_over(chance.randint(0, 4))


Ahead.TestCase.settings = settings(Policies.TestCase.settings)
TestAhead = Ahead.TestCase
