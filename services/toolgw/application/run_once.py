"""Running a call at most once, wherever and however often it is asked for: begin it, wait for who began it, or take
over from a runner that died."""

from __future__ import annotations

from typing import Final, NamedTuple

from services.toolgw.application.await_runner import Patience
from services.toolgw.application.hold_lease import RunnerLease
from services.toolgw.application.ports import InvocationStore, Tool
from services.toolgw.application.run_tool import Run, ToolRuns
from services.toolgw.domain import refusals
from services.toolgw.domain.invocation import Call, Invocation, State
from services.toolgw.domain.outcome import Outcome

MAX_WAITING: Final = 1000
"""Requests that may wait at once for calls that were begun before."""


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
        self._waiting = 0

    async def __call__(self, tool: Tool, call: Call, found: Invocation | None) -> Answer:
        """Run the call, or wait for whoever runs it, and return how it ended. `found` is what is stored under its key.
        Waits as long as the caller does.

        Raises:
            AlreadyExists: IDEMPOTENCY_KEY_REUSED.
            Conflict: TOOL_CANCELLED or TOOL_OUTCOME_UNKNOWN.
            ResourceExhausted: QUEUE_FULL, nothing was begun.
            Unavailable: the database does not answer, or this instance stops; a retry with the same key is safe.
        """
        return await self._run(tool, call) if found is None else await self._wait(tool, call, found)

    async def _run(self, tool: Tool, call: Call) -> Answer:
        """Run a call that nobody has begun; somebody may be faster, at this instance or another."""
        run = self._runs.find(call.tenant, call.key)
        is_ours = run is None
        if run is None:
            run = self._begin(tool, call, None)
        return await self._end_of(run, tool, call, replayed=not is_ours)

    async def _end_of(self, run: Run, tool: Tool, call: Call, *, replayed: bool) -> Answer:
        """How a run of this process ends; read back unless it stored the end itself, since others may decide without
        it."""
        stored = await run.claimed()
        stored.answer_to(call)  # Refuses another call's key before waiting for its end.
        await run.ended.wait()
        if run.outcome is not None:
            return Answer(run.outcome, replayed)
        found = await self._store.find(call.tenant, call.key)
        if found is None:
            raise refusals.outcome_unknown(call.key, call.tool)  # Cleared away in between: its time was over.
        outcome = found.answer_to(call)
        if outcome is not None:
            return Answer(outcome, replayed=replayed or found.claim != run.claim)
        return await self._wait(tool, call, found)

    async def _wait(self, tool: Tool, call: Call, found: Invocation) -> Answer:
        """Wait for the end of a call that was begun before, and take over from a runner that died."""
        if self._waiting >= MAX_WAITING:
            raise refusals.too_many_runs("this instance", MAX_WAITING)
        self._waiting += 1
        patience = Patience()
        try:
            while True:
                outcome = found.answer_to(call)
                if outcome is not None:
                    return Answer(outcome, replayed=True)
                if patience.holds_dead(found):
                    await self._replace_runner(tool, call, found)
                await patience.pause()
                again = await self._store.find(call.tenant, call.key)
                if again is None:
                    raise refusals.outcome_unknown(call.key, call.tool)  # Cleared away: its time was over.
                found = again
        finally:
            self._waiting -= 1

    async def _replace_runner(self, tool: Tool, call: Call, found: Invocation) -> None:
        """Begin the next attempt, or settle that the outcome is unknown; the next look sees what came of it."""
        if not found.effect.may_run_again:
            await self._store.end_without_result(call.tenant, call.key, found.claim, State.UNKNOWN)
            return
        run = self._runs.find(call.tenant, call.key) or self._begin(tool, call, found)
        await run.claimed()
        await run.ended.wait()

    def _begin(self, tool: Tool, call: Call, dead: Invocation | None) -> Run:
        if not self._lease.is_fresh:
            raise refusals.lease_not_held()
        return self._runs.begin(tool, call, dead)
