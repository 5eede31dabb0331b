"""Runs turns: from the start of a turn to its outcome, over any number of brains that may die at any step.

The rules of the turn protocol that live here: a brain is told to start only what is durable; it is confirmed only
what is journaled; an item of an older dispatch or another link is ignored; a turn has one step on its way to the
journal at a time; a stopped turn ends only when every call it was confirmed has a result or will never run (it has
*converged*).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Final

import structlog
from google.protobuf.message import DecodeError
from soma.cognition.v1.cognition_service_pb2 import Proposal, StopTurn, TurnText
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery, StepBody

from services.router.application.cancel_turns import Canceller
from services.router.application.dispatch_turns import Dispatcher
from services.router.application.group import CommitItem, GroupResult
from services.router.application.items import KEY_REUSED, DispatchItem, EndItem, StartItem, StepItem
from services.router.domain.session import QueuedMessage, Session, Turn
from services.router.domain.turn import InvalidTransition, Outcome, StepKind, TurnStatus, after
from soma_common import ids
from soma_common.clock import monotonic
from soma_common.failpoints import failpoint
from soma_common.telemetry.metrics import counter, gauge, histogram

if TYPE_CHECKING:
    from services.router.application.brains import BrainPool
    from services.router.application.commit_group import GroupCommitter
    from services.router.application.ports import BrainLink, HistoryStore, ToolCanceller
    from services.router.application.state import RouterState
    from services.router.application.watch_turns import LiveDesk

STEP_FORMAT: Final = 1
DEFAULT_CONTEXT: Final = 100
DEFAULT_STEP_TIMEOUT_MS: Final = 60_000
MAX_CONTEXT_BYTES: Final = 1024 * 1024
_MAX_TEXT: Final = 1_000_000
_REVISIONS_KNOWN: Final = 4096
_CONVERGE_RETRY_S: Final = 0.5
AGENT_GRACE_S: Final = 2.0
"""How long an accepted message waits for an agent that this router does not know before it ends with AGENT_GONE."""
_AGENT_LOOK_S: Final = 0.25

log = structlog.get_logger(__name__)

TURNS = counter("soma_router_turns_total", "Turns ended, by outcome.", ["outcome"])
RUNNING = gauge("soma_router_turns_running", "Turns that run in this router.")
STALE = counter("soma_router_stale_items_total", "Items of brains that were ignored because their dispatch is over.")
TURN_SECONDS = histogram("soma_router_turn_seconds", "From the start of a turn's last dispatch to its durable end.")
_TURNS_BY_OUTCOME = {outcome: TURNS.labels(outcome.name.lower()) for outcome in Outcome}


class TurnRunner:
    """Starts, journals, ends, stops and restarts turns."""

    def __init__(
        self,
        state: RouterState,
        brains: BrainPool,
        history: HistoryStore,
        tools: ToolCanceller,
        live: LiveDesk,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        on_ended: Callable[[EndItem], None],
        *,
        max_strikes: int,
        stuck_margin_s: float,
    ) -> None:
        self._state = state
        self._brains = brains
        self._live = live
        self._spawn = spawn
        self._on_ended = on_ended
        self._max_strikes = max_strikes
        self._dispatcher = Dispatcher(state, brains, history, live, spawn, self._agent_gone, stuck_margin_s)
        self._canceller = Canceller(state, self._dispatcher, tools, spawn, self._ended)
        self.assign = self._dispatcher.assign
        self.cancel = self._canceller.cancel
        self._revisions: dict[tuple[str, str, str], None] = {}
        self._room = 0
        RUNNING.set_function(lambda: state.scheduler.running)

    def use(self, committer: GroupCommitter) -> None:
        """Names the committer that everything is written with; before anything runs."""
        self.committer = self._dispatcher.committer = self._canceller.committer = committer

    # ---- starting

    def open_group(self) -> None:
        """Called before each group: turns started in it may not be more than the brains take."""
        self._room = self._dispatcher.room

    def start_now(self, session: Session | None, message: QueuedMessage) -> StartItem | None:
        """Starts the turn of a message that is ingested in the same group; None if it has to wait in line."""
        if session is None or not session.idle or message.fault or self._room <= 0:
            return None
        if not self._state.scheduler.may_start(session.key):
            return None
        if self._state.directory.agent(session.key.tenant, session.key.agent) is None:
            return None
        self._state.busy(session)
        self._room -= 1
        return self._start(session, message, fresh=True)

    def start_waiting(self) -> Iterable[CommitItem]:
        """Starts turns of waiting sessions in fair order, as many as the brains take."""
        for session in self._state.scheduler.pick(self._room):
            message = self._state.dequeue(session)
            if message.cancelled:
                yield self._skip(session, message)
            elif message.fault:
                yield self._refuse(session, message, message.fault)
            elif self._state.directory.agent(session.key.tenant, session.key.agent) is None:
                if self._may_still_come(session, message):
                    continue
                yield self._refuse(session, message, ErrorReason.ERROR_REASON_AGENT_GONE)
            else:
                yield self._start(session, message, fresh=False)

    def _may_still_come(self, session: Session, message: QueuedMessage) -> bool:
        """An agent that this router does not know may be so new that the gateway heard of it first: waits a little."""
        now = monotonic()
        if not message.agent_missed_at:
            message.agent_missed_at = now
        if now - message.agent_missed_at >= AGENT_GRACE_S:
            return False
        self._state.requeue(session, message)
        self._spawn(self._look_again(session))
        return True

    async def _look_again(self, session: Session) -> None:
        await asyncio.sleep(_AGENT_LOOK_S)
        if not session.partition.lost and session.turn is None and session.queue:
            self._state.scheduler.add(session)
            self.committer.nudge()

    def _start(self, session: Session, message: QueuedMessage, *, fresh: bool) -> StartItem:
        key = session.key
        agent = self._state.directory.agent(key.tenant, key.agent)
        assert agent is not None, "the caller has looked"
        turn = self._new_turn(session, message, agent.revision)
        known = (key.tenant, key.agent, agent.revision)
        spec = None if known in self._revisions else agent.spec.SerializeToString()
        return StartItem(session.partition, turn, spec, fresh, self._started)

    def _new_turn(self, session: Session, message: QueuedMessage, revision: str) -> Turn:
        # A key that was used again names the message that had it first: the error about it is a turn of its own.
        generation = message.position if message.fault == KEY_REUSED else 0
        turn = Turn(
            ids.turn_id(session.id, message.message_id, generation),
            session,
            session.turn_count + 1,
            [message],
            revision,
            message.deliver,
        )
        session.turn = turn
        self._state.scheduler.started(session.key)
        return turn

    def _started(self, item: StartItem, result: GroupResult) -> None:
        turn = item.turn
        session = turn.session
        if turn.id not in result.started:
            # The message turned out to be a retry, or its key was used for something else: the mailbox knows, not
            # this turn.
            self._release(turn)
            message = turn.inputs[0]
            if message.position in session.partition.pending and not message.fault:
                # It is in the mailbox, written apart from this start because something in their group was refused.
                self._state.requeue(session, message)
            self._next(session)
            return
        if item.spec is not None:
            key = session.key
            self._revisions[key.tenant, key.agent, turn.revision] = None
            while len(self._revisions) > _REVISIONS_KNOWN:
                del self._revisions[next(iter(self._revisions))]
        self._state.running[turn.id] = turn
        failpoint("router.after_ingest_before_dispatch")
        if turn.status is TurnStatus.RUNNING:
            self._dispatcher.dispatch(turn)

    def _refuse(self, session: Session, message: QueuedMessage, reason: int) -> EndItem:
        """Ends a turn as it starts: no brain can answer this message."""
        turn = self._new_turn(session, message, "")
        return self._failure(turn, _explained(reason), is_new=True)

    def _skip(self, session: Session, message: QueuedMessage) -> EndItem:
        """Ends a turn as it starts: it was cancelled before any brain saw it."""
        turn = self._new_turn(session, message, "")
        turn.in_flight = True
        self._canceller.message_ended(session, message)
        return EndItem(session.partition, turn, Outcome.CANCELLED, [], Delivery(), self._ended, is_new=True)

    def resume(self, turn: Turn) -> None:
        """Takes over a turn that the store says is running; its dispatch is already raised."""
        self._state.running[turn.id] = turn
        self._state.scheduler.started(turn.session.key)
        if turn.status is TurnStatus.CONVERGING:
            self._spawn(self._canceller.converge(turn))
        elif turn.strikes >= self._max_strikes:
            self._spawn(self._poisoned(turn))
        else:
            self._dispatcher.dispatch(turn)

    # ---- what brains say

    def on_proposals(self, link: BrainLink, proposals: Iterable[Proposal]) -> None:
        """Takes steps into the journal, if they are what comes next in their turn."""
        for proposal in proposals:
            turn = self._state.running.get(proposal.turn_id)
            if turn is None or turn.link is not link or turn.dispatch != proposal.dispatch:
                STALE.inc()
                continue
            turn.progress_at = monotonic()
            if turn.in_flight or proposal.step != turn.step_count + 1 or turn.status is not TurnStatus.RUNNING:
                STALE.inc()
                continue
            self._take(turn, proposal)

    def _take(self, turn: Turn, proposal: Proposal) -> None:
        kind = int(proposal.kind)
        try:
            after(turn.state, kind)
        except InvalidTransition as error:
            log.error("router.invalid_transition", turn=turn.id.hex(), error=str(error))
            turn.stop()
            failed = Error(reason=ErrorReason.ERROR_REASON_INVALID_TRANSITION, message=str(error))
            self.committer.put(self._failure(turn, failed))
            return
        if kind == StepKind.FINAL and proposal.inputs_seen < len(turn.inputs):
            STALE.inc()  # it has not read every input: what it proposes is no answer to the turn
            return
        turn.in_flight = True
        if kind in (StepKind.FINAL, StepKind.FAILURE):
            answer = Delivery()
            outcome = Outcome.FINAL if kind == StepKind.FINAL else Outcome.ERROR
            try:
                (answer.message if kind == StepKind.FINAL else answer.error).ParseFromString(proposal.answer)
            except DecodeError:
                turn.stop()
                text = "the brain's answer cannot be read"
                self.committer.put(
                    self._failure(turn, Error(reason=ErrorReason.ERROR_REASON_ITEM_CORRUPT, message=text))
                )
                return
            steps = [(StepKind(kind), proposal.body)]
            self.committer.put(EndItem(turn.session.partition, turn, outcome, steps, answer, self._ended))
        else:
            self.committer.put(StepItem(turn.session.partition, turn, StepKind(kind), proposal.body, self._journaled))

    def _journaled(self, item: StepItem) -> None:
        turn = item.turn
        failpoint("router.after_step_before_confirm")
        turn.in_flight = False
        turn.state = after(turn.state, item.kind)
        turn.journal.append(item.body)
        turn.text.clear()
        turn.text_length = 0
        self._live.step(turn, item.body)
        if turn.status is TurnStatus.CONVERGING:
            self._spawn(self._canceller.converge(turn))
        elif turn.link is not None:
            turn.link.confirm(turn.id, turn.dispatch, turn.step_count)

    def on_texts(self, link: BrainLink, texts: Iterable[TurnText]) -> None:
        """Passes live text on, if it continues what was shown of the running step."""
        now = monotonic()
        for text in texts:
            turn = self._state.running.get(text.turn_id)
            if turn is None or turn.link is not link or turn.dispatch != text.dispatch:
                STALE.inc()
                continue
            turn.progress_at = now
            if text.step != turn.step_count + 1 or text.offset != turn.text_length or turn.text_length > _MAX_TEXT:
                continue
            turn.text.append(text.text)
            turn.text_length += len(text.text)
            self._live.text(turn, text.offset, text.text)

    def on_declined(self, link: BrainLink, declined: Iterable[StopTurn]) -> None:
        """A brain does not run these turns (any more): they go elsewhere, without a strike."""
        for item in declined:
            turn = self._state.running.get(item.turn_id)
            if turn is not None and turn.link is link and turn.dispatch == item.dispatch:
                self._spawn(self._redispatch_after(turn, link, item.error.retry_delay_ms / 1000))

    async def _redispatch_after(self, turn: Turn, link: BrainLink, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if self._state.runs(turn) and turn.link is link:
            self._redispatch(turn, 0)

    def on_link_down(self, link: BrainLink) -> None:
        """A brain is gone: what it ran goes on elsewhere from the journal."""
        self._brains.remove(link)
        for turn in [turn for turn in self._state.running.values() if turn.link is link]:
            self._redispatch(turn, 1)

    def restart_stuck(self) -> None:
        """Restarts turns of which nothing was heard for too long; called twice a second."""
        self._dispatcher.assign()
        now = monotonic()
        for turn in list(self._state.running.values()):
            if turn.in_flight or now - turn.progress_at <= turn.patience_s:
                continue
            turn.progress_at = now
            if turn.status is TurnStatus.CONVERGING:
                self._spawn(self._canceller.converge(turn))
            elif turn.link is not None:
                log.warning("router.turn_stuck", turn=turn.id.hex(), tenant=turn.session.key.tenant)
                turn.stop()
                self._redispatch(turn, 1)

    def _redispatch(self, turn: Turn, strikes: int) -> None:
        turn.let_go()
        turn.dispatch += 1
        turn.strikes += strikes
        turn.text.clear()
        turn.text_length = 0
        if turn.status is TurnStatus.CONVERGING:
            return
        self.committer.put(DispatchItem(turn.session.partition, turn, self._redispatched))

    def _redispatched(self, turn: Turn) -> None:
        # Behind everything of the former dispatch that was on its way: what the journal got is in memory by now.
        if not self._state.runs(turn) or turn.link is not None or turn.status is not TurnStatus.RUNNING:
            return
        if turn.strikes >= self._max_strikes:
            self._spawn(self._poisoned(turn))
        else:
            self._dispatcher.dispatch(turn)

    # ---- ending

    def _failure(self, turn: Turn, error: Error, is_new: bool = False, dead_letter: str = "") -> EndItem:
        turn.in_flight = True
        body = StepBody(format=STEP_FORMAT, failure=error).SerializeToString()
        answer = Delivery(error=error)
        return EndItem(
            turn.session.partition,
            turn,
            Outcome.ERROR,
            [(StepKind.FAILURE, body)],
            answer,
            self._ended,
            is_new,
            dead_letter,
        )

    def _agent_gone(self, turn: Turn, dispatch: int) -> None:
        if self._state.runs(turn) and turn.dispatch == dispatch and not turn.in_flight:
            turn.stop()
            self.committer.put(self._failure(turn, _explained(ErrorReason.ERROR_REASON_AGENT_GONE)))

    async def _poisoned(self, turn: Turn) -> None:
        if not await self._dispatcher.ensure_journal(turn):
            return
        text = f"the turn's brain or router died {turn.strikes} times while it ran; it is set aside as a dead letter"
        error = Error(reason=ErrorReason.ERROR_REASON_TURN_POISONED, message=text)
        if self._state.runs(turn) and not turn.in_flight:
            self.committer.put(self._failure(turn, error, dead_letter=text))

    def _ended(self, item: EndItem) -> None:
        turn, session = item.turn, item.turn.session
        failpoint("router.after_commit_before_delivery")
        session.turn_count = turn.number
        if turn.deliver:
            session.delivery_count += 1
        for message in turn.inputs:
            session.partition.pending.pop(message.position, None)
        said = [message.content for message in turn.inputs if message.content is not None]
        if len(said) < len(turn.inputs):
            session.context = None
        else:
            if item.outcome is Outcome.FINAL:
                said.append(item.answer.message.SerializeToString())
            session.remember(said, turn.context_limit)
        if turn.link is not None and not item.is_new:
            turn.link.confirm(turn.id, turn.dispatch, turn.step_count + len(item.steps))
        if turn.started_at:
            TURN_SECONDS.observe(monotonic() - turn.started_at)
        _TURNS_BY_OUTCOME[item.outcome].inc()
        self._release(turn)
        self._live.ended(turn, item.answer)
        self._on_ended(item)
        self._next(session)

    def _release(self, turn: Turn) -> None:
        """Frees the turn's place and the brain's credit."""
        self._state.running.pop(turn.id, None)
        self._state.scheduler.ended(turn.session.key)
        turn.session.turn = None
        turn.let_go()

    def _next(self, session: Session) -> None:
        if session.queue:
            self._state.scheduler.add(session)
        else:
            self._state.idle(session)
        if self._dispatcher.waiting:
            self._dispatcher.assign()
        elif self._state.scheduler.startable:
            self.committer.nudge()

    def end_terms(self, turns: Iterable[Turn]) -> None:
        """Lets go of turns whose partition is not ours any more."""
        for turn in turns:
            turn.stop()
            turn.let_go()


def _explained(reason: int) -> Error:
    return Error(reason=reason, message=_EXPLAIN.get(reason, "the message cannot be answered"))  # type: ignore[arg-type]


_EXPLAIN: Final[dict[int, str]] = {
    ErrorReason.ERROR_REASON_AGENT_GONE: "the agent was deleted after the message was accepted; send to another agent",
    ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED: (
        "the idempotency key was used in this session for a message with other content; use a new key for a new message"
    ),
    ErrorReason.ERROR_REASON_SCHEMA_UNKNOWN: "the message has a schema version that this release does not know",
    ErrorReason.ERROR_REASON_ITEM_CORRUPT: "the stored message cannot be read",
}
