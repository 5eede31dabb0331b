"""Running calls to their stored end, whoever still waits for them.

A run belongs to the process, not to the request that began it: a caller that goes away neither stops it nor loses its
result, which is stored and found by the retry. Claiming the call is part of the run for the same reason: a claim whose
commit was cut off is asked for again until it is known whose the call is.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import structlog
from soma.common.v1.error_reason_pb2 import ErrorReason

from services.toolgw.application.ports import ArgumentRules, Finish, InvocationStore, Tool
from services.toolgw.domain import refusals
from services.toolgw.domain.invocation import MAX_ATTEMPTS, Call, Invocation, State
from services.toolgw.domain.outcome import Outcome, OutcomeUnknown, bad_arguments, bounded, failed
from services.toolgw.domain.tool import ToolKind
from soma_common.errors import Unavailable
from soma_common.failpoints import failpoint_async
from soma_common.telemetry.by_reason import EndCounter
from soma_common.telemetry.metrics import counter

STORE_AGAIN_S: Final = 0.5
"""Pause before the database is asked again that did not answer."""

_RUNS = counter("soma_toolgw_runs_total", "Runs of tools, by how they ended.", ["kind", "result"])
_LATE = counter("soma_toolgw_late_results_total", "Results that came when the outcome was called unknown already.")
_ENDS = {kind: EndCounter(_RUNS, kind.value) for kind in ToolKind}

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many calls may run at once."""

    of_process: int
    of_tenant: int


class Run:
    """One try of this process to own a call and run it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.claim = uuid.uuid4().hex
        self._claimed: asyncio.Future[Invocation] = asyncio.get_running_loop().create_future()
        self._claimed.add_done_callback(_retrieve)
        self.outcome: Outcome | None = None
        """The outcome that this run has stored."""
        self._given_up: Unavailable | None = None
        self.ended = asyncio.Event()
        """Set when nothing more happens in this run."""

    async def claimed(self) -> Invocation:
        """What is stored under the key after the claim: this run owns the call if it bears its claim. Raises
        Unavailable."""
        await asyncio.wait([self._claimed])
        return self._claimed.result()

    def tell(self, stored: Invocation) -> None:
        """Answer `claimed`."""
        if not self._claimed.done():
            self._claimed.set_result(stored)

    def give_up(self, error: Unavailable) -> None:
        """Say that the tool could do nothing now, and that the call is left to whoever asks for it again."""
        self._given_up = error

    def check_not_given_up(self) -> None:
        """Raise the Unavailable that `give_up` was told, if it was."""
        if self._given_up is not None:
            raise self._given_up

    def refuse(self, error: Exception) -> None:
        """Answer `claimed` with an error: whose the call is, is not known yet."""
        if not self._claimed.done():
            self._claimed.set_exception(error)


class ToolRuns:
    """The runs of this process, at most one per call."""

    def __init__(self, store: InvocationStore, rules: ArgumentRules, bounds: Bounds) -> None:
        self._store = store
        self._rules = rules
        self._bounds = bounds
        self._by_tenant: Counter[str] = Counter()
        self._runs: dict[tuple[str, str], Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False

    def find(self, tenant: str, key: str) -> Run | None:
        """The run of a call, if this process runs it now."""
        return self._runs.get((tenant, key))

    def begin(self, tool: Tool, call: Call, dead: Invocation | None) -> Run:
        """Begin to claim and run `call`; `dead` is the stored call whose dead runner is to be replaced, if there is
        one.

        Raises:
            ResourceExhausted: QUEUE_FULL, as many runs as may be; nothing was begun.
            Unavailable: DRAINING.
        """
        if self._draining:
            raise refusals.draining()
        if len(self._runs) >= self._bounds.of_process:
            raise refusals.too_many_runs("this instance", self._bounds.of_process)
        if self._by_tenant[call.tenant] >= self._bounds.of_tenant:
            raise refusals.too_many_runs(f"tenant {call.tenant}", self._bounds.of_tenant)
        run = Run(call)
        self._runs[call.tenant, call.key] = run
        self._by_tenant[call.tenant] += 1
        task = asyncio.create_task(self._live(run, tool, dead), name=f"tool {call.tool} {call.key}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    async def drain(self, limit_s: float) -> None:
        """Begin nothing new, give runs `limit_s` to end, then leave the rest to whoever finds them without a runner."""
        self._draining = True
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=limit_s)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _live(self, run: Run, tool: Tool, dead: Invocation | None) -> None:
        """One run from the claim to the stored end."""
        call = run.call
        try:
            stored = await self._claimed(run, tool, dead)
            if stored.claim == run.claim:
                await self._run(run, tool, stored.attempt)
        except Exception as error:
            log.exception("toolgw.run.broken", tenant=call.tenant, tool=call.tool, key=call.key)
            run.refuse(error)
            await self._until_stored(call, lambda: self._store.abandon(call.tenant, call.key, run.claim))
        finally:
            run.refuse(refusals.draining())  # Only when it was cancelled before the claim was known.
            del self._runs[call.tenant, call.key]
            self._by_tenant[call.tenant] -= 1
            if not self._by_tenant[call.tenant]:
                del self._by_tenant[call.tenant]
            run.ended.set()

    async def _claimed(self, run: Run, tool: Tool, dead: Invocation | None) -> Invocation:
        """What is stored under the key after the claim. The caller learns of the first trouble, the claim goes on."""

        async def claim() -> Invocation:
            try:
                return await self._store.claim(run.call, tool.definition, run.claim, dead)
            except Unavailable as error:
                run.refuse(error)
                raise

        stored = await self._until_stored(run.call, claim)
        run.tell(stored)
        return stored

    async def _run(self, run: Run, tool: Tool, attempt: int) -> None:
        """Run the call that this run owns, and store its end: a result, or that none can be known."""
        call, ends = run.call, _ENDS[tool.definition.kind]
        await failpoint_async("toolgw.before_run")
        try:
            outcome = await self._outcome(tool, call, attempt)
            if attempt > 1:  # What an attempt before this one did is not known.
                outcome = replace(outcome, never_ran=False)
        except Unavailable as error:
            log.warning("toolgw.run.given_up", tenant=call.tenant, tool=call.tool, key=call.key, error=str(error))
            counts = not tool.definition.effect.vanishes_with_runner
            await self._until_stored(call, lambda: self._store.abandon(call.tenant, call.key, run.claim, counts=counts))
            run.give_up(error)
            ends.failed(error.reason)
            return
        except OutcomeUnknown as cut:
            log.warning("toolgw.run.outcome_unknown", tenant=call.tenant, tool=call.tool, key=call.key, why=str(cut))
            ended = await self._until_stored(
                call, lambda: self._store.end_without_result(call.tenant, call.key, run.claim, State.UNKNOWN)
            )
            finish = Finish.STORED if ended else Finish.REFUSED
            ends.failed(ErrorReason.ERROR_REASON_TOOL_OUTCOME_UNKNOWN)
        else:
            await failpoint_async("toolgw.after_run_before_store")
            finish = await self._until_stored(call, lambda: self._store.finish(call, run.claim, outcome))
            run.outcome = outcome if finish is Finish.STORED else None
            if outcome.failure is None:
                ends.ok()
            else:
                ends.failed(outcome.failure.reason)
        if finish is Finish.LATE:
            _LATE.inc()
        if finish is not Finish.STORED:
            log.warning(
                "toolgw.run.decided_without_it",
                tenant=call.tenant,
                tool=call.tool,
                key=call.key,
                kept_for_the_record=finish is Finish.LATE,
            )

    async def _outcome(self, tool: Tool, call: Call, attempt: int) -> Outcome:
        """How the tool ends.

        Raises:
            OutcomeUnknown: nobody can tell what it did.
            Unavailable: what the tool needs is away; it may run again.
        """
        definition = tool.definition
        if attempt > MAX_ATTEMPTS:
            return failed(f"{definition.name} did not survive {MAX_ATTEMPTS} attempts", attempts=str(MAX_ATTEMPTS))
        violations = await self._rules.violations(definition.parameters, call.arguments)
        if violations:
            return bad_arguments(f"the arguments do not fit {definition.name}: " + "; ".join(violations))
        try:
            async with asyncio.timeout(definition.timeout_s):
                return bounded(await tool.run(call))
        except OutcomeUnknown:
            raise
        except TimeoutError:
            if not definition.effect.may_run_again:
                raise OutcomeUnknown(f"no answer within {definition.timeout_s:g} s") from None
            limit_ms = str(round(definition.timeout_s * 1000))
            return failed(f"{definition.name} took longer than {definition.timeout_s:g} s", bound_ms=limit_ms)
        except Unavailable as error:
            if not definition.effect.may_run_again:
                raise OutcomeUnknown("what the tool needs went away") from error
            raise
        except Exception as error:
            log.exception("toolgw.run.defect", tenant=call.tenant, tool=call.tool, key=call.key)
            if not definition.effect.may_run_again:
                raise OutcomeUnknown("the tool broke") from error
            return failed(f"{definition.name} has a defect; the log of the tool gateway says more")

    async def _until_stored(self, call: Call, store: Callable[[], Awaitable[T]]) -> T:
        """The answer of `store`, asked for again and again while the database is away: what it is to keep is known
        only here."""
        while True:
            try:
                return await store()
            except Unavailable as error:
                log.warning("toolgw.run.not_stored_yet", tenant=call.tenant, key=call.key, error=str(error))
                await asyncio.sleep(STORE_AGAIN_S)


def _retrieve(future: asyncio.Future[Invocation]) -> None:
    """Mark an error as seen: nobody may be waiting for it any more."""
    if not future.cancelled():
        future.exception()
