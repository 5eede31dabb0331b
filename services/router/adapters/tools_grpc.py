"""Asks the tool gateway what became of the calls of a stopped turn, and to undo them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc
import structlog
from google.protobuf.message import DecodeError
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import StepBody, ToolCall, ToolResult
from soma.toolgw.v1.tool_service_pb2 import (
    CancelInvocationRequest,
    CancelInvocationResponse,
    InvocationState,
    Reversal,
    RevertTurnRequest,
    RevertTurnResponse,
)
from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceStub

from soma_common.ids import call_key

log = structlog.get_logger(__name__)

_FORMAT: Final = 1
_ASK_S: Final = 10.0
"""Longest wait of one question. The tool gateway counts from the first, so that asking again does not begin anew."""
_UNDO_S: Final = 10.0
"""Longest wait of one question. What was begun goes on in the tool gateway, and asking again joins it."""


class GrpcToolCanceller:
    """Settles calls through ToolService.CancelInvocation, undoes turns through ToolService.RevertTurn."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = ToolServiceStub(channel)

    async def settle(
        self, tenant: str, turn_id: bytes, step: int, reply: bytes, key: tuple[str, str, str], wait_s: float
    ) -> bytes:
        """The serialized ToolResults body that closes the calls of a ModelReply body. Raises ConnectionError to be
        tried again.
        """
        calls = _calls(reply)
        session = _session(tenant, key)
        try:
            answers = await asyncio.gather(
                *(self._cancel(session, call_key(turn_id, step, call.index), wait_s) for call in calls)
            )
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"tool gateway: {error.code().name}") from error
        return _closing(calls, answers)

    def unknown(self, reply: bytes) -> bytes:
        """The serialized ToolResults body that says of each call that its outcome is not known."""
        calls = _calls(reply)
        lost = CancelInvocationResponse(state=InvocationState.INVOCATION_STATE_OUTCOME_UNKNOWN)
        return _closing(calls, [lost] * len(calls))

    async def undo(self, tenant: str, turn_id: bytes, key: tuple[str, str, str]) -> bool:
        """Whether nothing is left of what the calls of a turn did. Raises ConnectionError to be tried again."""
        request = RevertTurnRequest(session=_session(tenant, key), turn_id=turn_id.hex())
        try:
            answer: RevertTurnResponse = await self._stub.RevertTurn(request, timeout=_UNDO_S)
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"tool gateway: {error.code().name}") from error
        return answer.reversal == Reversal.REVERSAL_REVERTED

    async def _cancel(self, session: SessionKey, key: str, wait_s: float) -> CancelInvocationResponse:
        request = CancelInvocationRequest(session=session, idempotency_key=key, timeout_ms=max(1, round(wait_s * 1000)))
        answer: CancelInvocationResponse = await self._stub.CancelInvocation(request, timeout=_ASK_S)
        return answer


def _session(tenant: str, key: tuple[str, str, str]) -> SessionKey:
    agent, channel, session = key
    return SessionKey(tenant=tenant, agent=agent, channel=channel, session=session)


def _calls(reply: bytes) -> Sequence[ToolCall]:
    """The calls of a ModelReply body. None of one that cannot be read: no brain could have read them either, and its
    turn has to end all the same.
    """
    try:
        return StepBody.FromString(reply).model_reply.tool_calls
    except DecodeError:
        log.error("router.reply_unreadable", size=len(reply))
        return ()


def _closing(calls: Sequence[ToolCall], answers: Sequence[CancelInvocationResponse]) -> bytes:
    closed = StepBody(format=_FORMAT)
    closed.tool_results.SetInParent()
    for call, answer in zip(calls, answers, strict=True):
        result = ToolResult(index=call.index, call_id=call.call_id, tool=call.tool)
        if answer.HasField("error"):
            result.error.CopyFrom(answer.error)
        elif answer.state == InvocationState.INVOCATION_STATE_DONE:
            result.result.CopyFrom(answer.result)
        elif answer.state == InvocationState.INVOCATION_STATE_OUTCOME_UNKNOWN:
            result.error.reason = ErrorReason.ERROR_REASON_TOOL_OUTCOME_UNKNOWN
            result.error.message = "the call was started and its outcome is not known"
        else:
            result.error.reason = ErrorReason.ERROR_REASON_TOOL_CANCELLED
            result.error.message = "cancelled before it ran"
        closed.tool_results.results.append(result)
    return closed.SerializeToString()
