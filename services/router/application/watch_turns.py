"""Shows what running turns do to whoever watches: adapters that asked for live events, and watchers that registered
interest.

Nothing is sent for a session nobody watches. The owner of the partition is the only one who speaks, so all watchers
see the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, StepBody, TextDelta, TurnRestarted
from soma.router.v1.outbound_pb2 import WatchQuery, WatchSnapshot

from services.router.application.group import StoreLost
from soma_common import ids
from soma_common.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.router.application.ports import HistoryStore, Outbox
    from services.router.application.state import RouterState
    from services.router.domain.session import QueuedMessage, Session, Turn

INTEREST_S: Final = 10.0
_MAX_INTERESTS: Final = 100_000
_SNAPSHOT_BYTES: Final = 512 * 1024
"""About how much of a turn goes in one answer: the bus takes 1 MiB, the journal of a turn may hold more."""


class LiveDesk:
    """Who watches what, and the events for them.

    `adapter_of(session)` names the adapter stream (gateway, stream) that wants the session's live events, or None.
    """

    def __init__(
        self,
        state: RouterState,
        history: HistoryStore,
        outbox: Outbox,
        adapter_of: Callable[[Session], tuple[str, int] | None],
    ) -> None:
        self._state = state
        self._history = history
        self._outbox = outbox
        self._adapter_of = adapter_of
        self._interest: dict[bytes, float] = {}

    # ---- events of running turns

    def state(self, turn: Turn) -> None:
        """The turn is in a state."""
        self._show(turn, lambda: self._state_event(turn))

    def restarted(self, turn: Turn) -> None:
        """A new dispatch goes on from the journal: text shown beyond it never happened."""
        self._show(turn, lambda: _event(turn, restarted=TurnRestarted(from_step=turn.step_count + 1)))

    def text(self, turn: Turn, offset: int, text: str) -> None:
        """Text of the running step."""
        # The busiest line of live watching: the event is made where it is sent from, without a copy.
        session = turn.session
        if self._interest and self._watched(session.id):
            _fill_text(self._outbox.for_watchers(session.key.tenant, session.id), turn, offset, text)
        adapter = self._adapter_of(session) if turn.deliver else None
        if adapter is not None:
            _fill_text(self._outbox.for_adapter(session.key.tenant, *adapter), turn, offset, text)

    def step(self, turn: Turn, body: bytes) -> None:
        """A step was journaled: its calls or results, and the state it leads to."""
        targets = self._targets(turn)
        if targets[0] or targets[1]:
            for event in _step_events(turn, turn.step_count, body):
                self._send(turn, event, targets)
            self._send(turn, self._state_event(turn), targets)

    def ended(self, turn: Turn, delivery: Delivery) -> None:
        """The turn has ended: watchers get the outcome here, the channel's adapter gets it as a delivery."""
        if self._watched(turn.session.id):
            self._outbox.for_watchers(turn.session.key.tenant, turn.session.id).CopyFrom(_event(turn, ended=delivery))

    def catch_up(self, tenant: str, channel: str, streams: set[int]) -> None:
        """Shows adapter streams that are new where the running turns of their sessions stand."""
        for turn in self._state.running.values():
            key = turn.session.key
            if key.tenant != tenant or key.channel != channel or not turn.deliver:
                continue
            adapter = self._adapter_of(turn.session)
            if adapter is not None and adapter[1] in streams:
                for event in self._so_far(turn):
                    self._outbox.for_adapter(tenant, *adapter).CopyFrom(event)

    def _state_event(self, turn: Turn) -> LiveEvent:
        event = _event(turn)
        event.state = turn.state.value  # type: ignore[assignment]
        event.message_ids.extend(message.message_id for message in turn.inputs)
        return event

    def _targets(self, turn: Turn) -> tuple[bool, tuple[str, int] | None]:
        return self._watched(turn.session.id), self._adapter_of(turn.session) if turn.deliver else None

    def _show(self, turn: Turn, make: Callable[[], LiveEvent]) -> None:
        targets = self._targets(turn)
        if targets[0] or targets[1]:
            self._send(turn, make(), targets)

    def _send(self, turn: Turn, event: LiveEvent, targets: tuple[bool, tuple[str, int] | None]) -> None:
        tenant = turn.session.key.tenant
        if targets[0]:
            self._outbox.for_watchers(tenant, turn.session.id).CopyFrom(event)
        if targets[1]:
            self._outbox.for_adapter(tenant, *targets[1]).CopyFrom(event)

    def _watched(self, session_id: bytes) -> bool:
        until = self._interest.get(session_id)
        return until is not None and until > monotonic()

    def forget_old(self) -> None:
        """Drops interest that was not renewed."""
        now = monotonic()
        for session_id in [key for key, until in self._interest.items() if until <= now]:
            del self._interest[session_id]

    # ---- questions of watchers

    async def query(self, tenant: str, partition: int, query: WatchQuery) -> WatchSnapshot | None:
        """Registers interest and says where the session stands; None if the partition is not ours."""
        held = self._state.partitions.get(partition)
        if held is None or held.lost:
            return None
        if len(self._interest) < _MAX_INTERESTS:
            self._interest[query.session_id] = monotonic() + INTEREST_S
        session = held.sessions.get(query.session_id)
        if session is not None and session.key.tenant != tenant:
            return WatchSnapshot()
        if session is not None:
            snapshot = self._in_memory(session, query)
            if snapshot is not None:
                return snapshot
        try:
            turn_id = await self._turn_asked_for(tenant, query)
            if not turn_id:
                return WatchSnapshot()
            running = self._state.running.get(turn_id)
            if running is not None and running.session.key.tenant == tenant:  # its content was not in memory
                return WatchSnapshot(known=True, events=_newest_that_fit(self._so_far(running)))
            ended = await self._history.ended_turn(tenant, turn_id)
        except StoreLost:
            return WatchSnapshot()
        if ended is None:
            return WatchSnapshot()
        delivery, dispatch, steps = ended
        event = LiveEvent(
            agent=delivery.agent, session=delivery.session, turn_id=turn_id, dispatch=dispatch, step=steps
        )
        event.ended.CopyFrom(delivery)
        return WatchSnapshot(known=True, events=[event])

    async def _turn_asked_for(self, tenant: str, query: WatchQuery) -> bytes | None:
        if query.turn_id or not query.message_id:
            return query.turn_id
        if query.content_hash:
            return await self._history.turn_answering(tenant, query.message_id, query.content_hash)
        return ids.turn_id(query.session_id, query.message_id)

    def _in_memory(self, session: Session, query: WatchQuery) -> WatchSnapshot | None:
        turn = session.turn
        anything = not query.message_id and not query.turn_id
        if turn is not None and (
            anything or turn.id == query.turn_id or any(_is_meant(message, query) for message in turn.inputs)
        ):
            return WatchSnapshot(known=True, events=_newest_that_fit(self._so_far(turn)))
        for ahead, message in enumerate(session.queue):
            if _is_meant(message, query) or ids.turn_id(session.id, message.message_id) == query.turn_id:
                return WatchSnapshot(known=True, queued=True, ahead=ahead + (turn is not None))
        return None

    def _so_far(self, turn: Turn) -> list[LiveEvent]:
        events = [self._state_event(turn)]
        for number, body in enumerate(turn.journal, 1):
            events.extend(_step_events(turn, number, body))
        if turn.text:
            events.append(_event(turn, text=TextDelta(offset=0, text="".join(turn.text))))
        return events


def _newest_that_fit(events: list[LiveEvent]) -> list[LiveEvent]:
    """The first event, which names the turn's messages, and of the others the newest that fit one answer."""
    room = _SNAPSHOT_BYTES
    fitting: list[LiveEvent] = []
    for event in reversed(events[1:]):
        room -= event.ByteSize()
        if room < 0:
            break
        fitting.append(event)
    return [*events[:1], *reversed(fitting)]


def _is_meant(message: QueuedMessage, query: WatchQuery) -> bool:
    """Whether a query asks for this message. One whose content memory does not hold is not told from another under
    the same key: the store knows.
    """
    if message.message_id != query.message_id:
        return False
    if not query.content_hash:
        return True
    return message.content is not None and ids.content_hash(message.content) == query.content_hash


def _event(
    turn: Turn,
    *,
    text: TextDelta | None = None,
    restarted: TurnRestarted | None = None,
    ended: Delivery | None = None,
) -> LiveEvent:
    key = turn.session.key
    return LiveEvent(
        agent=key.agent,
        session=key.session,
        turn_id=turn.id,
        dispatch=turn.dispatch,
        step=turn.step_count + 1,
        text=text,
        restarted=restarted,
        ended=ended,
    )


def _fill_text(event: LiveEvent, turn: Turn, offset: int, text: str) -> None:
    key = turn.session.key
    event.agent, event.session, event.turn_id = key.agent, key.session, turn.id
    event.dispatch, event.step = turn.dispatch, turn.step_count + 1
    delta = event.text
    delta.offset, delta.text = offset, text


def _step_events(turn: Turn, number: int, body: bytes) -> list[LiveEvent]:
    """The calls or results of a journaled step; nothing for a body that this release cannot read."""
    step = StepBody()
    try:
        step.ParseFromString(body)
    except DecodeError:
        return []
    events = []
    for call in step.model_reply.tool_calls:
        event = _event(turn)
        event.step = number
        event.tool_call.CopyFrom(call)
        events.append(event)
    for result in step.tool_results.results:
        event = _event(turn)
        event.step = number
        event.tool_result.CopyFrom(result)
        events.append(event)
    if step.model_reply.text:
        event = _event(turn, text=TextDelta(offset=0, text=step.model_reply.text))
        event.step = number
        events.insert(0, event)
    return events
