"""Every policy and control in any order, with brains and owners that die at any moment: each accepted message has one
outcome, in order, and what was decided in memory is decided again from what is stored.

The engine is the real one. The store does to dictionaries what the tables do, and outlives its owners.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
from google.protobuf.message import Message as ProtoMessage
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from soma.cognition.v1.cognition_service_pb2 import StartTurn
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import Delivery, ModelReply, StepBody, ToolCall, ToolResult, ToolResults
from soma.controlplane.v1.agent_service_pb2 import AgentSpec
from soma.router.v1.inbound_pb2 import Inbound, InboundKind

from services.router.application.group import Group, GroupResult, SessionFacts
from services.router.application.ports import PendingRow
from services.router.application.restore_sessions import Found, restore_sessions
from services.router.domain.arrival import MAX_INPUTS, Policy
from services.router.domain.partition import Cursor
from services.router.domain.turn import Outcome, StepKind, TurnStatus
from soma_common import ids
from tests.unit.router.builders import AGENT, CHANNEL, TENANT, a_partition, inbound
from tests.unit.router.engine import Brain, Engine, MemoryStore

SESSION = "s"
ID = ids.session_id(TENANT, AGENT, CHANNEL, SESSION)
PARTITION = ids.partition_of(ID, 8)
DEBOUNCE_MS = 20
ROUNDS = st.sampled_from([0, 1, 2, 3, 4, 30])
"""Of the event loop that pass before the next thing happens: a group is written in a few."""
CONTROLS = (
    InboundKind.INBOUND_KIND_CANCEL, InboundKind.INBOUND_KIND_INTERRUPT, InboundKind.INBOUND_KIND_CANCEL_ALL,
    InboundKind.INBOUND_KIND_PAUSE, InboundKind.INBOUND_KIND_RESUME,
)  # fmt: skip


@dataclass(slots=True)
class MessageRow:
    position: int
    message_id: bytes
    kind: int
    policy: int
    deliver: bool
    target: bytes | None
    content: bytes
    debounce_ms: int
    debounce_max_ms: int
    at: int
    """Number of the group that stored it: the clock of this database."""


@dataclass(slots=True)
class StoredTurn:
    turn_id: bytes
    number: int
    first: int
    last: int
    at: int
    status: int = 1
    outcome: int = 0
    stop: int = 0
    dispatch: int = 1


class DurableStore(MemoryStore):
    """One session's rows, as router.commit_group writes them and router.load_partition reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.mail: dict[int, MessageRow] = {}
        self.stored_turns: list[StoredTurn] = []
        self.deliveries: list[Delivery] = []
        self.done = self.control = self.turn_count = self.delivery_count = 0
        self.is_paused = False
        self.head = self.mail_head = 0
        self.cursor = Cursor()
        self.slow = 0
        """Rounds of the event loop that a commit takes longer: what may happen meanwhile is as much as the disk."""
        self.term: object = None
        """Who may write."""

    async def commit(self, group: Group) -> GroupResult:
        moves = list(group.moves.values())
        if any(move.partition.id == PARTITION and move.partition.term != self.term for move in moves):
            await asyncio.sleep(3600)  # a former owner never hears of its commit
        for _ in range(self.slow):
            await asyncio.sleep(0)
        result = await super().commit(group)
        for move in moves:
            if move.partition.id == PARTITION:
                self.head, self.mail_head, self.cursor = move.head, move.mail_head, move.cursor
        for row in group.messages:
            if (row[0], row[1]) in result.inserted:
                kept = (row[1], row[3], row[6], row[7], row[8], row[11], row[13], row[17], row[18], self.groups)
                self.mail[cast(int, row[1])] = MessageRow(*cast(Any, kept))
        self._turns(group, result)
        self.deliveries += [Delivery.FromString(row[5]) for row in group.deliveries]
        facts = SessionFacts(self.turn_count, self.delivery_count, self.done, self.is_paused)
        sessions = dict.fromkeys(result.sessions, facts)
        return GroupResult(result.inserted, result.reused, sessions, result.started)

    def _turns(self, group: Group, result: GroupResult) -> None:
        for row in group.turns:
            if row[0] in result.started:
                self.stored_turns.append(StoredTurn(row[0], row[4], row[5], row[6], self.groups))
        for turn_id, dispatch, *_ in group.dispatches:
            self._turn(turn_id).dispatch = cast(int, dispatch)
        for _, position, turn_id, stop, paused in group.controls:
            self.control = max(self.control, cast(int, position))
            self.is_paused = self.is_paused if paused is None else bool(paused)
            turn = next((turn for turn in self.stored_turns if turn.turn_id == turn_id), None)
            if turn is not None and (turn.status == 1 or (turn.status == 2 and turn.stop == 6 and stop == 4)):
                turn.status, turn.stop = 2, cast(int, stop)
        for turn_id, last in group.inputs:
            turn = self._turn(turn_id)
            turn.last = max(turn.last, cast(int, last))
        for turn_id, _, _, _, position, deliveries, _ in group.refusals:
            refused = StoredTurn(
                cast(bytes, turn_id), -cast(int, position), cast(int, position), cast(int, position), 0
            )
            refused.status, refused.outcome = 3, int(Outcome.REJECTED)
            self.stored_turns.append(refused)
            self.delivery_count = max(self.delivery_count, cast(int, deliveries))
        for turn_id, _, _, outcome, _, _, done, number, deliveries in group.ends:
            turn = self._turn(turn_id)
            assert turn.status != 3
            assert number == turn.number == self.turn_count + 1, "turns are numbered without gaps"
            assert cast(int, done) >= self.done
            turn.status, turn.outcome = 3, cast(int, outcome)
            self.done, self.turn_count = cast(int, done), turn.number
            self.delivery_count = max(self.delivery_count, cast(int, deliveries))

    def _turn(self, turn_id: object) -> StoredTurn:
        return next(turn for turn in self.stored_turns if turn.turn_id == turn_id)

    def _numbered(self, number: int) -> StoredTurn | None:
        return next((turn for turn in self.stored_turns if turn.number == number), None)

    def load(self) -> list[PendingRow]:
        """What a new owner gets to know; the dispatch of the running turn is raised."""
        running = self._numbered(self.turn_count + 1)
        if running is not None and running.status == 3:
            running = None
        if running is not None:
            running.dispatch += 1
        before = self._numbered(self.turn_count)
        rows = []
        for row in sorted(self.mail.values(), key=lambda row: row.position):
            waits = row.kind < 2 and row.position > self.done and self._numbered(-row.position) is None
            if not waits and not (row.kind >= 2 and row.position > self.control):
                continue
            dropped = before is not None and before.outcome == 6 and before.first <= row.position <= before.last
            turn: Sequence[Any] = (None,) * 7
            if running is not None:
                turn = (running.turn_id, running.status, running.dispatch, 0, running.first, running.last, "r1")
            later = running is not None and row.at >= running.at
            message = (row.position, row.message_id, row.kind, row.deliver, 0, row.target, "")
            session = (ID, TENANT, AGENT, CHANNEL, SESSION, self.turn_count, self.delivery_count)
            policy = (row.policy, row.debounce_ms, row.debounce_max_ms, 0)
            stop = (self.is_paused, running.stop if running else None, 0, dropped, later)
            columns: tuple[Any, ...] = (*message, *session, *turn, *policy, *stop)
            rows.append(PendingRow(*columns))
        return rows


class Owner(Engine):
    """A router that has taken the partition from whoever had it."""

    def __init__(self, store: DurableStore) -> None:
        super().__init__(max_strikes=1000)
        self.store = self.committer._writer = store
        self.directory.spec = AgentSpec(debounce_ms=DEBOUNCE_MS, debounce_max_ms=DEBOUNCE_MS)
        partition = self.state.partitions[PARTITION] = a_partition(PARTITION)
        partition.attached = True
        partition.head, partition.mail_head, partition.cursor = store.head, store.mail_head, store.cursor
        partition.read_seq = store.cursor.seq
        store.term = partition.term
        self.committing = asyncio.get_running_loop().create_task(self.committer.run())
        rows = store.load()
        for row in rows:
            partition.pending.add(row.position)
        found = Found()
        found.add(rows)
        for _ in restore_sessions(self.state, self.runner, partition, found):
            pass

    async def contents(self, tenant: str, partition: int, positions: list[int]) -> dict[int, bytes]:
        store = cast(DurableStore, self.store)
        return {position: store.mail[position].content for position in positions}

    async def agent_spec(self, tenant: str, agent: str, revision: str) -> bytes:
        return AgentSpec().SerializeToString()

    async def journal(self, tenant: str, turn_id: bytes) -> list[tuple[int, bytes]]:
        found = sorted((step, body) for (turn, step), body in self.store.steps.items() if turn == turn_id)
        return [(_kind(body), body) for _, body in found]

    async def settle(self, *args: Any) -> bytes:
        return RESULTS

    def unknown(self, reply: bytes) -> bytes:
        return RESULTS

    async def stop(self) -> None:
        """It is killed: whatever it was about to do does not happen."""
        tasks = [self.committing, *self.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


CALL = StepBody(format=1, model_reply=ModelReply(tool_calls=[ToolCall(tool="t")])).SerializeToString()
RESULTS = StepBody(format=1, tool_results=ToolResults(results=[ToolResult(tool="t")])).SerializeToString()
INTERIM = StepBody(format=1, model_reply=ModelReply(text="so far")).SerializeToString()


def _kind(body: bytes) -> int:
    step = StepBody.FromString(body)
    if step.HasField("model_reply"):
        return StepKind.MODEL_REPLY if step.model_reply.tool_calls else StepKind.INTERIM_REPLY
    if step.HasField("tool_results"):
        return StepKind.TOOL_RESULTS
    return StepKind.FAILURE if step.HasField("failure") else StepKind.FINAL


class Policies(RuleBasedStateMachine):
    """One session, whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.accepted: list[Inbound] = []
        self.policies: dict[bytes, Policy] = {}
        self.sent: list[list[Inbound]] = []
        self.seen: dict[bytes, list[int]] = {}
        """How many inputs the finals had seen that brains proposed, by turn."""

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self.runner.run(work)

    @initialize()
    def begin(self) -> None:
        async def work() -> None:
            self.store = DurableStore()
            self.owner = Owner(self.store)

        self.run(work())

    @rule(policies=st.lists(st.sampled_from(Policy), min_size=1, max_size=4), rounds=ROUNDS)
    def messages_come(self, policies: list[Policy], rounds: int) -> None:
        batch = []
        for policy in policies:
            key = str(len(self.policies))
            item = inbound(SESSION, key, Message(parts=[Part(text=key)]).SerializeToString())
            item.policy = policy.value  # type: ignore[assignment]
            self.policies[item.message_id] = policy
            batch.append(item)
        self._accept(batch, rounds)

    @rule(
        kind=st.sampled_from([*CONTROLS, *[InboundKind.INBOUND_KIND_RESUME] * 3, *[None] * 16]),
        named=st.booleans(),
        rounds=ROUNDS,
    )
    def somebody_controls(self, kind: InboundKind.ValueType | None, named: bool, rounds: int) -> None:
        if kind is None:
            return
        item = inbound(SESSION, f"control {len(self.sent)}", b"")
        item.kind = kind
        if named and self.accepted:
            item.cancel_turn_id = ids.turn_id(ID, self.accepted[-1].message_id)
        self._accept([item], rounds)

    def _accept(self, batch: list[Inbound], rounds: int) -> None:
        self.sent.append(batch)
        self.accepted += [item for item in batch if item.kind == InboundKind.INBOUND_KIND_MESSAGE]

        async def work() -> None:
            self.owner.seq = len(self.sent) - 1
            self.owner.accept(*batch)
            await self._pass(rounds)

        self.run(work())

    @rule(
        kind=st.sampled_from([StepKind.FINAL, StepKind.FINAL, StepKind.MODEL_REPLY, StepKind.INTERIM_REPLY]),
        blind=st.booleans(),
        rounds=ROUNDS,
    )
    def the_brain_goes_on(self, kind: StepKind, blind: bool, rounds: int) -> None:
        async def work() -> None:
            start, turn = self._running(), None
            if start is not None:
                turn = self.owner.state.running.get(start.turn_id)
            if start is not None and turn is not None and int(turn.state) == 3:
                self._propose(start, StepKind.TOOL_RESULTS, turn.step_count + 1, 0)
            elif start is not None and turn is not None:
                # A final may be proposed by a brain that has not heard of the newest inputs.
                self._propose(start, kind, turn.step_count + 1, len(start.inputs) if blind else len(turn.inputs))
            await self._pass(rounds)

        self.run(work())

    def _propose(self, start: StartTurn, kind: StepKind, step: int, seen: int) -> None:
        if kind is StepKind.FINAL:
            answer: ProtoMessage = Message(parts=[Part(text="answer")])
            self.seen.setdefault(start.turn_id, []).append(seen)
            self.owner.propose(start, kind, step, answer=answer, inputs_seen=seen)
            return
        body = {StepKind.MODEL_REPLY: CALL, StepKind.TOOL_RESULTS: RESULTS, StepKind.INTERIM_REPLY: INTERIM}[kind]
        turn = self.owner.state.running[start.turn_id]
        legal = {(2, StepKind.MODEL_REPLY), (4, StepKind.MODEL_REPLY), (3, StepKind.TOOL_RESULTS)}
        legal |= {(2, StepKind.INTERIM_REPLY), (4, StepKind.INTERIM_REPLY)}
        if (int(turn.state), kind) in legal:
            self.owner.propose(start, kind, step, body=body, inputs_seen=seen)

    def _running(self) -> StartTurn | None:
        starts = self.owner.brain.starts
        return starts[-1] if starts and starts[-1].turn_id in self.owner.state.running else None

    @rule(really=st.sampled_from([True, False, False]))
    def the_brain_dies(self, really: bool) -> None:
        if not really:
            return

        async def work() -> None:
            self.owner.disconnect(self.owner.brain)
            self.owner.brain = Brain(name="another")
            self.owner.connect(self.owner.brain)
            await self._pass(30)

        self.run(work())

    @rule(undo=st.booleans())
    def tools_can_or_cannot_be_undone(self, undo: bool) -> None:
        self.owner.may_undo = undo

    @rule()
    def time_passes(self) -> None:
        async def work() -> None:
            await asyncio.sleep(DEBOUNCE_MS / 1000)
            await self._pass(30)

        self.run(work())

    @rule(written=st.integers(0, 20))
    def another_router_takes_over(self, written: int) -> None:
        """What the former owner had in flight is committed, or it is not; then the lane is read from the cursor."""
        if written > 4:
            return

        async def work() -> None:
            await self._pass(written)
            await self._take_over()

        self.run(work())

    async def _take_over(self) -> None:
        await self.owner.stop()
        self.owner = Owner(self.store)
        for seq in range(self.store.cursor.seq, len(self.sent)):
            self.owner.seq = seq
            self.owner.accept(*self.sent[seq])
        await self._pass(30)

    async def _pass(self, rounds: int) -> None:
        for _ in range(rounds):
            await asyncio.sleep(0)

    @invariant()
    def outcomes_are_right_so_far(self) -> None:
        if not hasattr(self, "store"):
            return
        assert not self.owner.committing.done(), self.owner.committing
        positions = [delivery.position for delivery in self.store.deliveries]
        assert positions == list(range(1, len(positions) + 1))
        answered = [message_id for delivery in self.store.deliveries for message_id in delivery.message_ids]
        assert len(answered) == len(set(answered)), "no message has two outcomes"
        in_order = []
        for delivery in self.store.deliveries:
            assert 1 <= len(delivery.message_ids) <= MAX_INPUTS
            assert int(delivery.outcome) != Outcome.ABSORBED
            if int(delivery.outcome) == Outcome.REJECTED:
                assert [self.policies[id_] for id_ in delivery.message_ids] == [Policy.REJECT]
            else:
                in_order += list(delivery.message_ids)
            if int(delivery.outcome) == Outcome.FINAL:
                assert max(self.seen[delivery.turn_id]) >= len(delivery.message_ids), "answered and not read"
        mine = set(in_order)
        assert in_order == [item.message_id for item in self.accepted if item.message_id in mine], "out of order"

    def teardown(self) -> None:
        """Nobody disturbs any more: everything accepted has its outcome, and nothing is left."""
        if not hasattr(self, "store"):
            self.runner.close()
            return

        async def work() -> None:
            resume = inbound(SESSION, "control at last", b"")
            resume.kind = InboundKind.INBOUND_KIND_RESUME
            self.sent.append([resume])
            await self._take_over()
            for _ in range(400):
                start = self._running()
                turn = self.owner.state.running.get(start.turn_id) if start is not None else None
                if start is not None and turn is not None and turn.status is TurnStatus.RUNNING:
                    kind = StepKind.TOOL_RESULTS if int(turn.state) == 3 else StepKind.FINAL
                    self._propose(start, kind, turn.step_count + 1, len(turn.inputs))
                await self._pass(10)
                await asyncio.sleep(0.001)
                if not self.store.load():
                    break
            await self.owner.stop()

        try:
            self.run(work())
            self.outcomes_of_all()
        finally:
            self.runner.close()

    def outcomes_of_all(self) -> None:
        answered = {message_id for delivery in self.store.deliveries for message_id in delivery.message_ids}
        missing = [item for item in self.accepted if item.message_id not in answered]
        assert not missing, f"{len(missing)} messages without an outcome, {self.store.stored_turns}"
        assert self.store.load() == []
        assert not self.owner.state.partitions[PARTITION].pending


WALKS, STEPS = 100, 60
DEEDS = {"message": 30, "brain": 40, "control": 6, "death": 2, "undo": 2, "time": 3, "takeover": 3}
POLICY_WEIGHTS = (3, 2, 6, 1, 1, 1)


@pytest.mark.parametrize("walk", range(WALKS))
def test_a_long_walk(walk: int) -> None:
    """The same steps, weighted so that turns mostly run and get somewhere; hypothesis is better at short stories."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    story = Policies()
    story.begin()
    try:
        for _ in range(STEPS):
            rounds = chance.choice([0, 1, 2, 3, 4, 30])
            story.store.slow = chance.choice([0, 1, 3])
            match chance.choices(list(DEEDS), list(DEEDS.values())):
                case ["message"]:
                    policies = chance.choices(list(Policy), POLICY_WEIGHTS, k=chance.randint(1, 3))
                    story.messages_come(policies, rounds)
                case ["brain"]:
                    kind = chance.choice([StepKind.FINAL, StepKind.FINAL, StepKind.MODEL_REPLY, StepKind.INTERIM_REPLY])
                    story.the_brain_goes_on(kind, chance.random() < 0.3, rounds)
                case ["control"]:
                    kinds = (*CONTROLS, *[InboundKind.INBOUND_KIND_RESUME] * 3)
                    story.somebody_controls(chance.choice(kinds), chance.random() < 0.5, rounds)
                case ["death"]:
                    story.the_brain_dies(True)
                case ["undo"]:
                    story.tools_can_or_cannot_be_undone(chance.random() < 0.5)
                case ["time"]:
                    story.time_passes()
                case _:
                    story.another_router_takes_over(chance.randint(0, 4))
            story.outcomes_are_right_so_far()
    except BaseException:
        print(f"seed {seed}")
        story.runner.close()
        raise
    story.teardown()


Policies.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestPolicies = Policies.TestCase
