"""Stops turns: a cancel reaches its session in order, and a stopped turn ends only once it has converged.

Converged: every call that the turn was confirmed has its result, or will never run because the tool gateway holds a
tombstone for its key. Only then is the transcript closed, and the next turn begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog
from soma.common.v1.turn_pb2 import Delivery

from services.router.application.dispatch_turns import RETRY_S, Dispatcher
from services.router.application.items import CancelItem, EndItem
from services.router.domain.session import PendingCancel, QueuedMessage, Session, Turn
from services.router.domain.turn import Outcome, StepKind, TurnState, TurnStatus
from soma_common import ids

if TYPE_CHECKING:
    from services.router.application.commit_group import GroupCommitter
    from services.router.application.ports import ToolCanceller
    from services.router.application.state import RouterState

log = structlog.get_logger(__name__)


class Canceller:
    """Applies cancels. `ended` is told of turns that are over."""

    def __init__(
        self,
        state: RouterState,
        dispatcher: Dispatcher,
        tools: ToolCanceller,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        ended: Callable[[EndItem], None],
    ) -> None:
        self._state = state
        self._dispatcher = dispatcher
        self._tools = tools
        self._spawn = spawn
        self._ended = ended
        self.committer: GroupCommitter

    def cancel(self, session: Session, position: int, target: bytes | None) -> None:
        """A cancel reaches the session: it stops the turn that runs, else the next of what was accepted before it; or
        only the turn that it names."""
        cancel = PendingCancel(position)
        session.cancels.append(cancel)
        self._state.busy(session)
        turn = session.turn
        stopped: Turn | None = None
        if turn is not None and turn.inputs[0].position < position and target in (None, turn.id):
            stopped = turn
            if turn.status is TurnStatus.RUNNING:
                turn.status = TurnStatus.CONVERGING
                turn.stop()
        elif (message := _queued_target(session, position, target, turn is None)) is not None:
            # It ends without a turn when it comes to it, in its order; until then the cancel is not done with.
            message.cancelled = True
            cancel.waits_for = message
        self._settle(session, stopped)

    def _settle(self, session: Session, stopped: Turn | None = None) -> None:
        """Notes durably how far the session's cancels are done with, and which turn is to converge."""
        done: list[int] = []
        while session.cancels and session.cancels[0].waits_for is None:
            done.append(session.cancels.popleft().position)
        if done or stopped is not None:
            self.committer.put(
                CancelItem(session.partition, session.id, session.key.tenant, done, stopped, self._stored)
            )

    def message_ended(self, session: Session, message: QueuedMessage) -> None:
        """A waiting message that was cancelled has come to its end: the cancel is done with."""
        for cancel in session.cancels:
            if cancel.waits_for is message:
                cancel.waits_for = None
        self._settle(session)

    def _stored(self, item: CancelItem) -> None:
        for position in item.positions:
            item.partition.pending.pop(position, None)
        turn = item.turn
        if turn is not None and self._state.runs(turn) and not turn.in_flight:
            self._spawn(self.converge(turn))
        session = item.partition.sessions.get(item.session_id)
        if session is not None and session.idle:
            self._state.idle(session)

    async def converge(self, turn: Turn) -> None:
        """Closes the calls that the stopped turn was confirmed, then ends it: the transcript is valid for any model."""
        if not await self._dispatcher.ensure_journal(turn):
            return
        steps: list[tuple[StepKind, bytes]] = []
        key = turn.session.key
        while turn.state is TurnState.TOOL_CALL and self._state.runs(turn):
            try:
                results = await self._tools.settle(
                    key.tenant, turn.id, turn.step_count, turn.journal[-1], (key.agent, key.channel, key.session)
                )
            except ConnectionError as error:
                log.warning("router.converge_waits", turn=turn.id.hex(), error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            steps.append((StepKind.TOOL_RESULTS, results))
            break
        if self._state.runs(turn) and not turn.in_flight:
            turn.in_flight = True
            self.committer.put(EndItem(turn.session.partition, turn, Outcome.CANCELLED, steps, Delivery(), self._ended))


def _queued_target(session: Session, position: int, target: bytes | None, nothing_runs: bool) -> QueuedMessage | None:
    """The waiting message that a cancel means: the one whose turn it names, or the next if it names none."""
    for message in session.queue:
        if message.position > position:
            return None
        if target is None:
            if nothing_runs and not message.cancelled:
                return message
        elif ids.turn_id(session.id, message.message_id) == target:
            return message
    return None
