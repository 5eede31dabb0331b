"""A session as its owner tells it and as its store keeps it, and clients that render what they are told of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from google.protobuf.struct_pb2 import Struct
from soma.common.v1.message_pb2 import Error, Message, Part
from soma.common.v1.turn_pb2 import (
    Delivery,
    FinalMessage,
    LiveEvent,
    ModelReply,
    Outcome,
    StepBody,
    ToolCall,
    ToolResult,
    ToolResults,
    WatchPosition,
)
from soma.router.v1.outbound_pb2 import WatchQuery, WatchSnapshot

from services.router.application.read_sessions import SessionRow, StepRow, TurnRow
from services.router.application.state import RouterState
from services.router.application.step_events import StepContent
from services.router.application.watch_turns import LiveDesk
from services.router.domain.session import Session, Turn
from services.router.domain.turn import TurnState
from soma_common import ids
from soma_common.layout import LaneLayout
from soma_common.live_merge import Watched, WatchMerge
from tests.unit.router.builders import AGENT, CHANNEL, TENANT, a_partition, a_session, a_turn, entry, inbound

T = TypeVar("T")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PAGE_BYTES = 300
"""Small, so that pages are cut."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    raise AssertionError("it waits")


@dataclass
class StoredTurn:
    """A turn's rows."""

    turn: Turn
    steps: list[StepRow] = field(default_factory=list)
    delivery: Delivery | None = None


class Store:
    """What was committed: a WatchStore."""

    def __init__(self, session: Session) -> None:
        self.session_id = session.id
        self.turns: OrderedDict[bytes, StoredTurn] = OrderedDict()
        self.reads = 0

    async def turn_answering(self, tenant: str, message_id: bytes, content_hash: bytes) -> bytes | None:
        found = [t for t, row in self.turns.items() if any(m.message_id == message_id for m in row.turn.inputs)]
        return found[-1] if found else None

    async def ended_turn(self, tenant: str, turn_id: bytes) -> tuple[Delivery, int, int] | None:
        row = self.turns.get(turn_id)
        return (row.delivery, row.turn.dispatch, len(row.steps)) if row and row.delivery else None

    async def turn(self, tenant: str, turn_id: bytes) -> TurnRow | None:
        self.reads += 1
        row = self.turns.get(turn_id)
        return self._row(row) if row else None

    async def session(self, tenant: str, session_id: bytes) -> SessionRow | None:
        self.reads += 1
        ended = sum(row.delivery is not None for row in self.turns.values())
        return cast(SessionRow, _Counted(ended)) if self.turns else None

    async def session_turns(
        self, tenant: str, session_id: bytes, status: int | None, after: int, limit: int
    ) -> list[TurnRow]:
        self.reads += 1
        return [self._row(row) for row in self.turns.values() if row.turn.number > after][:limit]

    async def steps(self, tenant: str, turn_id: bytes, after: int, limit: int) -> list[StepRow]:
        return [row for row in self.turns[turn_id].steps if row.step > after][:limit]

    async def journal(self, tenant: str, turn_id: bytes) -> list[tuple[int, bytes]]:
        return [(0, row.body) for row in self.turns[turn_id].steps]

    def _row(self, row: StoredTurn) -> TurnRow:
        turn = row.turn
        fields: dict[str, Any] = dict.fromkeys(TurnRow.__dataclass_fields__)
        fields.update(turn_id=turn.id, session_id=self.session_id, number=turn.number, dispatch=turn.dispatch)
        fields.update(status=3 if row.delivery else 1, tenant=TENANT, agent=AGENT, channel=CHANNEL, session="s")
        return TurnRow(**(fields | {"step_count": len(row.steps)}))


@dataclass
class _Counted:
    turn_count: int


class Outbox:
    """Keeps what goes to watchers."""

    losses = 0

    def __init__(self) -> None:
        self.told: list[LiveEvent] = []

    def for_watchers(self, tenant: str, session_id: bytes) -> LiveEvent:
        self.told.append(LiveEvent())
        return self.told[-1]

    def take(self) -> list[LiveEvent]:
        told, self.told = self.told, []
        return [LiveEvent.FromString(event.SerializeToString()) for event in told]


class World:
    """The owner of a session's partition, run by hand as the turn runner runs it."""

    def __init__(self) -> None:
        item = inbound()
        partition = a_partition(ids.partition_of(item.session_id, 8))
        self.state = RouterState(LaneLayout(8, 1), cast(Any, None), 100, 100)
        self.state.partitions[partition.id] = partition
        self.session = a_session(partition)
        self.store = Store(self.session)
        self.outbox = Outbox()
        self.desk = self._a_desk()
        self.messages = 0

    def _a_desk(self) -> LiveDesk:
        return LiveDesk(self.state, self.store, cast(Any, self.outbox), lambda _: None, PAGE_BYTES)

    def new_owner(self) -> None:
        """The partition changes hands: whoever owns it now knows of no interest. A running turn is dispatched anew."""
        self.desk = self._a_desk()
        if self.turn is not None:
            self.crash()

    @property
    def turn(self) -> Turn | None:
        return self.session.turn

    def begin(self) -> None:
        self.messages += 1
        turn = a_turn(self.session, entry(inbound(key=f"k{self.messages}")).message)
        self.state.running[turn.id] = turn
        self.store.turns[turn.id] = StoredTurn(turn)
        self.desk.state(turn)

    def say(self, text: str) -> None:
        turn = self._running()
        turn.text.append(text)
        turn.text_length += len(text)
        self.desk.text(turn, turn.text_length - len(text), text)

    def call(self, count: int) -> None:
        """The model asks for tools, and they answer."""
        calls = [ToolCall(index=n, tool=f"t{n}", arguments=Struct()) for n in range(count)]
        self._journal(StepBody(model_reply=ModelReply(text=self._text, tool_calls=calls)), TurnState.TOOL_CALL)
        results = [ToolResult(index=n, tool=f"t{n}") for n in range(count)]
        self._journal(StepBody(tool_results=ToolResults(results=results)), TurnState.REFLECTING)

    def interim(self) -> None:
        """An answer that came before a further input was read."""
        self._journal(StepBody(model_reply=ModelReply(text=self._text)), TurnState.REFLECTING)

    def crash(self) -> None:
        turn = self._running()
        turn.dispatch += 1
        turn.text.clear()
        turn.text_length = 0
        self.desk.restarted(turn)
        self.desk.state(turn)

    def answer(self) -> None:
        parts = [Part(text=text) for text in self._interims()] + [Part(text=self._text)]
        message = Message(parts=parts)
        self._end(Outcome.OUTCOME_FINAL, StepBody(final=FinalMessage(message=message)), Delivery(message=message))

    def fail(self) -> None:
        self._end(Outcome.OUTCOME_ERROR, StepBody(failure=Error(message="no")), Delivery(error=Error(message="no")))

    def cancel(self) -> None:
        """Stopped: what the model was saying is dropped."""
        self._end(Outcome.OUTCOME_CANCELLED, None, Delivery())

    def interrupt(self) -> None:
        """Stopped: what the model was saying is kept."""
        texts = [text for text in [*self._replies(), self._text] if text]
        message = Message(parts=[Part(text=text) for text in texts], metadata={"interrupted": "true"})
        self._end(Outcome.OUTCOME_INTERRUPTED, StepBody(final=FinalMessage(message=message)), Delivery(message=message))

    def roll_back(self) -> None:
        self._end(Outcome.OUTCOME_ABSORBED, None, Delivery())

    def truth(self) -> dict[bytes, dict[int, tuple[str, int]]]:
        """What the journals hold: text and number of calls or results of each step of each turn."""
        return {turn_id: self._content(row) for turn_id, row in self.store.turns.items()}

    def _content(self, row: StoredTurn) -> dict[int, tuple[str, int]]:
        before = [text for text in (StepContent.of(step.body).text for step in row.steps[:-1]) if text]
        contents = {step.step: StepContent.of(step.body, before) for step in row.steps}
        return {step: (content.text, len(content.items)) for step, content in contents.items() if content.size}

    def _running(self) -> Turn:
        assert self.turn is not None
        return self.turn

    @property
    def _text(self) -> str:
        return "".join(self._running().text)

    def _replies(self) -> list[str]:
        return [StepBody.FromString(body).model_reply.text for body in self._running().journal]

    def _interims(self) -> list[str]:
        bodies = [StepBody.FromString(body).model_reply for body in self._running().journal]
        return [reply.text for reply in bodies if reply.text and not reply.tool_calls]

    def _journal(self, body: StepBody, state: TurnState) -> None:
        turn = self._running()
        self._row(turn, body)
        turn.state = state
        turn.journal.append(body.SerializeToString())
        turn.text.clear()
        turn.text_length = 0
        self.desk.step(turn, turn.journal[-1])

    def _row(self, turn: Turn, body: StepBody) -> None:
        steps = self.store.turns[turn.id].steps
        steps.append(StepRow(len(steps) + 1, turn.dispatch, NOW, body.SerializeToString()))

    def _end(self, outcome: Outcome.ValueType, last: StepBody | None, delivery: Delivery) -> None:
        turn = self._running()
        if last is not None:
            self._row(turn, last)
        delivery.turn_id, delivery.outcome = turn.id, outcome
        delivery.message_ids.extend(message.message_id for message in turn.inputs)
        self.store.turns[turn.id].delivery = delivery
        del self.state.running[turn.id]
        self.session.turn = None
        self.session.turn_count = turn.number
        self.desk.ended(turn, delivery)

    def answer_to(self, query: WatchQuery) -> WatchSnapshot | None:
        return run(self.desk.query(TENANT, self.session.partition.id, query))


class Client:
    """Renders what it is shown, strictly: a gap, a repetition or anything out of order fails."""

    def __init__(self, world: World, turn: bytes = b"") -> None:
        self._world = world
        self._watched_turn = turn
        self.shown: dict[bytes, dict[int, tuple[str, int]]] = {}
        self.ended: list[bytes] = []
        self.position: WatchPosition | None = None
        self.taken_back = 0
        self.merge = self._connect()

    def _connect(self) -> WatchMerge:
        if self._watched_turn:
            return WatchMerge(turn_id=self._watched_turn, after=self.position)
        return WatchMerge(session=True, after=self.position)

    def reconnect(self) -> None:
        """Leaves, and comes back with the position of the last event."""
        self.merge = self._connect()

    @property
    def done(self) -> bool:
        return self.merge.ended

    def hear(self, events: list[LiveEvent]) -> None:
        self._show(self.merge.live(events))

    def ask(self) -> WatchSnapshot | None:
        """Asks the owner; the answer is given back, to be read now or later."""
        query = WatchQuery(session_id=self._world.session.id, after=self.merge.position)
        query.session = not self._watched_turn
        query.resumed = self.position is not None
        return self._world.answer_to(query)

    def read(self, page: WatchSnapshot | None) -> None:
        if page is not None:
            assert page.known
            assert not page.position_unknown
            self._show(self.merge.page(page))

    def catch_up(self) -> None:
        """Asks until nothing is missing."""
        for _ in range(1000):
            self.read(self.ask())
            if self.done or not self.merge.gap:
                return
        raise AssertionError("it asks for ever")

    def _show(self, shown: list[Watched]) -> None:
        for event, position in shown:
            self.position = position
            if event.HasField("queued"):
                continue
            assert event.turn_id not in self.ended, "a turn that has ended"
            assert not self.shown or event.turn_id in (list(self.shown)[-1], *self._later(event.turn_id)), "turn order"
            self._render(event, self.shown.setdefault(event.turn_id, {}))

    def _later(self, turn_id: bytes) -> list[bytes]:
        order = list(self._world.store.turns)
        return order[order.index(list(self.shown)[-1]) + 1 :][:1]

    def _render(self, event: LiveEvent, steps: dict[int, tuple[str, int]]) -> None:
        text, items = steps.get(event.step, ("", 0))
        match event.WhichOneof("event"):
            case "text":
                assert event.text.offset == len(text), "text with a gap or a repetition"
                assert not items, "text behind calls"
                assert not any(step > event.step for step in steps), "text of a step that is over"
                steps[event.step] = text + event.text.text, 0
            case "tool_call" | "tool_result":
                assert event.next_offset == len(text) + items + 1, "a call or result missing or twice"
                steps[event.step] = text, items + 1
            case "restarted":
                gone = [step for step in steps if step >= event.restarted.from_step]
                self.taken_back += len(gone)
                for step in gone:
                    del steps[step]
            case "ended":
                self.ended.append(event.turn_id)
