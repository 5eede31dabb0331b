"""What a model is given to read: the session so far, the inputs of the turn, and the turn's own steps.

A turn may get further inputs while it runs. Each reply is journaled with how many inputs the model had read, so that
inputs stand in the transcript where they were read, for the brain that lived through it and for one that replays it:

    context | inputs [0..s1) | reply 1, results 1 | inputs [s1..s2) | reply 2, results 2 | ... | inputs [sn..)

Messages arrive as bytes and are parsed only when a model asks for them: the echo model, which benchmarks the whole
path, reads one message however long the context is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.domain.turn import is_interim
from soma_common.errors import Internal

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

INTERRUPTED: Final = "interrupted"
"""Metadata of an assistant's message whose turn was stopped in the middle: `true`."""

_CUT_OFF: Final = "[interrupted here by the next message]"
_EXACT_INTEGERS: Final = 2**53


@dataclass(frozen=True, slots=True)
class NumberedStep:
    """A journaled step at its place."""

    number: int
    """From 1."""
    body: turn_pb2.StepBody


Entry: TypeAlias = message_pb2.Message | NumberedStep


class Conversation:
    """The material of one model call. `steps` grows with the turn, and `read_up_to` takes in further inputs; the
    context stays as the router sent it."""

    __slots__ = ("_context", "_inputs", "steps")

    def __init__(self, context: Sequence[bytes], inputs: Sequence[bytes], steps: list[turn_pb2.StepBody]) -> None:
        self._context = context
        self._inputs = list(inputs)
        self.steps = steps
        """The journaled steps of this turn, in order."""

    @property
    def is_first_turn(self) -> bool:
        """Whether nothing was said in the session before this turn."""
        return not self._context

    @property
    def input_count(self) -> int:
        """How many inputs the next model call reads, and the last one has read."""
        return len(self._inputs)

    def read_up_to(self, inputs: Sequence[bytes]) -> None:
        """Has the next model call read the turn's inputs as they are now: those it had, and what came since."""
        if len(inputs) > len(self._inputs):
            self._inputs.extend(inputs[len(self._inputs) :])

    def context(self) -> list[message_pb2.Message]:
        """What was said before this turn, oldest first. What cannot be read is left out: the turn that was to answer it
        has said so, and the session goes on.
        """
        said: list[message_pb2.Message] = []
        for stored in self._context:
            with suppress(DecodeError):
                said.append(message_pb2.Message.FromString(stored))
        return said

    def inputs(self) -> list[message_pb2.Message]:
        """The messages this turn answers, as far as they are read. Raises ITEM_CORRUPT."""
        return [read_message(stored) for stored in self._inputs]

    def transcript(self) -> list[Entry]:
        """Inputs and steps of this turn in the order the model has met them: each reply behind the inputs that it had
        read, results right behind their calls. Raises ITEM_CORRUPT for an input that cannot be read.
        """
        inputs = self.inputs()
        entries: list[Entry] = []
        told = 0
        for number, (step, seen) in enumerate(zip(self.steps, self._seen(), strict=True), start=1):
            entries += inputs[told:seen]
            told = max(told, seen)
            entries.append(NumberedStep(number, step))
        return entries + inputs[told:]

    def unanswered(self) -> list[message_pb2.Message]:
        """The inputs that no interim reply has answered yet; at least the newest. Raises ITEM_CORRUPT if one cannot be
        read or there is none.
        """
        answered = 0
        if self.steps:
            replies = zip(self.steps, self._seen(), strict=True)
            answered = max((seen for step, seen in replies if is_interim(step)), default=0)
        waiting = self._inputs[answered:] or self._inputs[-1:]
        if not waiting:
            raise Internal(reasons.ERROR_REASON_ITEM_CORRUPT, "the turn was started without a message to answer")
        return [read_message(stored) for stored in waiting]

    def interim_texts(self) -> list[str]:
        """What interim replies of this turn have said, in order: it belongs to the turn's answer."""
        return [step.model_reply.text for step in self.steps if is_interim(step)] if self.steps else []

    def _seen(self) -> list[int]:
        """For each reply how many inputs it had read, 0 for every other step.

        A reply that does not say so is an older release's: it had read what the next one had that says, or all there
        are, because such a release gave a turn its inputs at once.
        """
        seen = [0] * len(self.steps)
        latest = len(self._inputs)
        for place in range(len(self.steps) - 1, -1, -1):
            step = self.steps[place]
            if step.WhichOneof("body") == "model_reply":
                latest = min(latest, step.model_reply.inputs_seen or latest)
                seen[place] = latest
        return seen


def read_message(stored: bytes) -> message_pb2.Message:
    """Reads a serialized message. Raises ITEM_CORRUPT."""
    try:
        return message_pb2.Message.FromString(stored)
    except DecodeError as error:
        raise Internal(reasons.ERROR_REASON_ITEM_CORRUPT, f"a stored message cannot be read: {error}") from error


def text_of(message: message_pb2.Message) -> str:
    """A message as a model reads it: texts as they are, data as JSON, files by name and address, a line each."""
    parts = message.parts
    if len(parts) != 1:
        return "\n".join(map(_part_text, parts))
    return _part_text(parts[0])


def spoken(message: message_pb2.Message) -> str:
    """A message of the context as a model reads it: of one that was interrupted the model is told so."""
    text = text_of(message)
    if message.metadata.get(INTERRUPTED) != "true":
        return text
    return f"{text}\n{_CUT_OFF}" if text else _CUT_OFF


def printable(text: str) -> str:
    """Text as a message may hold it: U+0000 and lone surrogates, which models do produce, become U+FFFD."""
    if text.isascii() and "\0" not in text:
        return text
    return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in text)


def to_json(value: struct_pb2.Value) -> Json:
    """A protobuf Value as plain JSON types. Whole numbers become integers again (a Value knows only doubles)."""
    match value.WhichOneof("kind"):
        case "number_value":
            return to_number(value.number_value)
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return to_dict(value.struct_value)
        case "list_value":
            return [to_json(item) for item in value.list_value.values]
        case _:
            return None


def to_dict(struct: struct_pb2.Struct) -> dict[str, Json]:
    """A protobuf Struct as a plain dictionary, see `to_json`. In the order of its keys: a Struct keeps none, and the
    same journal must read the same in every brain."""
    return {key: to_json(struct.fields[key]) for key in sorted(struct.fields)}


def to_number(number: float) -> int | float:
    """A double as JSON would have it written: whole numbers that a double holds exactly lose their point."""
    return int(number) if math.isfinite(number) and number.is_integer() and abs(number) <= _EXACT_INTEGERS else number


def result_text(result: turn_pb2.ToolResult) -> str:
    """What a tool answered, as a model reads it: the result as JSON (text as it is), or the error in one line."""
    if result.HasField("error"):
        return f"error: {result.error.message}"
    value = to_json(result.result)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _part_text(part: message_pb2.Part) -> str:
    match part.WhichOneof("content"):
        case "text":
            return part.text
        case "data":
            return json.dumps(to_dict(part.data), ensure_ascii=False)
        case "file":
            name = part.file.name or "file"
            return f"[{name} ({part.file.media_type or 'unknown type'}): {part.file.uri}]"
        case _:
            return ""
