"""What is kept of a turn that was interrupted: a message of the agent that its channel gets and its next turn reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from google.protobuf.message import DecodeError
from soma.common.v1.message_pb2 import Message, Role
from soma.common.v1.turn_pb2 import StepBody, ToolCall, ToolResult

_FORMAT: Final = 1
_MAX_PARTS: Final = 64
"""As many parts as any message may have."""
INTERRUPTED: Final = "interrupted"
"""Metadata key of a message that is not a whole answer; its value is `true`."""


def kept_work(journal: Sequence[bytes], text: str) -> Message | None:
    """The replies of a journal and `text`, what the model had said since, as parts in order; behind them the tool
    calls with their results, as data. None if there was nothing.
    """
    message = Message(role=Role.ROLE_ASSISTANT, metadata={INTERRUPTED: "true"})
    calls: list[tuple[ToolCall, ToolResult | None]] = []
    said: list[str] = []
    for body in _readable(journal):
        if body.HasField("model_reply"):
            said.append(body.model_reply.text)
            calls += [(call, None) for call in body.model_reply.tool_calls]
        elif body.HasField("tool_results"):
            results = body.tool_results.results
            first = len(calls) - len(results)
            calls[first:] = [(call, result) for (call, _), result in zip(calls[first:], results, strict=True)]
    said.append(text)
    said = [part for part in said if part]
    if len(said) >= _MAX_PARTS:
        said = ["\n\n".join(said)]
    for part in said:
        message.parts.add(text=part)
    if calls:
        listed = message.parts.add().data.get_or_create_list("tool_calls")
        for call, result in calls:
            entry = listed.add_struct()
            entry["tool"] = call.tool
            entry.get_or_create_struct("arguments").CopyFrom(call.arguments)
            if result is None or result.HasField("error"):
                entry["error"] = result.error.message if result is not None else "it has no result"
            else:
                entry.fields["result"].CopyFrom(result.result)
    return message if message.parts else None


def has_calls(journal: Sequence[bytes]) -> bool:
    """Whether the turn was confirmed any tool call. A step that cannot be read may hold one."""
    bodies = list(_readable(journal))
    return len(bodies) < len(journal) or any(body.model_reply.tool_calls for body in bodies)


def final_step(message: Message, inputs: int) -> bytes:
    """The step that ends a turn with a message: a serialized StepBody."""
    body = StepBody(format=_FORMAT)
    body.final.message.CopyFrom(message)
    body.final.inputs_seen = inputs
    return body.SerializeToString()


def _readable(journal: Iterable[bytes]) -> Iterable[StepBody]:
    for stored in journal:
        try:
            yield StepBody.FromString(stored)
        except DecodeError:
            continue
