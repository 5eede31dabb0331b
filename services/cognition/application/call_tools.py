"""Runs the tools of a journaled reply, all at once, each under the key that makes it happen at most once.

Whatever goes wrong becomes a result that tells the model so: a tool that fails does not end the turn. Only two things
are waited out here: a gateway that does not answer, or refuses for now, is asked again under the same key until the
step's time is over. A model that is told that a tool could not be called will call it again, under another key: so it
is told that only if no try can have begun the call, here or in a brain before this one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from google.protobuf import struct_pb2
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.application.ports import Invocation, NotBegun, Tools
from services.cognition.application.retrying import PASSING, Backoff, retrying
from services.cognition.domain.turn import STEP_FORMAT, check_depth
from soma_common.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    SomaError,
    Unavailable,
    to_proto,
)
from soma_common.ids import call_key
from soma_common.telemetry.by_reason import EndCounter
from soma_common.telemetry.metrics import counter

_ENDS = EndCounter(counter("soma_cognition_tool_calls_total", "Tool calls of turns, by how they ended.", ["result"]))

_ASKED_AGAIN: Final = (*PASSING, DeadlineExceeded)
"""A deadline that is over before the step's is somebody else's on the way: the call goes on, and its key finds it."""

_OF_THE_KEY: Final = (Conflict, AlreadyExists, InvalidRequest)
"""Refusals that hold for every try under the key, for one before them too."""


class ToolCaller:
    """Calls tools for turns. `max_result_bytes` bounds one result: the journal and the model's context hold all of
    them."""

    def __init__(self, tools: Tools, *, backoff: Backoff, max_result_bytes: int) -> None:
        self._tools = tools
        self._backoff = backoff
        self._max_result_bytes = max_result_bytes

    async def run(
        self,
        start: cognition.StartTurn,
        step: int,
        calls: Sequence[turn_pb2.ToolCall],
        allowed: Sequence[str],
        deadline: float,
    ) -> turn_pb2.StepBody:
        """Runs the calls of the reply journaled as `step`; returns the step that holds their results, in order."""
        results = await asyncio.gather(*(self._run_one(start, step, call, allowed, deadline) for call in calls))
        return _step_of(results)

    async def _run_one(
        self,
        start: cognition.StartTurn,
        step: int,
        call: turn_pb2.ToolCall,
        allowed: Sequence[str],
        deadline: float,
    ) -> turn_pb2.ToolResult:
        result = turn_pb2.ToolResult(index=call.index, call_id=call.call_id, tool=call.tool)
        try:
            _check(call, allowed)
            value, error = await self._invoke(start, step, call, deadline)
        except SomaError as failed:
            error, value = to_proto(failed), struct_pb2.Value()
        if error is None and value.ByteSize() > self._max_result_bytes:
            error = _too_large(call.tool, value.ByteSize(), self._max_result_bytes)
        if error is None:
            if check_depth(lambda: _step_of([turn_pb2.ToolResult(result=value)])):
                result.result.CopyFrom(value)
            else:
                error = _too_deep(call.tool)
        if error is not None:
            result.error.CopyFrom(error)
            _ENDS.failed(error.reason)
        else:
            _ENDS.ok()
        return result

    async def _invoke(
        self, start: cognition.StartTurn, step: int, call: turn_pb2.ToolCall, deadline: float
    ) -> tuple[struct_pb2.Value, message_pb2.Error | None]:
        loop = asyncio.get_running_loop()
        invocation = Invocation(
            session=start.session,
            tool=call.tool,
            arguments=call.arguments,
            key=call_key(start.turn_id, step, call.index),
            turn_id=start.turn_id,
            step=step,
        )
        # Another brain may have asked already, if the reply was journaled before this one was given the turn.
        may_have_begun = step <= len(start.journal)

        async def once(_: int) -> tuple[struct_pb2.Value, message_pb2.Error | None]:
            nonlocal may_have_begun
            try:
                return await self._tools.invoke(invocation, max(0.001, deadline - loop.time()))
            except (NotBegun, ResourceExhausted):
                raise
            except (Unavailable, DeadlineExceeded, Internal):
                may_have_begun = True
                raise

        try:
            return await retrying(once, backoff=self._backoff, deadline=deadline, passing=_ASKED_AGAIN)
        except _OF_THE_KEY:
            raise
        except SomaError as error:
            if may_have_begun:
                raise _unanswered(call.tool) from error
            if isinstance(error, Unavailable):
                raise _unreachable(call.tool) from error
            raise


def _step_of(results: Sequence[turn_pb2.ToolResult]) -> turn_pb2.StepBody:
    return turn_pb2.StepBody(format=STEP_FORMAT, tool_results=turn_pb2.ToolResults(results=results))


def _check(call: turn_pb2.ToolCall, allowed: Sequence[str]) -> None:
    """Refuses what needs no gateway to be refused; the same on every replay, as the spec and the journal are the
    same."""
    if call.tool not in allowed:
        known = ", ".join(allowed) or "none"
        raise NotFound(
            reasons.ERROR_REASON_TOOL_NOT_FOUND, f"there is no tool {call.tool!r} for this agent; it may use: {known}"
        )
    if not call.HasField("arguments"):  # how a journaled call says that the model's arguments could not be read
        raise InvalidRequest(
            reasons.ERROR_REASON_TOOL_ARGUMENTS_INVALID,
            f"the arguments of {call.tool} were not a JSON object; call it again with one",
        )


def _unreachable(tool: str) -> SomaError:
    return Unavailable(
        reasons.ERROR_REASON_SERVICE_UNAVAILABLE,
        f"{tool} could not be called: the tool gateway was not available in the time a step may take",
    )


def _unanswered(tool: str) -> SomaError:
    """Nobody knows whether the tool ran; to say "it failed" would invite a second try."""
    return Conflict(
        reasons.ERROR_REASON_TOOL_OUTCOME_UNKNOWN,
        f"{tool} was called, but its answer did not come; it may have run or may still run",
    )


def _too_large(tool: str, size: int, bound: int) -> message_pb2.Error:
    return message_pb2.Error(
        reason=reasons.ERROR_REASON_CONTENT_TOO_LARGE,
        message=f"{tool} answered {size} bytes, more than the {bound} a result may have; ask it for less",
        metadata={"max_result_bytes": str(bound)},
    )


def _too_deep(tool: str) -> message_pb2.Error:
    return message_pb2.Error(
        reason=reasons.ERROR_REASON_CONTENT_INVALID, message=f"the answer of {tool} is nested too deep to be kept"
    )
