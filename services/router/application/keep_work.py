"""What is kept of a turn that was interrupted: a message of the agent that its channel gets and its next turn reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import ListValue
from soma.common.v1.message_pb2 import Message, Role
from soma.common.v1.turn_pb2 import StepBody, ToolCall, ToolResult

_FORMAT: Final = 1
_MAX_PARTS: Final = 64
"""As many parts as any message may have."""
_TEXT_BYTES: Final = 256 * 1024
"""Most text that is kept: as much as a reply may have."""
_CALL_BYTES: Final = 128 * 1024
"""Most of arguments and results that is kept. With the text it fits the bus, and the context of the next turn."""
_OMITTED: Final = "[...] "
INTERRUPTED: Final = "interrupted"
"""Metadata key of a message that is not a whole answer; its value is `true`."""


def kept_work(journal: Sequence[bytes], text: str) -> Message | None:
    """The replies of a journal and `text`, what the model had said since, as parts in order; behind them the tool
    calls with their results, as data. None if there was nothing.

    It is delivered and read like any answer, so it is as bounded: of very long texts the ends are kept, of very much
    that tools said the newest.
    """
    message = Message(role=Role.ROLE_ASSISTANT, metadata={INTERRUPTED: "true"})
    calls: list[tuple[ToolCall, ToolResult | None]] = []
    said: list[str] = []
    answered = 0
    for body in _readable(journal):
        if body.HasField("model_reply"):
            answered = len(calls)
            said.append(body.model_reply.text)
            calls += [(call, None) for call in body.model_reply.tool_calls]
        elif body.HasField("tool_results"):
            results = {result.index: result for result in body.tool_results.results}
            calls[answered:] = [(call, results.get(call.index)) for call, _ in calls[answered:]]
            answered = len(calls)
    said.append(text)
    said = [part for part in said if part]
    if len(said) >= _MAX_PARTS:
        said = ["\n\n".join(said)]
    for part in _ends(said):
        message.parts.add(text=part)
    if calls:
        _list_calls(calls, message.parts.add().data.get_or_create_list("tool_calls"))
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


def _ends(texts: Sequence[str]) -> list[str]:
    """As many texts, in order, the oldest of them cut if they are too long together: none is left out, so that
    watchers find the running step's text in the same place.
    """
    room = _TEXT_BYTES
    kept: list[str] = []
    for text in reversed(texts):
        size = len(text) if text.isascii() else len(text.encode())
        if size > room:
            text = _OMITTED + (text.encode()[size - room :].decode(errors="ignore") if room else "")
        room -= min(size, room)
        kept.append(text)
    return kept[::-1]


def _list_calls(calls: Sequence[tuple[ToolCall, ToolResult | None]], listed: ListValue) -> None:
    """Adds an entry for each call; of the oldest only the tool, if they are too much together."""
    room = _CALL_BYTES
    fits: list[bool] = []
    for call, result in reversed(calls):
        room -= call.ByteSize() + (result.ByteSize() if result is not None else 0)
        fits.append(room >= 0)
    for (call, result), whole in zip(calls, reversed(fits), strict=True):
        entry = listed.add_struct()
        entry["tool"] = call.tool
        if not whole:
            entry["omitted"] = True
            continue
        entry.get_or_create_struct("arguments").CopyFrom(call.arguments)
        if result is None or result.HasField("error"):
            entry["error"] = result.error.message if result is not None else "it has no result"
        else:
            entry.fields["result"].CopyFrom(result.result)


def _readable(journal: Iterable[bytes]) -> Iterable[StepBody]:
    for stored in journal:
        try:
            yield StepBody.FromString(stored)
        except DecodeError:
            continue
