"""Runs turns: from the start of a turn to its outcome, over any number of brains that may die at any step.

The rules of the turn protocol that live here: what a brain says counts only when the start of its turn is durable; it
is confirmed only what is journaled; an item of an older dispatch or another link is ignored; a turn has one step on its
way to the journal at a time; a final is taken only when it has seen every input.

How turns start is in `start_turns.py` and `start_ahead.py`, how they are stopped in `stop_turns.py`, what messages do
that arrive in `take_arrivals.py`, and who runs a turn in `dispatch_turns.py`.
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
from soma.common.v1.turn_pb2 import Delivery

from services.router.application.control_sessions import SessionControls
from services.router.application.dispatch_turns import Dispatcher
from services.router.application.items import DispatchItem, StepItem
from services.router.application.outcomes import EndItem, RefusalItem
from services.router.application.start_ahead import Said, StartsAhead
from services.router.application.start_turns import Starter, explained, failure
from services.router.application.stop_turns import Stopper
from services.router.application.take_arrivals import Arrivals
from services.router.domain.session import BrainLink as TurnLink
from services.router.domain.session import Session, Turn
from services.router.domain.turn import InvalidTransition, Outcome, StepKind, TurnStatus, after
from soma_common.clock import monotonic
from soma_common.failpoints import failpoint
from soma_common.telemetry import spans
from soma_common.telemetry.metrics import counter, gauge, histogram

if TYPE_CHECKING:
    from services.router.application.brains import BrainPool
    from services.router.application.commit_group import GroupCommitter
    from services.router.application.ports import BrainLink, HistoryStore, ToolCanceller
    from services.router.application.state import RouterState
    from services.router.application.watch_turns import LiveDesk

_MAX_TEXT: Final = 1_000_000

log = structlog.get_logger(__name__)

TURNS = counter("soma_router_turns_total", "Turns ended, by outcome.", ["outcome"])
RUNNING = gauge("soma_router_turns_running", "Turns that run in this router.")
STALE = counter("soma_router_stale_items_total", "Items of brains that were ignored because their dispatch is over.")
TURN_SECONDS = histogram("soma_router_turn_seconds", "From the start of a turn's last dispatch to its durable end.")
_TURNS_BY_OUTCOME = {int(outcome): TURNS.labels(outcome.name.lower()) for outcome in Outcome}
_STEP_KINDS: Final = {int(kind): kind for kind in StepKind}


class TurnRunner:
    """Runs turns, over brains that come and go. Wires what starts turns, stops them and lets messages meet them."""

    def __init__(
        self,
        state: RouterState,
        brains: BrainPool,
        history: HistoryStore,
        tools: ToolCanceller,
        live: LiveDesk,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        on_outcome: Callable[[EndItem | RefusalItem], None],
        *,
        max_strikes: int,
        stuck_margin_s: float,
        convergence_timeout_s: float,
        start_ahead: bool,
    ) -> None:
        self._state = state
        self._brains = brains
        self._live = live
        self._spawn = spawn
        self._on_outcome = on_outcome
        self._max_strikes = max_strikes
        self._dispatcher = Dispatcher(state, brains, history, live, spawn, self._agent_gone, stuck_margin_s)
        self._ahead = StartsAhead(self._dispatcher, enabled=start_ahead)
        self.starts_ahead = start_ahead
        self.group_sent = self._ahead.give
        self.give_next = self._ahead.give_next
        self._stopper = Stopper(state, self._dispatcher, tools, spawn, self._ended, convergence_timeout_s)
        self.arrivals = Arrivals(state, self._stopper, history, live, spawn, self._refused, self._end_first)
        self.controls = SessionControls(state, self._stopper, self.arrivals.ready)
        self.starter = Starter(
            state,
            self._dispatcher,
            spawn,
            started=self._started,
            dropped=self._dropped,
            ended=self._ended,
            message_ended=self.controls.message_ended,
            ready=self.arrivals.ready,
        )
        self.assign = self._dispatcher.assign
        RUNNING.set_function(lambda: state.scheduler.running)

    def use(self, committer: GroupCommitter) -> None:
        """Names the committer that everything is written with; before anything runs."""
        self.committer = self._dispatcher.committer = self._stopper.committer = committer
        self.arrivals.committer = self.controls.committer = committer

    # ---- starting

    def _started(self, turn: Turn) -> None:
        self._state.running[turn.id] = turn
        failpoint("router.after_ingest_before_dispatch")
        ahead, link = self._ahead.collect(turn), turn.link
        if link is not None:
            turn.progress_at = monotonic()  # the time that the commit took was not the brain's
            self._dispatcher.announce(turn)
        if turn.status is not TurnStatus.RUNNING:
            self._stopper.stored(turn)  # it was stopped before it began
        elif link is None and not turn.ending:
            if ahead is not None:
                self._redispatch(turn, 1)  # whoever had it is gone
            elif self._ahead.is_spent(turn):
                self._redispatch(turn, 0)
            else:
                self._dispatcher.dispatch(turn)
        self.arrivals.meet(turn.session)
        if ahead is not None and link is not None:
            self._apply(turn, link, ahead.said)

    def _apply(self, turn: Turn, link: TurnLink, said: Iterable[Said]) -> None:
        """Takes what was said of a turn before its start was durable, as if it were said now."""
        if spans.watched and said:
            spans.stage("router.hold", (turn.id,))
        for item in said:
            if isinstance(item, Proposal):
                self.on_proposals(link, (item,))
            elif isinstance(item, TurnText):
                self.on_texts(link, (item,))
            else:
                self.on_declined(link, (item,))

    def _end_first(self, session: Session) -> EndItem:
        return self.starter.end_first(session)

    def _dropped(self, turn: Turn) -> None:
        self._ahead.withdraw(turn)
        turn.stop()
        self._release(turn)
        self._next(turn.session)

    def resume(self, turn: Turn) -> None:
        """Takes over a turn that the store says is running; its dispatch is already raised."""
        self._state.running[turn.id] = turn
        self._state.scheduler.started(turn.session.key)
        if turn.status is TurnStatus.CONVERGING:
            self._spawn(self._stopper.converge(turn))
        elif turn.strikes >= self._max_strikes:
            self._spawn(self._poisoned(turn))
        else:
            self._dispatcher.dispatch(turn)

    # ---- what brains say

    def on_proposals(self, link: TurnLink, proposals: Iterable[Proposal]) -> None:
        """Takes steps into the journal, if they are what comes next in their turn."""
        for proposal in proposals:
            turn = self._state.running.get(proposal.turn_id)
            if turn is None or turn.link is not link or turn.dispatch != proposal.dispatch:
                turn = self._ahead.end_next(link, proposal)
                if turn is not None:
                    self._take(turn, proposal)
                else:
                    self._hold(link, proposal)
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
            self._end(failure(turn, failed, self._ended))
            return
        if kind == StepKind.FINAL and proposal.inputs_seen < len(turn.inputs):
            STALE.inc()  # it has not read every input: what it proposes is no answer to the turn
            return
        turn.in_flight = True
        if kind in (StepKind.FINAL, StepKind.FAILURE):
            turn.ending = True
            answer = Delivery()
            outcome = Outcome.FINAL if kind == StepKind.FINAL else Outcome.ERROR
            try:
                (answer.message if kind == StepKind.FINAL else answer.error).ParseFromString(proposal.answer)
            except DecodeError:
                turn.stop()
                text = "the brain's answer cannot be read"
                corrupt = Error(reason=ErrorReason.ERROR_REASON_ITEM_CORRUPT, message=text)
                self._end(failure(turn, corrupt, self._ended))
                return
            steps = [(_STEP_KINDS[kind], proposal.body)]
            self._end(EndItem(turn.session.partition, turn, outcome, steps, answer, self._ended))
        else:
            step = StepItem(turn.session.partition, turn, _STEP_KINDS[kind], proposal.body, self._journaled)
            self.committer.put(step)

    def _end(self, item: EndItem) -> None:
        self._ahead.add_end(item)
        self.committer.put(item)

    def _journaled(self, item: StepItem) -> None:
        turn = item.turn
        failpoint("router.after_step_before_confirm")
        turn.in_flight = False
        turn.progress_at = monotonic()  # the time that the commit took was not the brain's
        turn.state = after(turn.state, item.kind)
        turn.journal.append(item.body)
        turn.text.clear()
        turn.text_length = 0
        self._live.step(turn, item.body)
        if turn.status is TurnStatus.CONVERGING:
            self._spawn(self._stopper.converge(turn))
        elif turn.link is not None:
            turn.link.confirm(turn.id, turn.dispatch, turn.step_count)

    def on_texts(self, link: TurnLink, texts: Iterable[TurnText]) -> None:
        """Passes live text on, if it continues what was shown of the running step."""
        now = monotonic()
        for text in texts:
            turn = self._state.running.get(text.turn_id)
            if turn is None or turn.link is not link or turn.dispatch != text.dispatch:
                self._hold(link, text)
                continue
            turn.progress_at = now
            if text.step != turn.step_count + 1 or text.offset != turn.text_length or turn.text_length > _MAX_TEXT:
                continue
            turn.text.append(text.text)
            turn.text_length += len(text.text)
            self._live.text(turn, text.offset, text.text)

    def on_declined(self, link: TurnLink, declined: Iterable[StopTurn]) -> None:
        """A brain does not run these turns (any more): they go elsewhere, without a strike."""
        for item in declined:
            turn = self._state.running.get(item.turn_id)
            if turn is not None and turn.link is link and turn.dispatch == item.dispatch:
                self._spawn(self._redispatch_after(turn, link, item.dispatch, item.error.retry_delay_ms / 1000))
            else:
                self._hold(link, item)

    def _hold(self, link: TurnLink, item: Said) -> None:
        """What is said of a turn that is ahead of its start waits for that; the rest is of a dispatch that is over."""
        if not self._ahead.hold(link, item):
            STALE.inc()

    async def _redispatch_after(self, turn: Turn, link: TurnLink, dispatch: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if self._state.runs(turn) and turn.link is link and turn.dispatch == dispatch:
            self._redispatch(turn, 0)

    def on_link_down(self, link: BrainLink) -> None:
        """A brain is gone: what it ran goes on elsewhere from the journal."""
        self._brains.remove(link)
        self._ahead.link_down(link)
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
                self._spawn(self._stopper.converge(turn))
            elif turn.link is not None:
                log.warning("router.turn_stuck", turn=turn.id.hex(), tenant=turn.session.key.tenant)
                turn.stop()
                self._redispatch(turn, 1)

    def _redispatch(self, turn: Turn, strikes: int) -> None:
        turn.let_go()  # from here on nothing that its brain says counts
        turn.strikes += strikes
        if turn.status is TurnStatus.CONVERGING:
            return  # what it has said so far is kept, and nobody runs it again
        turn.text.clear()
        turn.text_length = 0
        self.committer.put(DispatchItem(turn.session.partition, turn, self._redispatched, turn.dispatch + 1))

    def _redispatched(self, turn: Turn) -> None:
        # Behind everything of the former dispatch that was on its way: what the journal got is in memory by now.
        if not self._state.runs(turn) or turn.link is not None or turn.status is not TurnStatus.RUNNING:
            return
        if turn.strikes >= self._max_strikes:
            self._spawn(self._poisoned(turn))
        else:
            self._dispatcher.dispatch(turn)

    # ---- ending

    def _agent_gone(self, turn: Turn, dispatch: int) -> None:
        if self._state.runs(turn) and turn.dispatch == dispatch and not turn.in_flight:
            turn.stop()
            self.committer.put(failure(turn, explained(ErrorReason.ERROR_REASON_AGENT_GONE), self._ended))

    async def _poisoned(self, turn: Turn) -> None:
        if not await self._dispatcher.ensure_journal(turn):
            return
        text = f"the turn's brain or router died {turn.strikes} times while it ran; it is set aside as a dead letter"
        error = Error(reason=ErrorReason.ERROR_REASON_TURN_POISONED, message=text)
        if self._state.runs(turn) and not turn.in_flight:
            self.committer.put(failure(turn, error, self._ended, dead_letter=text))

    def _ended(self, item: EndItem) -> None:
        turn, session = item.turn, item.turn.session
        failpoint("router.after_commit_before_delivery")
        session.turn_count = turn.number
        if item.outcome is Outcome.ABSORBED:
            for message in reversed(turn.inputs):
                message.rolled_back = True
                self._state.requeue(session, message)
        else:
            for message in turn.inputs:
                session.partition.pending.discard(message.position)
            self._remember(turn, item)
        if turn.link is not None and not item.is_new:
            turn.link.confirm_end(turn.id, turn.dispatch, turn.step_count + len(item.steps))
        if turn.started_at:
            TURN_SECONDS.observe(monotonic() - turn.started_at)
        _TURNS_BY_OUTCOME[item.outcome].inc()
        self._release(turn)
        self._live.ended(turn, item.answer)
        if item.delivers:
            self._on_outcome(item)
        self._next(session)

    def _remember(self, turn: Turn, item: EndItem) -> None:
        """The session's next turn knows what was said in this one."""
        session = turn.session
        said = [message.content for message in turn.inputs if message.content is not None]
        if len(said) < len(turn.inputs):
            session.forget_context()
            return
        if item.answer.HasField("message"):
            said.append(item.answer.message.SerializeToString())
        session.remember(said, turn.context_limit)

    def _refused(self, item: RefusalItem) -> None:
        _TURNS_BY_OUTCOME[Outcome.REJECTED].inc()
        if item.turn.deliver:
            self._on_outcome(item)

    def _release(self, turn: Turn) -> None:
        """Frees the turn's place and the brain's credit."""
        self._state.running.pop(turn.id, None)
        self._state.scheduler.ended(turn.session.key)
        turn.session.turn = None
        turn.let_go()

    def _next(self, session: Session) -> None:
        if session.queue:
            self.arrivals.ready(session)
        elif session.idle:
            self._state.idle(session)
        if self._dispatcher.waiting:
            self._dispatcher.assign()
        elif self._state.scheduler.startable:
            self.committer.nudge()

    def end_terms(self, turns: Iterable[Turn]) -> None:
        """Lets go of turns whose partition is not ours any more."""
        for turn in turns:
            self._ahead.withdraw(turn)
            turn.stop()
            turn.let_go()
