"""The turn engine in memory: real ingest, scheduler, runner and committer; a mailbox, brains and tools that a test
plays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

from google.protobuf.message import Message as ProtoMessage
from soma.cognition.v1.cognition_service_pb2 import Proposal, StartTurn
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import Delivery, FinalMessage, StepBody
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec
from soma.controlplane.v1.tenant_service_pb2 import Tenant
from soma.router.v1.inbound_pb2 import InBatch, Inbound

from services.router.application.brains import BrainPool
from services.router.application.commit_group import GroupCommitter
from services.router.application.group import Group, GroupResult, SessionFacts, TurnConflict
from services.router.application.ingest_messages import Ingest
from services.router.application.items import KEY_REUSED
from services.router.application.outcomes import EndItem, RefusalItem
from services.router.application.run_turns import TurnRunner
from services.router.application.state import RouterState
from services.router.domain.turn import Outcome, StepKind
from soma_common.layout import BATCH_FORMAT, LaneLayout
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import TENANT, a_partition


class MemoryStore:
    """Does to dictionaries what router.commit_group does to tables, as far as the engine can tell."""

    def __init__(self) -> None:
        self.messages: dict[tuple[bytes, bytes], tuple[int, int]] = {}
        self.hashes: dict[bytes, bytes] = {}
        self.turns: dict[bytes, str] = {}
        self.steps: dict[tuple[bytes, int], bytes] = {}
        self.refused: dict[int, bytes] = {}
        self.last_inputs: dict[bytes, int] = {}
        self.stops: dict[bytes, int] = {}
        self.paused: bool | None = None
        self.refuse: Callable[[Group], BaseException | None] = lambda _: None
        self.gate: asyncio.Event | None = None
        self.groups = 0

    async def commit(self, group: Group) -> GroupResult:
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        error = self.refuse(group)
        if error is not None:
            raise error
        before = [dict(table) for table in self._tables]
        try:
            result = self._store(group)
        except TurnConflict:
            for table, rows in zip(self._tables, before, strict=True):
                table.clear()
                table.update(rows)
            raise
        self.groups += 1
        return result

    @property
    def _tables(self) -> list[dict[Any, Any]]:
        return [self.messages, self.hashes, self.turns, self.steps, self.refused, self.last_inputs, self.stops]

    def _store(self, group: Group) -> GroupResult:
        result = self._store_messages(group)
        started = self._start_turns(group, result)
        self._control(group)
        for turn, _, partition, *_ in group.ends:
            if self.turns.get(turn) != "running":
                raise TurnConflict(frozenset({partition}))
            self.turns[turn] = "ended"
        for turn, step, _, _, _, body in group.steps:
            assert (turn, step) not in self.steps, "a step is journaled once"
            self.steps[turn, step] = body
        return replace(result, started=started)

    def _store_messages(self, group: Group) -> GroupResult:
        inserted, reused, sessions = set(), set(), {}
        for row in group.messages:
            partition, position, session, message, digest, *_ = row
            fault = row[9]
            if (message, digest) in self.messages:
                continue
            if self.hashes.setdefault(message, digest) != digest:
                fault = KEY_REUSED
            self.messages[message, digest] = (partition, position)
            inserted.add((partition, position))
            sessions[session] = SessionFacts(0, 0, 0)
            if fault == KEY_REUSED:
                reused.add((partition, position))
        return GroupResult(frozenset(inserted), frozenset(reused), sessions, frozenset())

    def _start_turns(self, group: Group, stored: GroupResult) -> frozenset[bytes]:
        started = set()
        for turn, _, partition, _, _, first, last, _, fresh in group.turns:
            if fresh and ((partition, first) not in stored.inserted or (partition, first) in stored.reused):
                continue
            assert turn not in self.turns, "a turn id is used once"
            self.turns[turn] = "running"
            self.last_inputs[turn] = last
            started.add(turn)
        return frozenset(started)

    def _control(self, group: Group) -> None:
        for _, _, turn, stop, paused in group.controls:
            if turn is not None and self.turns.get(turn) == "running":
                self.stops.setdefault(turn, stop)
            if paused is not None:
                self.paused = paused
        for turn, last in group.inputs:
            assert self.turns[turn] == "running", "only a running turn takes further inputs"
            self.last_inputs[turn] = last
        for turn, _, _, _, position, _, body in group.refusals:
            assert turn not in self.turns, "a turn id is used once"
            self.turns[turn] = "ended"
            self.refused[position] = body


class Brain:
    """A link to a brain; what it was told."""

    def __init__(self, credit: int = 100, name: str = "brain-0") -> None:
        self.brain = name
        self.credit = credit
        self.starts: list[StartTurn] = []
        self.confirms: list[tuple[bytes, int, int]] = []
        self.stops: list[tuple[bytes, int]] = []
        self.added: list[tuple[bytes, int, list[bytes]]] = []

    def add_inputs(self, turn_id: bytes, dispatch: int, first: int, inputs: list[bytes]) -> None:
        self.added.append((turn_id, first, inputs))

    def start(self, start: StartTurn) -> None:
        self.starts.append(start)

    def confirm(self, turn_id: bytes, dispatch: int, step: int) -> None:
        self.confirms.append((turn_id, dispatch, step))

    def confirm_end(self, turn_id: bytes, dispatch: int, step: int) -> None:
        self.confirms.append((turn_id, dispatch, step))

    def stop(self, turn_id: bytes, dispatch: int) -> None:
        self.stops.append((turn_id, dispatch))


class Directory:
    """One agent for everybody."""

    def __init__(self) -> None:
        self.has_agent = True
        self.spec = AgentSpec()

    def tenant(self, tenant: str) -> Tenant | None:
        return Tenant(name=f"tenants/{tenant}")

    def agent(self, tenant: str, agent: str) -> Agent | None:
        return _agent(tenant, agent, self.spec) if self.has_agent else None


def _agent(tenant: str, agent: str, spec: AgentSpec) -> Agent:
    return Agent(name=f"tenants/{tenant}/agents/{agent}", revision="r1", spec=spec)


class Live:
    """What watchers are told, in order: the event, its turn, and what else there is to say."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda turn, *more: self.events.append((name, turn.id, *more))


class Engine:
    """Eight partitions, all ours, and one brain."""

    def __init__(self, max_strikes: int = 3, *, start_ahead: bool = True) -> None:
        self.store, self.directory, self.brain = MemoryStore(), Directory(), Brain()
        self.state = RouterState(LaneLayout(8, 1), cast(Any, self.directory), 100, 100)
        self.tasks: set[asyncio.Task[None]] = set()
        self.ended: list[EndItem | RefusalItem] = []
        self.settled: list[bytes] = []
        self.tools_away = False
        self.undone: list[bytes] = []
        self.may_undo = True
        self.brains = BrainPool()
        self.live = Live()
        self.runner = TurnRunner(
            self.state, self.brains, cast(Any, self), cast(Any, self), cast(Any, self.live), self.spawn,
            self.ended.append, max_strikes=max_strikes, stuck_margin_s=5.0, convergence_timeout_s=5.0,
            start_ahead=start_ahead,
        )  # fmt: skip
        self.ingest = Ingest(self.state, self.runner)
        self.committer = GroupCommitter(
            self.store,
            self.ingest.compose,
            self.end_fenced,
            self.end_all,
            self.runner.group_sent,
            self.ingest.look_ahead,
        )
        self.runner.use(self.committer)
        self.ingest.committer = self.committer
        self.seq = 0
        for number in range(8):
            partition = self.state.partitions[number] = a_partition(number)
            partition.attached = True
        self.connect(self.brain)

    # ---- ports

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def end_fenced(self, numbers: frozenset[int]) -> None:
        for number in numbers:
            partition = self.state.partitions.get(number)
            if partition is not None:
                self.runner.end_terms(self.state.forget_partition(partition))

    def end_all(self) -> None:
        self.end_fenced(frozenset(self.state.partitions))

    async def context(self, tenant: str, session_id: bytes, limit: int) -> list[bytes]:
        return []

    async def settle(
        self, tenant: str, turn_id: bytes, step: int, reply: bytes, key: tuple[str, str, str], wait_s: float
    ) -> bytes:
        self.settled.append(reply)
        if self.tools_away:
            raise ConnectionError("away")
        return b"settled"

    def unknown(self, reply: bytes) -> bytes:
        return b"unknown"

    async def undo(self, tenant: str, turn_id: bytes, key: tuple[str, str, str]) -> bool:
        self.undone.append(turn_id)
        return self.may_undo

    async def contents(self, tenant: str, partition: int, positions: list[int]) -> dict[int, bytes]:
        return dict.fromkeys(positions, b"loaded")

    # ---- what happens

    def connect(self, brain: Brain) -> None:
        """A brain comes."""
        self.brains.add(cast(Any, brain))
        if hasattr(self, "committer"):
            self.runner.assign()

    def disconnect(self, brain: Brain) -> None:
        """A brain is gone."""
        self.runner.on_link_down(cast(Any, brain))

    def accept(self, *items: Inbound) -> None:
        """A batch comes by the lane."""
        self.seq += 1
        batch = InBatch(format=BATCH_FORMAT, tenant=TENANT, items=items)
        self.ingest.on_message(0, TENANT, "stream", self.seq, f"b{self.seq}", batch.SerializeToString())

    def propose(
        self, start: StartTurn, kind: StepKind, step: int, *, answer: ProtoMessage | None = None,
        brain: Brain | None = None, inputs_seen: int = 1, body: bytes = b"",
    ) -> None:  # fmt: skip
        """The brain proposes a step of a turn it was told to start."""
        proposal = Proposal(
            turn_id=start.turn_id,
            dispatch=start.dispatch,
            step=step,
            kind=cast(Any, int(kind)),
            body=body or StepBody(format=1, final=FinalMessage()).SerializeToString(),
            inputs_seen=inputs_seen,
            answer=answer.SerializeToString() if answer is not None else b"",
        )
        self.runner.on_proposals(cast(Any, brain or self.brain), [proposal])

    def answer(self, start: StartTurn, text: str, step: int = 1, *, brain: Brain | None = None) -> None:
        """The brain proposes the final message."""
        self.propose(start, StepKind.FINAL, step, answer=Message(parts=[Part(text=text)]), brain=brain)

    async def started(self, count: int, brain: Brain | None = None) -> list[StartTurn]:
        """Waits until a brain was told to start so many turns in all."""
        starts = (brain or self.brain).starts
        await eventually(lambda: len(starts) >= count, what=f"{count} starts, there are {len(starts)}")
        return starts

    async def outcomes(self, count: int) -> list[tuple[Outcome, Delivery]]:
        """Waits until so many turns have ended in all."""
        await eventually(lambda: len(self.ended) >= count, what=f"{count} ends")
        return [(Outcome(item.answer.outcome), item.answer) for item in self.ended]

    async def quiet(self) -> None:
        """Waits until nothing happens any more by itself."""
        calm = 0
        async with asyncio.timeout(10.0):
            while calm < 50:
                await asyncio.sleep(0.002)
                calm = 0 if len(self.committer) else calm + 1


@asynccontextmanager
async def running_engine(max_strikes: int = 3, *, start_ahead: bool = True) -> AsyncIterator[Engine]:
    """An engine whose committer runs."""
    engine = Engine(max_strikes, start_ahead=start_ahead)
    committing = asyncio.create_task(engine.committer.run())
    try:
        yield engine
        assert not committing.done(), committing
    finally:
        for task in [committing, *engine.tasks]:
            task.cancel()
        await asyncio.gather(committing, *engine.tasks, return_exceptions=True)
