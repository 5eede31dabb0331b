"""What lies behind the place that a watcher has reached: journaled steps from the store, the running step from memory.

A page is cut by bytes and says whether more follows; the watcher asks again from behind its last event. So nothing
is left out, however much a turn holds. Journaled steps are shown as of the dispatch that proposed them: a watcher
that was shown another dispatch's text sees by that what to take back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, Protocol

from soma.common.v1.turn_pb2 import Delivery, LiveEvent, QueueState, StepBody, TurnState, WatchPosition
from soma.router.v1.outbound_pb2 import WatchQuery, WatchSnapshot

from services.router.application.group import StoreLost
from services.router.application.step_events import Origin, StepContent, is_kept_work, texts_said
from services.router.domain.turn import TurnStatus
from soma_common import ids
from soma_common.clock import monotonic

if TYPE_CHECKING:
    from services.router.application.live_waiting import WaitingTurns
    from services.router.application.read_sessions import SessionRow, StepRow, TurnRow
    from services.router.application.state import RouterState
    from services.router.domain.partition import Partition
    from services.router.domain.session import QueuedMessage, Session, Turn

PAGE_BYTES: Final = 512 * 1024
"""About how much goes in one answer: the bus takes 1 MiB."""
MAX_LISTED: Final = 64
_ROWS: Final = 16
"""Steps read at once; each may hold tens of kilobytes."""
_RESTS: Final = 10_000


class WatchStore(Protocol):
    """Reads what was committed, for watchers. All raise StoreLost."""

    async def turn_answering(self, tenant: str, message_id: bytes, content_hash: bytes) -> bytes | None:
        """The newest turn that takes the message with this content; None if there is none yet."""

    async def ended_turn(self, tenant: str, turn_id: bytes) -> tuple[Delivery, int, int] | None:
        """The outcome, the last dispatch and the number of steps of a turn that has ended; None if it has not."""

    async def turn(self, tenant: str, turn_id: bytes) -> TurnRow | None:
        """One turn."""

    async def session(self, tenant: str, session_id: bytes) -> SessionRow | None:
        """One session."""

    async def session_turns(
        self, tenant: str, session_id: bytes, status: int | None, after: int, limit: int
    ) -> list[TurnRow]:
        """Turns of a session in order, beyond a number."""

    async def steps(self, tenant: str, turn_id: bytes, after: int, limit: int) -> list[StepRow]:
        """Steps of a turn in order, beyond a number."""

    async def journal(self, tenant: str, turn_id: bytes) -> list[tuple[int, bytes]]:
        """(kind, body) of a turn's steps in order."""


class WatchPages:
    """Answers watchers' questions about a partition that is ours."""

    def __init__(
        self, state: RouterState, store: WatchStore, waiting: WaitingTurns, page_bytes: int = PAGE_BYTES
    ) -> None:
        self._state = state
        self._store = store
        self._waiting = waiting
        self._page_bytes = page_bytes
        self._rests: OrderedDict[bytes, tuple[Partition, WatchPosition, int]] = OrderedDict()
        """Where watched sessions rest: the place behind the last turn, and its number, while no turn runs."""

    async def page(self, tenant: str, partition: Partition, query: WatchQuery) -> WatchSnapshot | None:
        """What lies behind `query.after`; None if it cannot be said now: the watcher asks again."""
        session = partition.sessions.get(query.session_id)
        if session is not None and session.key.tenant != tenant:
            return WatchSnapshot()
        try:
            if query.session:
                return await self._of_session(tenant, partition, session, query)
            if query.message_id and not query.after.turn_id:
                return await self._of_message(tenant, session, query)
            return await self._of_turn(tenant, session, query, query.after)
        except StoreLost:
            return None

    # ---- whose turn

    async def _of_session(
        self, tenant: str, partition: Partition, session: Session | None, query: WatchQuery
    ) -> WatchSnapshot | None:
        after = query.after
        if after.turn_id and not after.ended:
            page = await self._of_turn(tenant, session, query, after)
        elif session is not None and session.turn is not None and not after.turn_id and not after.ended:
            page = await self._of_turn(tenant, session, query, WatchPosition(turn_id=session.turn.id))
        else:
            page = await self._next_turn(tenant, partition, session, query)
        if page is not None and page.events and page.events[-1].HasField("ended"):
            page.more = True
        if page is not None and not page.more and not page.position_unknown:
            page.known = True
            page.events.append(queue_event(partition.sessions.get(query.session_id)))
        return page

    async def _next_turn(
        self, tenant: str, partition: Partition, session: Session | None, query: WatchQuery
    ) -> WatchSnapshot | None:
        """The turn behind an ended one, or where the session rests."""
        after = query.after
        rest = self._rests.get(query.session_id)
        fresh = not after.turn_id and not after.ended
        rests = rest is not None and rest[0] is partition and (session is None or session.turn is None)
        if rest is not None and rests and (fresh or after.turn_id == rest[1].turn_id):
            return WatchSnapshot(idle_at=rest[1], idle_number=rest[2])
        number = 0
        if after.turn_id:
            row = await self._store.turn(tenant, after.turn_id)
            if row is None or row.session_id != query.session_id:
                return WatchSnapshot(position_unknown=True)
            number = row.number
        elif fresh:
            stored = await self._store.session(tenant, query.session_id)
            number = stored.turn_count if stored is not None else 0
            last = await self._store.session_turns(tenant, query.session_id, None, number - 1, 1) if number else []
            after = _behind(last[0]) if last else WatchPosition(ended=True)
        rows = await self._store.session_turns(tenant, query.session_id, None, number, 1)
        running = session.turn if session is not None else None
        if rows and not fresh:
            return await self._of_turn(tenant, session, query, WatchPosition(turn_id=rows[0].turn_id))
        if rows or running is not None:
            return None  # it began meanwhile
        if self._rests.get(query.session_id) is rest:  # no turn has ended meanwhile: it is watched, and would be noted
            self._rest(query.session_id, partition, WatchPosition(turn_id=after.turn_id, ended=True), number)
        return WatchSnapshot(idle_at=after, idle_number=number)

    def note_rest(self, turn: Turn, watched: bool) -> None:
        """A turn has ended: remembers where its session rests, if somebody watches it or has watched it."""
        session = turn.session
        if turn.number <= 0 or not (watched or session.id in self._rests):
            return
        position = WatchPosition(turn_id=turn.id, dispatch=turn.dispatch, step=turn.step_count + 1, ended=True)
        self._rest(session.id, session.partition, position, turn.number)

    def _rest(self, session_id: bytes, partition: Partition, position: WatchPosition, number: int) -> None:
        self._rests[session_id] = partition, position, number
        self._rests.move_to_end(session_id)
        while len(self._rests) > _RESTS:
            self._rests.popitem(last=False)

    async def _of_message(self, tenant: str, session: Session | None, query: WatchQuery) -> WatchSnapshot | None:
        """The turn that answers a message, or its place in the queue."""
        if session is not None:
            turn = session.turn
            if turn is not None and any(is_meant(message, query) for message in turn.inputs):
                return await self._of_turn(tenant, session, query, WatchPosition(turn_id=turn.id))
            for ahead, message in enumerate(session.queue):
                if is_meant(message, query):
                    return WatchSnapshot(known=True, queued=True, ahead=ahead + (turn is not None))
        if query.content_hash:
            turn_id = await self._store.turn_answering(tenant, query.message_id, query.content_hash)
            if turn_id is None:
                return WatchSnapshot()
        else:
            turn_id = ids.turn_id(query.session_id, query.message_id)
        return await self._of_turn(tenant, session, query, WatchPosition(turn_id=turn_id))

    # ---- one turn

    async def _of_turn(
        self, tenant: str, session: Session | None, query: WatchQuery, after: WatchPosition
    ) -> WatchSnapshot | None:
        turn = self._state.running.get(after.turn_id)
        if turn is not None:
            if turn.session.id != query.session_id or turn.session.key.tenant != tenant:
                return WatchSnapshot(position_unknown=query.resumed)
            return await self._running(tenant, turn, after)
        row = await self._store.turn(tenant, after.turn_id)
        if row is None or row.session_id != query.session_id:
            ahead = self._waiting.ahead(session, after.turn_id) if session is not None else None
            if ahead is not None:
                return WatchSnapshot(known=True, queued=True, ahead=ahead)
            return WatchSnapshot(position_unknown=query.resumed)
        if row.status != TurnStatus.ENDED or after.turn_id in self._state.running:
            return None  # it is being taken over, or has just begun
        return await self._ended(tenant, row, after)

    async def _running(self, tenant: str, turn: Turn, after: WatchPosition) -> WatchSnapshot | None:
        origin = origin_of(turn)
        page = _Page(self._page_bytes)
        step = max(after.step, 1)
        if step <= turn.step_count or not turn.journal_loaded:
            async for row in self._steps(tenant, turn.id, step):
                content = StepContent.of(row.body)
                seen = after.offset if (row.step, row.dispatch) == (step, after.dispatch) else 0
                if not page.take(*content.events(origin, row.dispatch, row.step, seen)):
                    return page.cut()
                if content.state == TurnState.TURN_STATE_IDLE:  # it has just ended: memory is about to know
                    return page.cut() if page.events else None
                if not page.take(content.next_state(origin, row.dispatch, row.step)):
                    return page.cut()
                after = WatchPosition(step=row.step + 1)
                step = row.step + 1
        # Nothing is awaited from here on: what memory says belongs together.
        if self._state.running.get(turn.id) is not turn or not turn.journal_loaded or step <= turn.step_count:
            return page.cut() if page.events else None
        page.take(running_state(turn))
        same = (after.step, after.dispatch) == (turn.step_count + 1, turn.dispatch)
        seen = after.offset if same else 0
        if seen < turn.text_length:
            for event in origin.texts(turn.dispatch, turn.step_count + 1, "".join(turn.text), seen):
                if not page.take(event):
                    return page.cut()
        return WatchSnapshot(known=True, events=page.events)

    async def _ended(self, tenant: str, row: TurnRow, after: WatchPosition) -> WatchSnapshot | None:
        origin = Origin(row.agent, row.session, row.turn_id, row.number)
        page = _Page(self._page_bytes)
        first = max(after.step, 1)
        size: int | None = None
        if first <= row.step_count:
            async for stored in self._steps(tenant, row.turn_id, first):
                said = await self._said_before(tenant, row.turn_id, stored.body)
                content = StepContent.of(stored.body, said)
                seen = after.offset if (stored.step, stored.dispatch) == (after.step, after.dispatch) else 0
                if not page.take(*content.events(origin, stored.dispatch, stored.step, seen)):
                    return page.cut()
                size = content.size
                last = stored.step == row.step_count
                if not last and not page.take(content.next_state(origin, stored.dispatch, stored.step)):
                    return page.cut()
        ended = await self._store.ended_turn(tenant, row.turn_id)
        if ended is None:
            return None
        delivery, dispatch, steps = ended
        event = origin.event(dispatch, steps)
        event.ended.CopyFrom(delivery)
        if size is not None:
            event.step_size = size
        if not page.take(event):
            return page.cut()
        return WatchSnapshot(known=True, events=page.events)

    async def _said_before(self, tenant: str, turn_id: bytes, body: bytes) -> list[str]:
        """The texts that a message repeats: only what was kept of an interrupted turn has to be told from them."""
        step = StepBody.FromString(body) if b"interrupted" in body else StepBody()
        if not is_kept_work(step.final.message):
            return []
        return texts_said([stored for _, stored in await self._store.journal(tenant, turn_id)])

    async def _steps(self, tenant: str, turn_id: bytes, first: int) -> AsyncIterator[StepRow]:
        after = first - 1
        while True:
            rows = await self._store.steps(tenant, turn_id, after, _ROWS)
            for row in rows:
                yield row
                after = row.step
            if len(rows) < _ROWS:
                return


class _Page:
    """Events of one answer, as many as fit."""

    def __init__(self, room: int) -> None:
        self.events: list[LiveEvent] = []
        self._room = room

    def take(self, *events: LiveEvent) -> bool:
        """Adds events in order; False at the first that does not fit. One always does."""
        for event in events:
            self._room -= event.ByteSize()
            if self._room < 0 and self.events:
                return False
            self.events.append(event)
        return True

    def cut(self) -> WatchSnapshot:
        """The answer behind which more follows."""
        return WatchSnapshot(known=True, events=self.events, more=True)


def origin_of(turn: Turn) -> Origin:
    """The origin of a running turn's events."""
    key = turn.session.key
    return Origin(key.agent, key.session, turn.id, turn.number)


def running_state(turn: Turn) -> LiveEvent:
    """The state of a running turn, with the messages it answers."""
    event = origin_of(turn).event(turn.dispatch, turn.step_count + 1)
    event.state = turn.state.value  # type: ignore[assignment]
    event.message_ids.extend(message.message_id for message in turn.inputs)
    return event


def queue_event(session: Session | None) -> LiveEvent:
    """Which messages of a session wait."""
    state = QueueState()
    if session is None:
        return LiveEvent(queued=state)
    now = monotonic()
    state.count = len(session.queue)
    for place, message in enumerate(session.queue, 1):
        if place > MAX_LISTED:
            break
        since = message.ingested_at
        age_ms = int((now - since) * 1000) if since else 0
        state.messages.add(message_id=message.message_id, place=place, age_ms=age_ms)
    return LiveEvent(agent=session.key.agent, session=session.key.session, queued=state)


def is_meant(message: QueuedMessage, query: WatchQuery) -> bool:
    """Whether a query asks for this message. One whose content memory does not hold is not told from another under
    the same key: the store knows.
    """
    if message.message_id != query.message_id:
        return False
    if not query.content_hash:
        return True
    return message.content is not None and ids.content_hash(message.content) == query.content_hash


def _behind(row: TurnRow) -> WatchPosition:
    return WatchPosition(turn_id=row.turn_id, dispatch=row.dispatch, step=row.step_count + 1, ended=True)
