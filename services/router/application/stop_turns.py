"""Stops turns: whoever runs one is told, and it ends only once it has converged.

Converged: every call that the turn was confirmed has its result, or will never run because the tool gateway holds a
tombstone for its key, or was waited for as long as may be: then its outcome is not known. Whether what a rolled back
turn's calls did is taken back, only the tool gateway knows, and it is asked until it says so. Only then is the
transcript closed, and the next turn begins. A stop is durable before anything follows from it, so that a new owner goes
on with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import structlog
from soma.common.v1.turn_pb2 import Delivery

from services.router.application.dispatch_turns import RETRY_S, Dispatcher
from services.router.application.items import ControlItem
from services.router.application.keep_work import final_step, has_calls, kept_work
from services.router.application.outcomes import EndItem
from services.router.domain.arrival import replacement
from services.router.domain.session import Turn
from services.router.domain.turn import Outcome, StepKind, TurnState, TurnStatus
from soma_common import ids
from soma_common.clock import monotonic
from soma_common.telemetry.metrics import counter

if TYPE_CHECKING:
    from services.router.application.commit_group import GroupCommitter
    from services.router.application.ports import ToolCanceller
    from services.router.application.state import RouterState

log = structlog.get_logger(__name__)

_MARGIN_S: Final = 5.0
"""How much longer than the tool gateway itself this router waits before it closes calls without its word."""

_LONGEST_PAUSE_S: Final = 5.0
"""Between two questions for the same undoing."""

STOPS = counter("soma_router_stops_total", "Turns stopped before their own end, by what they end with.", ["outcome"])
UNCONVERGED = counter(
    "soma_router_unconverged_total", "Stopped turns that were closed with calls whose outcome is not known."
)


class Stopper:
    """Brings stopped turns to their end. `ended` is told of turns that are over; `give_up_s` bounds the waiting for
    calls in flight.
    """

    def __init__(
        self,
        state: RouterState,
        dispatcher: Dispatcher,
        tools: ToolCanceller,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        ended: Callable[[EndItem], None],
        give_up_s: float,
    ) -> None:
        self._state = state
        self._dispatcher = dispatcher
        self._tools = tools
        self._spawn = spawn
        self._ended = ended
        self._give_up_s = give_up_s
        self.committer: GroupCommitter

    def stop(self, turn: Turn, outcome: Outcome) -> None:
        """Stops a turn for `outcome`, and has that stored. The first stop counts, but a cancel also ends what was to
        be rolled back.
        """
        if turn.status is TurnStatus.RUNNING:
            turn.status = TurnStatus.CONVERGING
            turn.stop_as = outcome
            turn.stopped_at = monotonic()
            turn.stop()
            STOPS.labels(outcome.name.lower()).inc()
        elif turn.stop_as is Outcome.ABSORBED and outcome is Outcome.CANCELLED and not turn.ending:
            turn.stop_as = outcome

    def stored(self, turn: Turn) -> None:
        """The stop is durable."""
        if self._state.runs(turn) and not turn.in_flight:
            self._spawn(self.converge(turn))

    def item(self, turn: Turn) -> ControlItem:
        """Stores a stop that no control of the session asked for."""
        session = turn.session
        return ControlItem(
            session.partition,
            session.id,
            session.key.tenant,
            [],
            lambda item: self.stored(turn),
            turn=turn,
            stop_as=turn.stop_as,
        )

    async def converge(self, turn: Turn) -> None:
        """Closes the calls that the stopped turn was confirmed, then ends it: the transcript is valid for any model."""
        if not await self._dispatcher.ensure_journal(turn):
            return
        steps: list[tuple[StepKind, bytes]] = []
        if turn.state is TurnState.TOOL_CALL:
            results = await self._close_calls(turn)
            if results is None:
                return
            steps.append((StepKind.TOOL_RESULTS, results))
        journal = [*turn.journal, *(body for _, body in steps)]
        outcome = turn.stop_as
        if outcome is Outcome.ABSORBED and has_calls(journal) and not await self._undone(turn):
            outcome = Outcome.INTERRUPTED
        if turn.stop_as is Outcome.CANCELLED:
            outcome = Outcome.CANCELLED  # it came while the calls were undone
        if not self._state.runs(turn) or turn.in_flight:
            return
        answer = Delivery()
        if outcome is Outcome.ABSORBED:
            first = turn.inputs[0]
            answer.absorbed_into = ids.turn_id(turn.session.id, first.message_id, replacement(turn.number + 1))
        if outcome is Outcome.INTERRUPTED:
            kept = kept_work(journal, "".join(turn.text))
            if kept is not None:
                answer.message.CopyFrom(kept)
                steps.append((StepKind.FINAL, final_step(kept, len(turn.inputs))))
        turn.in_flight = turn.ending = True
        turn.stop_as = outcome
        self.committer.put(EndItem(turn.session.partition, turn, outcome, steps, answer, self._ended))

    async def _close_calls(self, turn: Turn) -> bytes | None:
        """The results that close the calls in flight; None if the turn is somebody else's by now."""
        key = turn.session.key
        where = (key.agent, key.channel, key.session)
        while self._state.runs(turn):
            if not self._in_time(turn):
                log.error("router.calls_given_up", turn=turn.id.hex(), tenant=key.tenant)
                UNCONVERGED.inc()
                return self._tools.unknown(turn.journal[-1])
            try:
                return await self._tools.settle(
                    key.tenant, turn.id, turn.step_count, turn.journal[-1], where, self._give_up_s
                )
            except ConnectionError as error:
                log.warning("router.converge_waits", turn=turn.id.hex(), error=str(error))
                await asyncio.sleep(RETRY_S)
        return None

    def _in_time(self, turn: Turn) -> bool:
        """Whether the tool gateway is still waited for."""
        return monotonic() < turn.stopped_at + self._give_up_s + _MARGIN_S

    async def _undone(self, turn: Turn) -> bool:
        """Whether the work of a turn may be dropped: nothing is left of what its calls did. Asked for until there is an
        answer: from the first question on, of this owner or one before, calls may be being taken back, and a turn that
        ended meanwhile would tell of effects that are not there. Only a cancel ends the waiting, as it tells of none.
        """
        key = turn.session.key
        pause_s = RETRY_S
        while self._state.runs(turn) and turn.stop_as is Outcome.ABSORBED:
            try:
                return await self._tools.undo(key.tenant, turn.id, (key.agent, key.channel, key.session))
            except ConnectionError as error:
                log.warning("router.undo_waits", turn=turn.id.hex(), tenant=key.tenant, error=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        return False
