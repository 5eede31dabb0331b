"""Sessions of several partitions, one router and a store whose door is shut at random: messages, retries, keys used
again and controls come, brains answer, decline and die, partitions are lost and groups are refused, in any order.

What came before the walk is in memory, so that most turns can be one commit. A partition that is lost is lost for good:
what was accepted for it may stay without an outcome, and must never have two.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import pytest
from soma.cognition.v1.cognition_service_pb2 import StartTurn, StopTurn, TurnText
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import Delivery, ModelReply, StepBody
from soma.router.v1.inbound_pb2 import Inbound, InboundKind

from services.router.application.group import FenceLost, Group, GroupRejected, GroupResult, StoreLost
from services.router.application.items import CursorItem
from services.router.domain.partition import Cursor
from services.router.domain.turn import Outcome, StepKind
from soma_common import ids
from tests.unit.router.builders import PARTITIONS, inbound, names_in
from tests.unit.router.engine import Brain, Engine, MemoryStore

SESSIONS = [name for number in range(6) for name in names_in(number, 2)]
IDLE = 7
"""A partition without sessions."""
OLD = 18
"""Messages of each session before the walk: more than a session in memory remembers."""
CREDIT = 4
POISON = 0.02
"""Share of messages that the database does not take."""
INTERIM = StepBody(format=1, model_reply=ModelReply(text="so far")).SerializeToString()
CONTROLS = [
    InboundKind.INBOUND_KIND_CANCEL, InboundKind.INBOUND_KIND_INTERRUPT, InboundKind.INBOUND_KIND_CANCEL_ALL,
    InboundKind.INBOUND_KIND_PAUSE, InboundKind.INBOUND_KIND_RESUME,
]  # fmt: skip


class Store(MemoryStore):
    """Keeps what it was given to deliver, and is shut, fails and refuses as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.deliveries: list[tuple[int, bytes, Delivery]] = []
        """(partition, session, outcome), in the order in which they were written."""
        self.numbers: defaultdict[bytes, list[int]] = defaultdict(list)
        """Of the turns of each session, as they ended."""
        self.given: set[tuple[bytes, int]] = set()
        """Every (turn, dispatch) that was given to a brain."""
        self.wrong: list[str] = []
        """What a brain must not be told."""
        self.one_commit = 0
        """Turns whose message, start and end were in one group."""
        self.fails: list[BaseException] = []
        self.poison: set[bytes] = set()
        """Messages that the database does not take."""
        self.apart = False
        self.refuse = self._refusal

    def _refusal(self, group: Group) -> BaseException | None:
        if self.fails:
            error = self.fails.pop()
            rows = len(group.messages) + len(group.turns) + len(group.ends)
            # What is refused alone is refused for good: that is for what is poison.
            if rows > 1 or not isinstance(error, GroupRejected):
                return error
        if any(row[3] in self.poison for row in group.messages):
            return GroupRejected("a message that cannot be stored")
        if self.apart and group.messages and group.turns:
            return GroupRejected("not together")
        # As the real one: the number of the step is there, and that is seen before the end is looked at.
        if any((row[0], row[1]) in self.steps for row in group.steps):
            return GroupRejected("duplicate key")
        return None

    async def commit(self, group: Group) -> GroupResult:
        result = await super().commit(group)
        starts = {row[0] for row in group.turns if row[8]}
        for row in group.ends:
            self.one_commit += row[0] in starts and bool(row[5])
            self.numbers[row[1]].append(row[7])
        self.deliveries += [(row[0], row[2], Delivery.FromString(row[5])) for row in group.deliveries]
        return result


@dataclass(slots=True)
class Run:
    """A turn as the brain has it that was told to start it."""

    start: StartTurn
    said: int = 0
    """The last step that was proposed."""
    confirmed: int = 0
    is_final: bool = False

    @property
    def may_speak(self) -> bool:
        """A brain waits for the confirmation of a step before it goes on."""
        return not self.is_final and self.said == self.confirmed


class Mind(Brain):
    """A brain that knows which of its turns are open."""

    def __init__(self, name: str, store: Store) -> None:
        super().__init__(CREDIT, name)
        self.open: dict[tuple[bytes, int], Run] = {}
        self._store = store

    def start(self, start: StartTurn) -> None:
        super().start(start)
        pair = (start.turn_id, start.dispatch)
        # A retry may be started in vain like the turn that has answered it: what is said of it counts for nothing.
        if pair in self.open or (pair in self._store.given and self._store.turns.get(start.turn_id) != "ended"):
            self._store.wrong.append(f"{pair} is given twice")
        self._store.given.add(pair)
        self.open[pair] = Run(start, len(start.journal), len(start.journal))

    def confirm(self, turn_id: bytes, dispatch: int, step: int) -> None:
        super().confirm(turn_id, dispatch, step)
        if (turn_id, dispatch) in self.open:
            self.open[turn_id, dispatch].confirmed = step

    def confirm_end(self, turn_id: bytes, dispatch: int, step: int) -> None:
        super().confirm_end(turn_id, dispatch, step)
        self.open.pop((turn_id, dispatch), None)

    def stop(self, turn_id: bytes, dispatch: int) -> None:
        super().stop(turn_id, dispatch)
        self.open.pop((turn_id, dispatch), None)


class Walk:
    """One router, what it was sent, and what its brains know."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.engine = Engine(max_strikes=1000)
        self.store = Store()
        self.engine.store = self.engine.committer._writer = self.store
        self.accepted: defaultdict[str, list[Inbound]] = defaultdict(list)
        """Messages of each session that are to have an outcome, in order."""
        self.number = 0
        self.brains: list[Mind] = []
        self.shown = 0
        self.ended: set[bytes] = set()
        """Turns of whose end watchers were told."""
        self.engine.disconnect(self.engine.brain)
        for _ in range(2):
            self.a_brain_comes()

    # ---- what happens

    def a_brain_comes(self) -> None:
        self.number += 1
        brain = Mind(f"brain-{self.number}", self.store)
        self.brains.append(brain)
        self.engine.connect(brain)

    def a_brain_dies(self) -> None:
        brain = self.chance.choice(self.brains)
        self.brains.remove(brain)
        self.engine.disconnect(brain)
        self.a_brain_comes()

    def messages_come(self) -> None:
        batch = []
        for _ in range(self.chance.randint(1, 4)):
            session, kind = self.chance.choice(SESSIONS), self.chance.random()
            before = self.accepted[session]
            if kind < 0.15:
                again = self.chance.choice([before[0], self.chance.choice(before)])
                batch.append(again)
            elif kind < 0.22:
                old = self.chance.choice([before[1], self.chance.choice(before)])
                content = old.content if old.content.startswith(b"other") else b"other " + old.content
                item = inbound(session, _key(old), content)
                batch.append(item)
                if all((m.message_id, m.content_hash) != (item.message_id, item.content_hash) for m in before):
                    before.append(item)
            elif kind < 0.27:
                item = inbound(session, self._key(), b"")
                item.kind = self.chance.choice(CONTROLS)
                batch.append(item)
            else:
                item = self._new(session)
                batch.append(item)
                if self.chance.random() < POISON:
                    self.store.poison.add(item.message_id)
                else:
                    before.append(item)
        self.engine.accept(*batch)

    def _key(self) -> str:
        self.number += 1
        return f"key-{self.number}"

    def _new(self, session: str) -> Inbound:
        key = self._key()
        return inbound(session, key, Message(parts=[Part(text=key)]).SerializeToString())

    def somebody_else_is_written(self) -> None:
        partition = self.engine.state.partitions.get(IDLE)
        if partition is not None:
            self.engine.committer.put(CursorItem(partition, Cursor("stream", partition.cursor.seq + 1, "b")))

    def the_door_moves(self) -> None:
        gate = self.store.gate
        self.store.gate = asyncio.Event() if self.chance.random() < 0.7 else None
        if gate is not None:
            gate.set()

    def the_store_fails(self) -> None:
        held = sorted(self.engine.state.partitions)
        if self.store.fails:
            return
        if self.chance.random() < 0.02:
            self.store.fails.append(StoreLost("gone"))
        elif self.chance.random() < 0.3 and len(held) > 4:
            lost = self.chance.choice(held)
            if self.chance.random() < 0.5:
                self.engine.end_fenced(frozenset({lost}))
            else:
                self.store.fails.append(FenceLost(frozenset({lost})))
        else:
            self.store.fails.append(GroupRejected("for no reason that lasts"))

    def a_brain_speaks(self) -> None:
        live = [(brain, run) for brain in self.brains for run in brain.open.values() if run.may_speak]
        if live:
            self._speaks(*self.chance.choice(live))

    def _speaks(self, brain: Mind, run: Run, final: bool = False) -> None:
        start = run.start
        pair, step = (start.turn_id, start.dispatch), run.said + 1
        what = "final" if final else self.chance.choices(["final", "step", "decline"], [80, 15, 5])[0]
        if what == "decline":
            del brain.open[pair]
            self.engine.runner.on_declined(cast(Any, brain), [StopTurn(turn_id=pair[0], dispatch=pair[1])])
            return
        if self.chance.random() < 0.5:
            text = TurnText(turn_id=pair[0], dispatch=pair[1], step=step, offset=0, text="so far")
            self.engine.runner.on_texts(cast(Any, brain), [text])
        run.said = step
        if what == "final":
            run.is_final = True
            self.engine.answer(start, f"{pair[0].hex()} {pair[1]}", step, brain=brain)
        else:
            self.engine.propose(start, StepKind.INTERIM_REPLY, step, body=INTERIM, brain=brain)

    def all_answer(self) -> None:
        """Every turn that is open gets its final."""
        for brain in self.brains:
            for run in list(brain.open.values()):
                if run.may_speak:
                    self._speaks(brain, run, final=True)

    # ---- what has to hold

    def check(self) -> None:
        """What brains and watchers were told."""
        assert self.store.wrong == []
        assert all(0 <= brain.credit <= CREDIT for brain in self.brains)
        for name, turn, *_ in self.engine.live.events[self.shown :]:
            assert turn in self.store.turns, f"{name} of a turn that is not durable"
            assert turn not in self.ended, f"{name} of a turn that is over"
            if name == "ended":
                assert self.store.turns[turn] == "ended"
                self.ended.add(turn)
        self.shown = len(self.engine.live.events)
        for brain in self.brains:
            for turn, _, step in brain.confirms:
                assert not step or (turn, step) in self.store.steps, "a step is confirmed that is not journaled"
        told = [item.turn.id for item in self.engine.ended]
        assert len(told) == len(set(told)), "an outcome is passed on twice"

    def check_outcomes(self) -> None:
        """What is stored."""
        places = [(partition, delivery.position) for partition, _, delivery in self.store.deliveries]
        assert len({d.turn_id for _, _, d in self.store.deliveries}) == len(places), "a turn is delivered twice"
        for session in SESSIONS:
            mine = [d for _, id_, d in self.store.deliveries if id_ == _id(session)]
            assert [d.position for d in mine] == list(range(1, len(mine) + 1)), "deliveries are numbered without gaps"
            numbers = self.store.numbers[_id(session)]
            assert numbers == list(range(1, len(numbers) + 1)), "turns are numbered without gaps"
            order = [_place(self.accepted[session], delivery) for delivery in mine]
            assert order == sorted(set(order)), "each message has one outcome, in order"
            for delivery in mine:
                if int(delivery.outcome) == Outcome.FINAL:
                    turn, dispatch = delivery.message.parts[0].text.split()
                    assert turn == delivery.turn_id.hex(), "another turn's answer"
                    assert (delivery.turn_id, int(dispatch)) in self.store.given

    async def settle(self) -> None:
        """Nobody disturbs any more: what is accepted gets its outcome."""
        self.store.fails.clear()
        self.store.apart = False
        if self.store.gate is not None:
            self.store.gate.set()
            self.store.gate = None
        for session in SESSIONS:
            resume = inbound(session, self._key(), b"")
            resume.kind = InboundKind.INBOUND_KIND_RESUME
            self.engine.accept(resume)
        for _ in range(3000):
            self.all_answer()
            await self.passes(10)
            self.engine.runner.assign()
            if not any(partition.pending for partition in self.engine.state.partitions.values()):
                break
        await self.passes(200)
        self.check()
        self.check_outcomes()
        for session in SESSIONS:
            if ids.partition_of(_id(session), PARTITIONS) in self.engine.state.partitions:
                outcomes = sum(id_ == _id(session) for _, id_, _ in self.store.deliveries)
                assert outcomes == len(self.accepted[session]), f"messages of {session} have no outcome"
        assert self.engine.state.running == {}
        assert self.engine.state.scheduler.running == self.engine.state.scheduler.waiting == 0
        assert [brain.credit for brain in self.brains] == [CREDIT] * 2
        assert [brain.open for brain in self.brains] == [{}, {}], "a brain runs it for nobody"

    async def passes(self, rounds: int) -> None:
        for _ in range(rounds):
            await asyncio.sleep(0)

    async def begin(self) -> None:
        """Every session has a past."""
        for _ in range(OLD):
            for session in SESSIONS:
                item = self._new(session)
                self.accepted[session].append(item)
                self.engine.accept(item)
            while len(self.engine.ended) < sum(map(len, self.accepted.values())):
                self.all_answer()
                await self.passes(3)
        self.check()


def _id(session: str) -> bytes:
    return inbound(session).session_id


def _key(item: Inbound) -> str:
    """The key that a message had: it is what it says."""
    content = item.content.removeprefix(b"other ")
    return Message.FromString(content).parts[0].text


def _place(accepted: list[Inbound], delivery: Delivery) -> int:
    """Which of the accepted messages has this outcome: of two with one key the second has a turn of another name."""
    [message] = delivery.message_ids
    is_second = delivery.turn_id != ids.turn_id(accepted[0].session_id, message)
    places = [place for place, item in enumerate(accepted) if item.message_id == message]
    return places[is_second]


SEEDS, STEPS = range(24), 160
DEEDS = {
    "messages": 34, "others": 14, "door": 16, "brain": 40, "all": 20, "death": 2, "failure": 3, "apart": 1,
}  # fmt: skip


async def _walk(chance: random.Random) -> int:
    walk = Walk(chance)
    committing = asyncio.get_running_loop().create_task(walk.engine.committer.run())
    try:
        await walk.begin()
        for _ in range(STEPS):
            match chance.choices(list(DEEDS), list(DEEDS.values())):
                case ["messages"]:
                    walk.messages_come()
                case ["others"]:
                    walk.somebody_else_is_written()
                case ["door"]:
                    walk.the_door_moves()
                case ["brain"]:
                    walk.a_brain_speaks()
                case ["all"]:
                    walk.all_answer()
                case ["death"]:
                    walk.a_brain_dies()
                case ["failure"]:
                    walk.the_store_fails()
                case _:
                    walk.store.apart = not walk.store.apart
            await walk.passes(chance.choice([0, 0, 1, 2, 3, 5, 20]))
            assert not committing.done(), committing
            walk.check()
        walk.check_outcomes()
        await walk.settle()
        assert not committing.done(), committing
    finally:
        tasks = [committing, *walk.engine.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return walk.store.one_commit


@pytest.mark.parametrize("seed", SEEDS)
def test_a_long_walk(seed: int) -> None:
    """The same walks in every run, so that one that fails can be taken again."""
    asyncio.run(_walk(random.Random(seed)))


def test_turns_of_a_walk_are_one_commit() -> None:
    """The walks go where they are meant to go."""
    assert sum(asyncio.run(_walk(random.Random(seed))) for seed in SEEDS)
