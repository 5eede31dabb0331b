"""Asks the tool gateway what became of the calls of a stopped turn."""

from __future__ import annotations

import asyncio

import grpc
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import StepBody, ToolResult
from soma.toolgw.v1.tool_service_pb2 import CancelInvocationRequest, CancelInvocationResponse, InvocationState
from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceStub

from soma_common.ids import call_key

_FORMAT = 1
_TIMEOUT_S = 10.0


class GrpcToolCanceller:
    """Settles calls through ToolService.CancelInvocation."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = ToolServiceStub(channel)

    async def settle(self, tenant: str, turn_id: bytes, step: int, reply: bytes, key: tuple[str, str, str]) -> bytes:
        """The serialized ToolResults body that closes the calls of a ModelReply body. Raises ConnectionError to be
        tried again.
        """
        body = StepBody.FromString(reply)
        calls = body.model_reply.tool_calls
        try:
            answers = await asyncio.gather(*(self._cancel(tenant, turn_id, step, call.index, key) for call in calls))
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"tool gateway: {error.code().name}") from error
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
                result.error.message = "the call was started and its outcome cannot be known"
            else:
                result.error.reason = ErrorReason.ERROR_REASON_TOOL_CANCELLED
                result.error.message = "cancelled before it ran"
            closed.tool_results.results.append(result)
        return closed.SerializeToString()

    async def _cancel(
        self, tenant: str, turn_id: bytes, step: int, index: int, key: tuple[str, str, str]
    ) -> CancelInvocationResponse:
        request = CancelInvocationRequest(idempotency_key=call_key(turn_id, step, index))
        session = request.session
        session.tenant = tenant
        session.agent, session.channel, session.session = key
        answer: CancelInvocationResponse = await self._stub.CancelInvocation(request, timeout=_TIMEOUT_S)
        return answer
