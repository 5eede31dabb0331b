"""ToolService over gRPC: requests to calls, outcomes to responses."""

from __future__ import annotations

import re
from typing import Any, Final

from google.protobuf.struct_pb2 import Value
from grpc import aio
from soma.common.v1.message_pb2 import Error
from soma.toolgw.v1.tool_service_pb2 import (
    CancelInvocationRequest,
    CancelInvocationResponse,
    InvocationState,
    InvokeToolRequest,
    InvokeToolResponse,
    ListToolsRequest,
    ListToolsResponse,
    RevertTurnRequest,
    RevertTurnResponse,
    SideEffect,
    Tool,
)
from soma.toolgw.v1.tool_service_pb2 import Reversal as ReversalResult
from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceServicer

from services.toolgw.adapters.json_values import arguments_from, struct_of, value_of
from services.toolgw.application.cancel_invocation import CancelInvocation
from services.toolgw.application.invoke_tool import InvokeTool
from services.toolgw.application.list_tools import ListTools
from services.toolgw.application.revert_turn import RevertTurn
from services.toolgw.domain import refusals
from services.toolgw.domain.invocation import Call, State, is_compensation
from services.toolgw.domain.outcome import Outcome
from services.toolgw.domain.reversal import Reversal, StoppedTurn
from services.toolgw.domain.tool import Effect, ToolDefinition
from soma_common.ids import is_slug, session_id

SERVICE: Final = "soma.toolgw.v1.ToolService"
MAX_ARGUMENTS_BYTES: Final = 256 * 1024

_KEY: Final = re.compile(r"[\x21-\x7e]{1,128}")
"""Printable ASCII without blanks: a key is also an HTTP header."""
_TOOL: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TURN: Final = re.compile(r"(?:[0-9a-f]{32})?")

_SIDE_EFFECTS: Final = {
    Effect.NONE: SideEffect.SIDE_EFFECT_READ_ONLY,
    Effect.WITH_RESULT: SideEffect.SIDE_EFFECT_IDEMPOTENT,
    Effect.IDEMPOTENT: SideEffect.SIDE_EFFECT_IDEMPOTENT,
    Effect.SIDE_EFFECTFUL: SideEffect.SIDE_EFFECT_SIDE_EFFECTFUL,
}
_STATES: Final = {
    State.DONE: InvocationState.INVOCATION_STATE_DONE,
    State.CANCELLED: InvocationState.INVOCATION_STATE_CANCELLED,
    State.UNKNOWN: InvocationState.INVOCATION_STATE_OUTCOME_UNKNOWN,
}
_REVERSALS: Final = {
    Reversal.REVERTED: ReversalResult.REVERSAL_REVERTED,
    Reversal.KEPT: ReversalResult.REVERSAL_KEPT,
}


class ToolApi(ToolServiceServicer):
    """The servicer. Who may call is decided before it is reached."""

    def __init__(
        self,
        list_tools: ListTools,
        invoke_tool: InvokeTool,
        cancel_invocation: CancelInvocation,
        revert_turn: RevertTurn,
    ) -> None:
        self._list = list_tools
        self._invoke = invoke_tool
        self._cancel = cancel_invocation
        self._revert = revert_turn

    async def ListTools(
        self, request: ListToolsRequest, context: aio.ServicerContext[ListToolsRequest, ListToolsResponse]
    ) -> ListToolsResponse:
        """Lists the tools of a tenant by name."""
        tenant = _tenant(request.parent)
        page = self._list(tenant, request.page_size, request.page_token)
        tools = [_tool(tenant, definition) for definition in page.tools]
        return ListToolsResponse(tools=tools, next_page_token=page.next_page_token)

    async def InvokeTool(
        self, request: InvokeToolRequest, context: aio.ServicerContext[InvokeToolRequest, InvokeToolResponse]
    ) -> InvokeToolResponse:
        """Runs a tool at most once per idempotency key."""
        answer = await self._invoke(_call(request))
        result, error = _end(answer.outcome)
        return InvokeToolResponse(result=result, error=error, replayed=answer.replayed)

    async def CancelInvocation(
        self,
        request: CancelInvocationRequest,
        context: aio.ServicerContext[CancelInvocationRequest, CancelInvocationResponse],
    ) -> CancelInvocationResponse:
        """Makes sure that a key will never run, has ended, or is given up."""
        session = request.session
        session_digest = session_id(session.tenant, session.agent, session.channel, session.session)
        key, timeout_s = _key(request.idempotency_key), request.timeout_ms / 1000
        settled = await self._cancel(session.tenant, session_digest, key, timeout_s)
        result, error = _end(settled.outcome) if settled.outcome is not None else (None, None)
        return CancelInvocationResponse(state=_STATES[settled.state], result=result, error=error)

    async def RevertTurn(
        self, request: RevertTurnRequest, context: aio.ServicerContext[RevertTurnRequest, RevertTurnResponse]
    ) -> RevertTurnResponse:
        """Undoes what the calls of a turn did, if everything can be undone."""
        session = request.session
        turn = StoppedTurn(session.tenant, session.agent, session.channel, session.session, request.turn_id)
        undone = await self._revert(turn)
        return RevertTurnResponse(reversal=_REVERSALS[undone.state], kept=undone.kept)


def _call(request: InvokeToolRequest) -> Call:
    if _TOOL.fullmatch(request.tool) is None:
        raise refusals.invalid_field("tool", "a tool's name has letters, digits, _ and - only")
    if _TURN.fullmatch(request.turn_id) is None:
        raise refusals.invalid_field("turn_id", "32 lower-case hex digits, or empty")
    if request.arguments.ByteSize() > MAX_ARGUMENTS_BYTES:
        raise refusals.invalid_field("arguments", f"more than {MAX_ARGUMENTS_BYTES} bytes")
    session = request.session
    return Call(
        tenant=session.tenant,
        agent=session.agent,
        channel=session.channel,
        session=session.session,
        tool=request.tool,
        arguments=arguments_from(request.arguments),
        key=_key(request.idempotency_key),
        turn_id=request.turn_id,
        step=request.step,
    )


def _key(key: str) -> str:
    if not key:
        raise refusals.key_missing()
    if _KEY.fullmatch(key) is None:
        raise refusals.invalid_field("idempotency_key", "1 to 128 printable ASCII characters without blanks")
    if is_compensation(key):
        raise refusals.key_reserved(key)
    return key


def _tenant(parent: str) -> str:
    match parent.split("/"):
        case ["tenants", tenant] if is_slug(tenant):
            return tenant
        case _:
            raise refusals.invalid_field("parent", f"{parent!r} is not of the form tenants/{{tenant}}")


def _tool(tenant: str, definition: ToolDefinition) -> Tool:
    return Tool(
        name=f"tenants/{tenant}/tools/{definition.name}",
        tool=definition.name,
        description=definition.description,
        parameters=struct_of(definition.parameters),
        side_effect=_SIDE_EFFECTS[definition.effect],
        timeout_ms=round(definition.timeout_s * 1000),
        compensation=definition.compensation,
    )


def _end(outcome: Outcome) -> tuple[Value | None, Error | None]:
    """The result or the error of a response."""
    failure = outcome.failure
    if failure is None:
        return value_of(outcome.value), None
    metadata: dict[str, Any] = dict(failure.metadata)
    return None, Error(reason=failure.reason, message=failure.message, metadata=metadata)
