"""InvokeTool: a call runs at most once per key, if the agent may make it."""

from __future__ import annotations

from services.toolgw.application.catalog import ToolCatalog
from services.toolgw.application.ports import InvocationStore, ToolAccess
from services.toolgw.application.run_once import Answer, RunOnce
from services.toolgw.domain import refusals
from services.toolgw.domain.invocation import Call
from soma_common.failpoints import failpoint_async


class InvokeTool:
    """Runs calls of the tools in `catalog`."""

    def __init__(self, store: InvocationStore, catalog: ToolCatalog, access: ToolAccess, run_once: RunOnce) -> None:
        self._store = store
        self._catalog = catalog
        self._access = access
        self._run_once = run_once

    async def __call__(self, call: Call) -> Answer:
        """Run the call, or wait for whoever runs it, and return how it ended. Waits as long as the caller does.

        Raises:
            NotFound: TOOL_NOT_FOUND, and the key has no stored result either.
            AlreadyExists: IDEMPOTENCY_KEY_REUSED.
            Conflict: TOOL_CANCELLED or TOOL_OUTCOME_UNKNOWN.
            ResourceExhausted: QUEUE_FULL, nothing was begun, or there is no place to wait for what was; the text says
                which.
            Unavailable: the database does not answer, or this instance stops; a retry with the same key is safe.
        """
        found = await self._store.find(call.tenant, call.key)
        outcome = found.answer_to(call) if found is not None else None
        if outcome is not None:
            return Answer(outcome, replayed=True)
        tool = self._catalog.find(call.tenant, call.tool)
        if tool is None or not await self._access.allows(call.tenant, call.agent, call.tool):
            raise refusals.tool_not_found(call.tenant, call.agent, call.tool)
        answer = await self._run_once(tool, call, found)
        await failpoint_async("toolgw.after_store_before_answer")
        return answer
