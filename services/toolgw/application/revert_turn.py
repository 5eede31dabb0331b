"""RevertTurn: undoes what the calls of a stopped turn did, if all of it can be undone. Decided once, and durable: what
was begun goes on to its end whoever waits for it, here or, if this process dies, at another instance; a retry joins it
and gets the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from services.toolgw.application.await_runner import Patience
from services.toolgw.application.cancel_invocation import CancelInvocation
from services.toolgw.application.catalog import ToolCatalog
from services.toolgw.application.places import WaitingPlaces
from services.toolgw.application.ports import InvocationStore, ReversalStore
from services.toolgw.application.run_once import MAX_WAITING, MAX_WAITING_PER_TENANT, RunOnce
from services.toolgw.application.run_reversals import ReversalRuns, Reverting
from services.toolgw.application.run_tool import Bounds
from services.toolgw.domain import refusals
from services.toolgw.domain.invocation import Call
from services.toolgw.domain.outcome import Outcome
from services.toolgw.domain.reversal import PastCall, Reversal, StoppedTurn, Undoing, first_look
from soma_common.errors import AlreadyExists, Conflict, ResourceExhausted, Unavailable
from soma_common.failpoints import failpoint_async
from soma_common.telemetry.metrics import counter

TAKE_OVER_EVERY_S: Final = 5.0
"""How often it is looked for turns whose process died while it undid them; a lease takes as long to run out."""

_REVERSALS = counter(
    "soma_toolgw_reversals_total", "Turns whose calls were to be undone, by what came of it.", ["result"]
)

log = structlog.get_logger(__name__)


class RevertTurn:
    """Runs the compensations of `catalog`, each as a call of its own, in the tasks of `runs`."""

    def __init__(
        self,
        reversals: ReversalStore,
        calls: InvocationStore,
        catalog: ToolCatalog,
        run_once: RunOnce,
        cancel: CancelInvocation,
        runs: ReversalRuns,
    ) -> None:
        self._reversals = reversals
        self._calls = calls
        self._catalog = catalog
        self._run_once = run_once
        self._cancel = cancel
        self._runs = runs
        self._places = WaitingPlaces(Bounds(of_process=MAX_WAITING, of_tenant=MAX_WAITING_PER_TENANT))

    async def __call__(self, turn: StoppedTurn) -> Undoing:
        """Undo the calls of `turn`, each of which has an end; returns REVERTED or KEPT. Waits as long as the caller;
        what was begun goes on without it.

        Raises:
            ResourceExhausted: QUEUE_FULL, as many turns are being undone or waited for as may be; a retry goes on.
            Unavailable: the database does not answer, or this instance stops; a retry goes on.
        """
        patience = Patience()
        while True:
            found = await self._reversals.find_reversal(turn)
            if found is None:
                found = await self._reversals.begin_reversal(turn, lambda calls: self._look(turn, calls))
                if found.state is not Reversal.UNDOING:
                    _tell(turn, found)
            if found.state is not Reversal.UNDOING:
                return found
            reverting = self._runs.find(turn) or self._begin(turn)
            with self._places.taken(turn.tenant, turn.turn_id):
                ended = await _end_of(reverting)
                if ended is not None:
                    return ended
                await patience.pause()

    async def take_over(self) -> None:
        """Go on with turns that a process left half undone, now and every `TAKE_OVER_EVERY_S`; until cancelled."""
        while True:
            try:
                for turn in await self._runs.left_behind():
                    self._take_over(turn)
            except Unavailable as error:
                log.warning("toolgw.revert.not_taken_over", error=str(error))
            await asyncio.sleep(TAKE_OVER_EVERY_S)

    def _take_over(self, turn: StoppedTurn) -> None:
        try:
            self._begin(turn)
        except ResourceExhausted:  # It stays for a later look; other tenants may have a place now.
            return
        log.info("toolgw.revert.taken_over", tenant=turn.tenant, turn=turn.turn_id)

    def _begin(self, turn: StoppedTurn) -> Reverting:
        return self._runs.begin(turn, lambda: self._carry_out(turn))

    async def _carry_out(self, turn: StoppedTurn) -> Undoing | None:
        """Run what is left of the compensations and store how they ended; None: cleared away, its time was over."""
        found = await self._reversals.find_reversal(turn)
        if found is None or found.state is not Reversal.UNDOING:
            return found
        await failpoint_async("toolgw.after_first_look_before_compensation")
        calls = await self._reversals.calls_of(turn)
        kept = await self._undo(turn, found, {call.key: call for call in calls})
        await failpoint_async("toolgw.after_compensations_before_record")
        ended = await self._reversals.end_reversal(turn, found.ended(kept))
        _tell(turn, ended)
        return ended

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


async def _end_of(reverting: Reverting) -> Undoing | None:
    """How a task of this process ended, which does not end with its caller. Raises Unavailable (DRAINING)."""
    await asyncio.wait([reverting])
    if reverting.cancelled():
        raise refusals.draining()
    return reverting.result()


def _tell(turn: StoppedTurn, decided: Undoing) -> None:
    log.info(
        "toolgw.revert.decided", tenant=turn.tenant, turn=turn.turn_id, result=decided.state.name, kept=decided.kept
    )
    _REVERSALS.labels(decided.state.name).inc()
