"""Starts turns: of messages that find their session idle in the very group that stores them, of the others in fair
order when there is room.

The start of a turn is journaled: which messages it takes, and the revision of its agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery, StepBody

from services.router.application.group import CommitItem, GroupResult
from services.router.application.items import KEY_REUSED, ControlItem, StartItem
from services.router.application.outcomes import EndItem
from services.router.domain.arrival import Policy, next_inputs, replacement
from services.router.domain.session import QueuedMessage, Session, Turn
from services.router.domain.turn import Outcome, StepKind, TurnStatus
from soma_common import ids
from soma_common.clock import monotonic

if TYPE_CHECKING:
    from services.router.application.dispatch_turns import Dispatcher
    from services.router.application.state import RouterState

STEP_FORMAT: Final = 1
_REVISIONS_KNOWN: Final = 4096
_STARTS_PER_GROUP: Final = 128
"""Most turns that one group starts, over all tenants: what starts together passes every hop together. Larger crowds
keep who comes in their midst waiting, smaller ones cost frames and transactions. What one tenant may start while
others are there is less (`state.CROWD`).
"""
AGENT_GRACE_S: Final = 2.0
"""How long an accepted message waits for an agent that this router does not know before it ends with AGENT_GONE."""
_AGENT_LOOK_S: Final = 0.25


class Starter:
    """Makes the items that start turns. `started` is told of each that is durable, `dropped` of those that did not
    start, `ended` of messages that end without a turn, `message_ended` of cancelled ones; `ready` has a session looked
    at again.
    """

    def __init__(
        self,
        state: RouterState,
        dispatcher: Dispatcher,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        *,
        started: Callable[[Turn], None],
        dropped: Callable[[Turn], None],
        ended: Callable[[EndItem], None],
        message_ended: Callable[[Session, QueuedMessage], ControlItem | None],
        ready: Callable[[Session], None],
    ) -> None:
        self._state = state
        self._dispatcher = dispatcher
        self._spawn = spawn
        self._on_started = started
        self._on_dropped = dropped
        self._ended = ended
        self._message_ended = message_ended
        self._ready = ready
        self._revisions: dict[tuple[str, str, str], None] = {}
        self._room = self._all_room = 0
        self._made: list[Turn] = []
        """Turns of the group that is open."""
        self._made_before: list[Turn] = []

    def open_group(self) -> None:
        """Called once for each group, before anything starts in it."""
        self._state.scheduler.open_group()
        self._made_before, self._made = self._made, []
        self.count_room()

    def count_room(self) -> None:
        """How many turns may still start in the group: not more than the brains take beside those that are neither
        durable nor given to a brain yet, of this group and the one before.
        """
        made = chain(self._made_before, self._made)
        waiting = sum(t.link is None and t.session.turn is t and not self._state.runs(t) for t in made)
        room, started = self._dispatcher.room - waiting, self._state.scheduler.started_in_group
        self._room = min(room, _STARTS_PER_GROUP - started)
        self._all_room = room + started

    def start_now(self, session: Session | None, message: QueuedMessage) -> StartItem | None:
        """Starts the turn of a message that is ingested in the same group; None if it has to wait in line."""
        if session is None or not session.idle or session.paused or message.fault or self._room <= 0:
            return None
        if message.policy == Policy.ACCUMULATE and message.debounce_s > 0:
            return None
        if not self._state.scheduler.may_start(session.key):
            return None
        if self._state.directory.agent(session.key.tenant, session.key.agent) is None:
            return None
        self._state.busy(session)
        self._room -= 1
        return self._start(session, [message], fresh=True)

    def start_waiting(self) -> Iterable[CommitItem]:
        """Starts turns of waiting sessions in fair order, as many as the brains take."""
        for session in self._state.scheduler.pick(self._room):
            item = self._next_of(session)
            if item is not None:
                yield item

    @property
    def has_room(self) -> bool:
        """Whether the present group may start more turns."""
        return self._room > 0

    @property
    def left_some(self) -> bool:
        """Whether more could be started than one group takes: they go with the next."""
        scheduler = self._state.scheduler
        return scheduler.startable and self._all_room > scheduler.started_in_group

    def end_first(self, session: Session) -> EndItem:
        """Ends the first waiting message, which no brain is to see: that needs no room and no gate."""
        message = self._state.dequeue(session)
        if message.cancelled:
            return self._skip(session, message)
        return self._refuse(session, message, message.fault)

    def _next_of(self, session: Session) -> CommitItem | None:
        if session.turn is not None or not session.queue or session.paused or session.refusing:
            # Since it was found ready; whatever ends that makes it ready again. What is refused is stored first: a new
            # owner would find it among the inputs of the turn.
            return None
        if session.queue[0].ends_alone:
            return self.end_first(session)
        if self._state.directory.agent(session.key.tenant, session.key.agent) is None:
            if self._may_still_come(session, session.queue[0]):
                return None
            return self._refuse(session, self._state.dequeue(session), ErrorReason.ERROR_REASON_AGENT_GONE)
        inputs = [self._state.dequeue(session) for _ in range(next_inputs(session.queue))]
        return self._start(session, inputs, fresh=False)

    def _may_still_come(self, session: Session, message: QueuedMessage) -> bool:
        """An agent that this router does not know may be so new that the gateway heard of it first: waits a little."""
        now = monotonic()
        if not message.agent_missed_at:
            message.agent_missed_at = now
        if now - message.agent_missed_at >= AGENT_GRACE_S:
            return False
        self._spawn(self._look_again(session))
        return True

    async def _look_again(self, session: Session) -> None:
        await asyncio.sleep(_AGENT_LOOK_S)
        self._ready(session)

    def _start(self, session: Session, inputs: list[QueuedMessage], *, fresh: bool) -> StartItem:
        key = session.key
        agent = self._state.directory.agent(key.tenant, key.agent)
        assert agent is not None, "the caller has looked"
        turn = self._new_turn(session, inputs, agent.revision)
        self._made.append(turn)
        known = (key.tenant, key.agent, agent.revision)
        spec = None if known in self._revisions else agent.spec.SerializeToString()
        return StartItem(session.partition, turn, spec, fresh, self._started)

    def _new_turn(self, session: Session, inputs: list[QueuedMessage], revision: str) -> Turn:
        first, number = inputs[0], session.turn_count + 1
        generation = 0
        if first.fault == KEY_REUSED:
            # A key that was used again names the message that had it first: the error about it is a turn of its own.
            generation = first.position
        elif first.rolled_back:
            generation = replacement(number)
        turn = Turn(
            ids.turn_id(session.id, first.message_id, generation),
            session,
            number,
            inputs,
            revision,
            any(message.deliver for message in inputs),
        )
        session.turn = turn
        self._state.scheduler.started(session.key)
        return turn

    def _started(self, item: StartItem, result: GroupResult) -> None:
        turn = item.turn
        if turn.id not in result.started:
            # The message turned out to be a retry, or its key was used for something else: the mailbox knows, not
            # this turn.
            session = turn.session
            if session.turn is not turn:
                return  # that was found before
            for message in reversed(turn.inputs):
                if message.position in session.partition.pending and not message.fault:
                    # It is in the mailbox, written apart from this start because something in their group was refused.
                    message.cancelled = turn.status is TurnStatus.CONVERGING and turn.stop_as is Outcome.CANCELLED
                    self._state.requeue(session, message)
            self._on_dropped(turn)
            return
        if item.spec is not None:
            key = turn.session.key
            self._revisions[key.tenant, key.agent, turn.revision] = None
            while len(self._revisions) > _REVISIONS_KNOWN:
                del self._revisions[next(iter(self._revisions))]
        self._on_started(turn)

    def was_known(self, session: Session | None, message: QueuedMessage) -> None:
        """A message of this group is a retry: the turn that was to start for it is none, and what comes behind it in
        the group must not meet it.
        """
        turn = session.turn if session is not None else None
        if turn is not None and turn.inputs[0] is message:
            self._on_dropped(turn)

    def _refuse(self, session: Session, message: QueuedMessage, reason: int) -> EndItem:
        """Ends a turn as it starts: no brain can answer this message."""
        return failure(self._new_turn(session, [message], ""), explained(reason), self._ended, is_new=True)

    def _skip(self, session: Session, message: QueuedMessage) -> EndItem:
        """Ends a turn as it starts: it was cancelled before any brain saw it."""
        turn = self._new_turn(session, [message], "")
        turn.in_flight = turn.ending = True
        item = EndItem(session.partition, turn, Outcome.CANCELLED, [], Delivery(), self._ended, is_new=True)
        item.control = self._message_ended(session, message)
        return item


def failure(
    turn: Turn, error: Error, ended: Callable[[EndItem], None], is_new: bool = False, dead_letter: str = ""
) -> EndItem:
    """Ends a turn with an error as its last step."""
    turn.in_flight = turn.ending = True
    body = StepBody(format=STEP_FORMAT, failure=error).SerializeToString()
    return EndItem(
        turn.session.partition,
        turn,
        Outcome.ERROR,
        [(StepKind.FAILURE, body)],
        Delivery(error=error),
        ended,
        is_new,
        dead_letter,
    )


def explained(reason: int) -> Error:
    """An error that this router itself ends a turn with, and what to do about it."""
    return Error(reason=reason, message=_EXPLAIN.get(reason, "the message cannot be answered"))  # type: ignore[arg-type]


_EXPLAIN: Final[dict[int, str]] = {
    ErrorReason.ERROR_REASON_AGENT_GONE: "the agent was deleted after the message was accepted; send to another agent",
    ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED: (
        "the idempotency key was used in this session for a message with other content; use a new key for a new message"
    ),
    ErrorReason.ERROR_REASON_SCHEMA_UNKNOWN: "the message has a schema version that this release does not know",
    ErrorReason.ERROR_REASON_ITEM_CORRUPT: "the stored message cannot be read",
}
