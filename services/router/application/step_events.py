"""A journaled step as what watchers are shown: its text, its calls or results, and the state it leads to.

Offsets count the content of a step as LiveEvent says: code points of its text, then calls or results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError
from soma.common.v1.message_pb2 import Message
from soma.common.v1.turn_pb2 import LiveEvent, StepBody, TextDelta, TurnState

TEXT_PIECE: Final = 64 * 1024
"""Most code points of text in one event, so that it fits the bus whatever they are."""
_INTERRUPTED: Final = "interrupted"
"""Metadata key of a message that holds what was kept of an interrupted turn."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The turn that events are about."""

    agent: str
    session: str
    turn_id: bytes
    number: int

    def event(self, dispatch: int, step: int) -> LiveEvent:
        """An event without content."""
        return LiveEvent(
            agent=self.agent,
            session=self.session,
            turn_id=self.turn_id,
            turn_number=max(self.number, 0),
            dispatch=dispatch,
            step=step,
        )

    def texts(self, dispatch: int, step: int, text: str, seen: int = 0) -> Iterator[LiveEvent]:
        """Text of a step behind what was seen of it, in pieces."""
        for offset in range(seen, len(text), TEXT_PIECE):
            event = self.event(dispatch, step)
            event.text.CopyFrom(TextDelta(offset=offset, text=text[offset : offset + TEXT_PIECE]))
            yield event


@dataclass(frozen=True, slots=True)
class StepContent:
    """What a step shows."""

    text: str
    items: Sequence[tuple[str, object]]
    """(name of the event, call or result) in order."""
    state: TurnState.ValueType
    """The state behind it; IDLE: it is the turn's last step."""

    @classmethod
    def of(cls, body: bytes, said: Sequence[str] = ()) -> StepContent:
        """Reads a serialized StepBody; one that this release cannot read shows nothing. `said`: see `own_text`."""
        step = StepBody()
        try:
            step.ParseFromString(body)
        except DecodeError:
            return cls("", (), TurnState.TURN_STATE_UNSPECIFIED)
        match step.WhichOneof("body"):
            case "model_reply":
                calls = [("tool_call", call) for call in step.model_reply.tool_calls]
                state = TurnState.TURN_STATE_TOOL_CALL if calls else TurnState.TURN_STATE_REFLECTING
                return cls(step.model_reply.text, calls, state)
            case "tool_results":
                results = [("tool_result", result) for result in step.tool_results.results]
                return cls("", results, TurnState.TURN_STATE_REFLECTING)
            case "final":
                return cls(own_text(step.final.message, said), (), TurnState.TURN_STATE_IDLE)
            case "failure":
                return cls("", (), TurnState.TURN_STATE_IDLE)
        return cls("", (), TurnState.TURN_STATE_UNSPECIFIED)

    @property
    def size(self) -> int:
        """How many offsets it has."""
        return len(self.text) + len(self.items)

    def events(self, origin: Origin, dispatch: int, number: int, seen: int = 0) -> Iterator[LiveEvent]:
        """The content behind `seen`."""
        yield from origin.texts(dispatch, number, self.text, seen)
        for offset, (name, item) in enumerate(self.items, len(self.text) + 1):
            if offset > seen:
                event = origin.event(dispatch, number)
                getattr(event, name).CopyFrom(item)
                event.next_offset = offset
                yield event

    def next_state(self, origin: Origin, dispatch: int, number: int) -> LiveEvent:
        """The state behind the step, which says how large the step was."""
        event = origin.event(dispatch, number + 1)
        event.state = self.state
        event.step_size = self.size
        return event


def is_kept_work(message: Message) -> bool:
    """Whether a message is what was kept of an interrupted turn."""
    return _INTERRUPTED in message.metadata


def own_text(message: Message, said: Sequence[str]) -> str:
    """The text that the last step of a turn adds to those of the steps before.

    An answer repeats interim replies, a part each, and ends with what the model said last. What was kept of an
    interrupted turn repeats every text (`said`, in order) and ends with what the model had said of the running step,
    if anything; very many of them are one part.
    """
    texts = [part.text for part in message.parts if part.HasField("text")]
    if not texts:
        return ""
    if not is_kept_work(message) or len(texts) > len(said):
        return texts[-1]
    if len(texts) == len(said):
        return ""
    return texts[0][len("\n\n".join(said)) + 2 :]


def texts_said(bodies: Sequence[bytes]) -> list[str]:
    """The texts of the replies in a journal that are not empty."""
    texts = [StepContent.of(body).text for body in bodies if not _is_last(body)]
    return [text for text in texts if text]


def _is_last(body: bytes) -> bool:
    return StepContent.of(body).state == TurnState.TURN_STATE_IDLE
