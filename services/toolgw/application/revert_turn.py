"""RevertTurn: undoes what the calls of a stopped turn did, if all of it can be undone. Decided once, and durable: a
retry, here or at another instance, goes on where the work was left and gets the same answer."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from services.toolgw.application.cancel_invocation import CancelInvocation
from services.toolgw.application.catalog import ToolCatalog
from services.toolgw.application.ports import InvocationStore, ReversalStore
from services.toolgw.application.run_once import RunOnce
from services.toolgw.domain.invocation import Call
from services.toolgw.domain.outcome import Outcome
from services.toolgw.domain.reversal import PastCall, Reversal, StoppedTurn, Undoing, first_look
from soma_common.errors import AlreadyExists, Conflict
from soma_common.failpoints import failpoint_async
from soma_common.telemetry.metrics import counter

_REVERSALS = counter(
    "soma_toolgw_reversals_total", "Turns whose calls were to be undone, by what came of it.", ["result"]
)

log = structlog.get_logger(__name__)


class RevertTurn:
    """Runs the compensations of `catalog`, each as a call of its own."""

    def __init__(
        self,
        reversals: ReversalStore,
        calls: InvocationStore,
        catalog: ToolCatalog,
        run_once: RunOnce,
        cancel: CancelInvocation,
    ) -> None:
        self._reversals = reversals
        self._calls = calls
        self._catalog = catalog
        self._run_once = run_once
        self._cancel = cancel

    async def __call__(self, turn: StoppedTurn) -> Undoing:
        """Undo the calls of `turn`, each of which has an end; returns REVERTED or KEPT. Waits as long as the caller.

        Raises:
            ResourceExhausted: QUEUE_FULL, there is no place for a compensation now; a retry goes on.
            Unavailable: the database does not answer, or this instance stops; a retry goes on.
        """
        found = await self._reversals.find_reversal(turn)
        if found is not None and found.state is not Reversal.UNDOING:
            return found
        if found is None:
            found = await self._reversals.begin_reversal(turn, lambda calls: self._look(turn, calls))
        if found.state is Reversal.UNDOING:
            await failpoint_async("toolgw.after_first_look_before_compensation")
            calls = await self._reversals.calls_of(turn)
            kept = await self._undo(turn, found, {call.key: call for call in calls})
            await failpoint_async("toolgw.after_compensations_before_record")
            found = await self._reversals.end_reversal(turn, found.ended(kept))
        log.info(
            "toolgw.revert.decided", tenant=turn.tenant, turn=turn.turn_id, result=found.state.name, kept=found.kept
        )
        _REVERSALS.labels(found.state.name).inc()
        return found

    def _look(self, turn: StoppedTurn, calls: Sequence[PastCall]) -> Undoing:
        return first_look(calls, lambda name: self._catalog.compensation(turn.tenant, name) is not None)

    async def _undo(self, turn: StoppedTurn, undoing: Undoing, calls: dict[str, PastCall]) -> tuple[str, ...]:
        """The calls whose effect stays: the first one whose compensation fails, and all before it."""
        for position, key in enumerate(undoing.effects):
            call = calls.get(key)
            if call is None or not await self._is_undone(turn, call):
                log.warning("toolgw.revert.compensation_failed", tenant=turn.tenant, key=key)
                return undoing.effects[position:]
        return ()

    async def _is_undone(self, turn: StoppedTurn, past: PastCall) -> bool:
        """Compensate one call, if nobody has; whether it is undone now. The answer for a call never changes."""
        call = past.undone_in(turn)
        try:
            outcome = await self._end_of(call)
        except (AlreadyExists, Conflict):  # Unknown what it did, or its key was taken by a call of another kind.
            return False
        return outcome is not None and outcome.failure is None

    async def _end_of(self, call: Call) -> Outcome | None:
        """How a compensation ended; None: it never runs."""
        tool = self._catalog.compensation(call.tenant, call.tool)
        if tool is None:  # Gone since the first look. Another instance may still have it: of the two one decides.
            return (await self._cancel(call.tenant, call.session_id, call.key)).outcome
        found = await self._calls.find(call.tenant, call.key)
        return (await self._run_once(tool, call, found)).outcome
