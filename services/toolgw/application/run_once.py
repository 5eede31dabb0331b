"""Running a call at most once, wherever and however often it is asked for: begin it, wait for who began it, or take
over from a runner that died."""

from __future__ import annotations

from functools import partial
from typing import Final, NamedTuple

from services.toolgw.application.await_runner import Patience
from services.toolgw.application.hold_lease import RunnerLease
from services.toolgw.application.places import Shared, WaitingPlaces
from services.toolgw.application.ports import InvocationStore, Tool
from services.toolgw.application.run_tool import Bounds, Run, ToolRuns
from services.toolgw.domain import refusals
from services.toolgw.domain.invocation import Call, Invocation, State
from services.toolgw.domain.outcome import Outcome

MAX_WAITING: Final = 1000
"""Requests that may wait at once in this process for calls that were begun before."""
MAX_WAITING_PER_TENANT: Final = 128
"""Of them, those of one tenant: with the bounds as they come, all it may have running in two other processes."""


class Answer(NamedTuple):
    """The end of a call."""

    outcome: Outcome
    replayed: bool
    """True: it was run for an earlier request."""


class RunOnce:
    """Runs calls in `runs`, under the lease of this process."""

    def __init__(self, store: InvocationStore, runs: ToolRuns, lease: RunnerLease) -> None:
        self._store = store
        self._runs = runs
        self._lease = lease
        self._places = WaitingPlaces(Bounds(of_process=MAX_WAITING, of_tenant=MAX_WAITING_PER_TENANT))
        self._looks = Shared[Invocation | None]()
        self._ends = Shared[bool]()

    async def __call__(self, tool: Tool, call: Call, found: Invocation | None) -> Answer:
        """Run the call, or wait for whoever runs it, and return how it ended. `found` is what is stored under its key.
        Waits as long as the caller does.

        Raises:
            AlreadyExists: IDEMPOTENCY_KEY_REUSED.
            Conflict: TOOL_CANCELLED or TOOL_OUTCOME_UNKNOWN.
            ResourceExhausted: QUEUE_FULL, nothing was begun, or the call was begun before and there is no place to wait
                for it; the text says which. A retry with the same key is safe.
            Unavailable: the database does not answer, or this instance stops; a retry with the same key is safe.
        """
        if found is None:
            return await self._run(tool, call)
        outcome = found.answer_to(call)
        if outcome is not None:
            return Answer(outcome, replayed=True)
        with self._places.taken(call.tenant, call.key):
            return await self._wait(tool, call, found)

    async def _run(self, tool: Tool, call: Call) -> Answer:
        """Run a call that nobody has begun; somebody may be faster, at this instance or another."""
        run = self._runs.find(call.tenant, call.key)
        if run is None:  # No place: whoever begins a run is counted with the runs.
            return await self._end_of(self._begin(tool, call, None), tool, call, replayed=False)
        with self._places.taken(call.tenant, call.key):
            return await self._end_of(run, tool, call, replayed=True)

    async def _end_of(self, run: Run, tool: Tool, call: Call, *, replayed: bool) -> Answer:
        """How a run of this process ends; read back unless it stored the end itself, since others may decide without
        it."""
        stored = await run.claimed()
        stored.answer_to(call)  # Refuses another call's key before waiting for its end.
        await run.ended.wait()
        run.check_not_given_up()
        if run.outcome is not None:
            return Answer(run.outcome, replayed)
        found = await self._store.find(call.tenant, call.key)
        if found is None:
            raise refusals.outcome_unknown(call.key, call.tool)  # Cleared away in between: its time was over.
        outcome = found.answer_to(call)
        if outcome is not None:
            return Answer(outcome, replayed=replayed or found.claim != run.claim)
        if not replayed:  # Its run is over, so it is no longer counted with the runs.
            with self._places.taken(call.tenant, call.key):
                return await self._wait(tool, call, found)
        return await self._wait(tool, call, found)

    async def _wait(self, tool: Tool, call: Call, found: Invocation) -> Answer:
        """Wait for the end of a call that was begun before, and take over from a runner that died. Whoever waits for
        one key shares the looks at it."""
        patience = Patience()
        while True:
            outcome = found.answer_to(call)
            if outcome is not None:
                return Answer(outcome, replayed=True)
            if patience.holds_dead(found):
                await self._replace_runner(tool, call, found)
            again = await self._looks.do((call.tenant, call.key), partial(self._look_later, call, patience))
            if again is None:
                raise refusals.outcome_unknown(call.key, call.tool)  # Cleared away: its time was over.
            found = again

    async def _look_later(self, call: Call, patience: Patience) -> Invocation | None:
        await patience.pause()
        return await self._store.find(call.tenant, call.key)

    async def _replace_runner(self, tool: Tool, call: Call, found: Invocation) -> None:
        """Begin the next attempt, or settle that the outcome is unknown; the next look sees what came of it."""
        if not found.effect.may_run_again:
            end = partial(self._store.end_without_result, call.tenant, call.key, found.claim, State.UNKNOWN)
            await self._ends.do((call.tenant, call.key, found.claim), end)
            return
        run = self._runs.find(call.tenant, call.key) or self._begin(tool, call, found)
        await run.claimed()
        await run.ended.wait()
        run.check_not_given_up()

    def _begin(self, tool: Tool, call: Call, dead: Invocation | None) -> Run:
        if not self._lease.is_fresh:
            raise refusals.lease_not_held()
        return self._runs.begin(tool, call, dead)
