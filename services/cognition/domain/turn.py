"""The turn machine: where a turn is, which step may come next, and what to do now.

    Idle --start--> Thinking --model reply--> ToolCall --tool results--> Reflecting <--+
                     |    |                      ^                        |  |   |     | interim reply
                     |    |                      +------ model reply -----+  |   +-----+
                     |    +------------------ interim reply -------------------> Reflecting
                     +------------------- final, failure --------------------+--> Idle

An interim reply is one without tool calls that does not end the turn, because further inputs came before it was taken
as the final. A failure may end a turn wherever it runs, also while tools run. Only journaled steps move the machine: a
brain that replays a journal and a brain that lived through it stand at the same place, which is what lets any brain go
on with any turn (tests/unit/cognition/test_turn.py). Any other step is INVALID_TRANSITION.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Final

from google.protobuf.message import DecodeError, EncodeError
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import turn_pb2

from soma_common.errors import FailedPrecondition, Internal

STEP_FORMAT: Final = 1
"""The format of the steps this release writes (`StepBody.format`)."""

READABLE_FORMATS: Final = frozenset({STEP_FORMAT})
"""The formats this release reads: its own and the one before, of which there is none yet."""

_REPLY: Final = cognition.STEP_KIND_MODEL_REPLY
_RESULTS: Final = cognition.STEP_KIND_TOOL_RESULTS
_FINAL: Final = cognition.STEP_KIND_FINAL
_FAILURE: Final = cognition.STEP_KIND_FAILURE
_INTERIM: Final = cognition.STEP_KIND_INTERIM_REPLY

_KINDS: Final = MappingProxyType(
    {"model_reply": _REPLY, "tool_results": _RESULTS, "final": _FINAL, "failure": _FAILURE}
)

_AFTER: Final = MappingProxyType(
    {
        (turn_pb2.TURN_STATE_THINKING, _REPLY): turn_pb2.TURN_STATE_TOOL_CALL,
        (turn_pb2.TURN_STATE_THINKING, _INTERIM): turn_pb2.TURN_STATE_REFLECTING,
        (turn_pb2.TURN_STATE_THINKING, _FINAL): turn_pb2.TURN_STATE_IDLE,
        (turn_pb2.TURN_STATE_THINKING, _FAILURE): turn_pb2.TURN_STATE_IDLE,
        (turn_pb2.TURN_STATE_TOOL_CALL, _RESULTS): turn_pb2.TURN_STATE_REFLECTING,
        (turn_pb2.TURN_STATE_TOOL_CALL, _FAILURE): turn_pb2.TURN_STATE_IDLE,
        (turn_pb2.TURN_STATE_REFLECTING, _REPLY): turn_pb2.TURN_STATE_TOOL_CALL,
        (turn_pb2.TURN_STATE_REFLECTING, _INTERIM): turn_pb2.TURN_STATE_REFLECTING,
        (turn_pb2.TURN_STATE_REFLECTING, _FINAL): turn_pb2.TURN_STATE_IDLE,
        (turn_pb2.TURN_STATE_REFLECTING, _FAILURE): turn_pb2.TURN_STATE_IDLE,
    }
)


class Next(Enum):
    """What a turn needs now."""

    CALL_MODEL = "ask the model, with everything journaled so far"
    RUN_TOOLS = "run the tools of the last reply"
    NOTHING = "the turn has ended"


class Turn:
    """One turn at the place its journal says. Holds states and positions; of the content only the calls that wait for
    results."""

    __slots__ = ("_ended", "calls", "inputs_seen", "interims", "state", "steps")

    def __init__(self) -> None:
        self.state: turn_pb2.TurnState.ValueType = turn_pb2.TURN_STATE_THINKING
        self.steps = 0
        """Journaled steps; the next one is `steps + 1`."""
        self.interims = 0
        """Interim replies among them."""
        self.inputs_seen = 0
        """How many inputs the last reply that says so had read."""
        self.calls: Sequence[turn_pb2.ToolCall] = ()
        """The calls of the last reply while their results are missing."""
        self._ended = False

    @property
    def next(self) -> Next:
        """What to do now."""
        if self._ended:
            return Next.NOTHING
        return Next.RUN_TOOLS if self.state == turn_pb2.TURN_STATE_TOOL_CALL else Next.CALL_MODEL

    def record(self, step: turn_pb2.StepBody) -> None:
        """Moves on by a journaled step. Raises INVALID_TRANSITION for one that cannot come here, the turn staying as
        it was."""
        kind = kind_of(step)
        after = _AFTER.get((self.state, kind))
        if after is None or not self._fits(kind, step):
            raise FailedPrecondition(
                reasons.ERROR_REASON_INVALID_TRANSITION,
                f"step {self.steps + 1} is {cognition.StepKind.Name(kind)}, which cannot follow in state "
                f"{turn_pb2.TurnState.Name(self.state)}; the journal of this turn is not one a brain wrote",
            )
        self.state = after
        self.steps += 1
        self.interims += kind == _INTERIM
        self.inputs_seen = step.model_reply.inputs_seen or self.inputs_seen
        self.calls = step.model_reply.tool_calls if kind == _REPLY else ()
        self._ended = after == turn_pb2.TURN_STATE_IDLE

    def has_room_for_tools(self, max_steps: int) -> bool:
        """Whether a reply, its results and an answer still fit: tools whose results nobody could read must not run."""
        return self._counted + 3 <= max_steps

    def has_room(self, max_steps: int) -> bool:
        """Whether one more step fits."""
        return self._counted < max_steps

    @property
    def _counted(self) -> int:
        """The steps that count against the limit, which is there to stop a model that goes round in circles. An interim
        reply does not: the user caused it, with a message each."""
        return self.steps - self.interims

    def _fits(self, kind: cognition.StepKind.ValueType, step: turn_pb2.StepBody) -> bool:
        """Whether the parts of a step fit each other and what was before: calls are numbered from 0, each has one
        result, an interim reply says something, and what was read stays read."""
        reply = step.model_reply
        if reply.inputs_seen and reply.inputs_seen < self.inputs_seen:
            return False
        if kind == _REPLY:
            return all(call.index == i for i, call in enumerate(reply.tool_calls))
        if kind == _INTERIM:
            return bool(reply.text)
        if kind == _RESULTS:
            return [result.index for result in step.tool_results.results] == [call.index for call in self.calls]
        return True


def kind_of(step: turn_pb2.StepBody) -> cognition.StepKind.ValueType:
    """The kind of a step. Raises ITEM_CORRUPT if it has no content."""
    body = step.WhichOneof("body")
    if body is None:
        raise Internal(reasons.ERROR_REASON_ITEM_CORRUPT, "a journaled step has no content")
    return _INTERIM if is_interim(step) else _KINDS[body]


def is_interim(step: turn_pb2.StepBody) -> bool:
    """Whether a step is a reply of the model that asks for no tools."""
    return step.WhichOneof("body") == "model_reply" and not step.model_reply.tool_calls


def read_step(stored: bytes) -> turn_pb2.StepBody:
    """Reads a step as the journal holds it. Raises SCHEMA_UNKNOWN for another release's format, ITEM_CORRUPT for
    none."""
    try:
        step = turn_pb2.StepBody.FromString(stored)
    except DecodeError as error:
        raise Internal(reasons.ERROR_REASON_ITEM_CORRUPT, f"a journaled step cannot be read: {error}") from error
    if step.format not in READABLE_FORMATS:
        raise FailedPrecondition(
            reasons.ERROR_REASON_SCHEMA_UNKNOWN,
            f"a journaled step has format {step.format}, this brain reads {sorted(READABLE_FORMATS)}: "
            "run the release that wrote it, or a newer one",
            {"format": str(step.format)},
        )
    return step


def check_depth(step: Callable[[], turn_pb2.StepBody]) -> bool:
    """Whether the step that `step` builds can be read back.

    JSON of a model or a tool may be nested deeper than protobuf's parser goes (100 messages), and a journal that cannot
    be read would end its turn on the next brain. Building is part of the check, because copying a message parses it.
    """
    try:
        turn_pb2.StepBody.FromString(step().SerializeToString())
    except (DecodeError, EncodeError):
        return False
    return True


def replay(journal: Iterable[turn_pb2.StepBody]) -> Turn:
    """The turn at the end of its journal. Raises INVALID_TRANSITION or ITEM_CORRUPT if no turn can have written it."""
    turn = Turn()
    for step in journal:
        turn.record(step)
    return turn
