"""What the use cases need from the outside, named by need. Adapters implement these; tests pass their own.

All of them run on one event loop. Errors are `SomaError`s: `Unavailable` and `ResourceExhausted` may pass with a
retry, everything else will not.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from google.protobuf import struct_pb2
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.domain.conversation import Conversation, Json
from soma_common.errors import FailedPrecondition, SomaError, Unavailable

Outgoing: TypeAlias = cognition.Proposal | cognition.TurnText | cognition.StopTurn | cognition.RunTurnsResponse
"""What goes to a router: steps, text, declined turns, and frames with a heartbeat or draining notice to merge in."""


@dataclass(frozen=True, slots=True)
class ToolDescription:
    """A tool as a model is told about it."""

    name: str
    description: str
    parameters: Mapping[str, Json]
    """JSON Schema of the arguments."""


class CallOrigin(NamedTuple):
    """Which step of which turn a call is made for. Sent along, so that the other side can count and trace."""

    turn_id: bytes
    step: int
    dispatch: int
    attempt: int
    traceparent: str


class ModelRequest(NamedTuple):
    """One call of a model."""

    model: str
    """The model's name without its provider."""
    instructions: str
    conversation: Conversation
    tools: Sequence[ToolDescription]
    temperature: float | None
    max_output_tokens: int | None
    max_reply_bytes: int
    """Longest reply, its tool calls included. What would be longer is refused while it comes."""
    origin: CallOrigin


@dataclass(frozen=True, slots=True)
class RequestedCall:
    """A tool call the model asks for. `arguments` is None if the model wrote something that is no JSON object."""

    call_id: str
    tool: str
    arguments: Mapping[str, Json] | None


class ModelAnswer(NamedTuple):
    """What a model answered. `text` is all of its text; what was emitted before is the beginning of it."""

    text: str
    calls: Sequence[RequestedCall] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    model: str = ""
    """The model that answered, if it is not the one asked."""


def reply_too_long(max_reply_bytes: int) -> SomaError:
    """The model says more than it may."""
    return FailedPrecondition(
        reasons.ERROR_REASON_MODEL_REJECTED,
        f"the model's reply is longer than the {max_reply_bytes} bytes that are allowed; "
        "set the agent's max_output_tokens",
    )


Emit: TypeAlias = Callable[[str], None]
"""Takes a further piece of the text as soon as the model has produced it. Never blocks."""


class Model(Protocol):
    """A provider of models."""

    async def answer(self, request: ModelRequest, emit: Emit) -> ModelAnswer:
        """Answers once, no retry. Raises SomaError of the MODEL_ reasons; a cancelled call costs nothing further."""
        ...


class Models(Protocol):
    """The providers this brain knows."""

    def of(self, provider: str) -> Model:
        """The provider's adapter. Raises MODEL_REJECTED for an unknown, MODEL_UNAVAILABLE for an unconfigured one."""
        ...


@dataclass(frozen=True, slots=True)
class Invocation:
    """One journaled tool call, on its way to run at most once under its key."""

    session: message_pb2.SessionKey
    tool: str
    arguments: struct_pb2.Struct
    key: str
    turn_id: bytes
    step: int


class NotBegun(Unavailable):
    """A call of a tool did not reach the tool gateway, or was refused there before anything was begun: this try had no
    effect and will have none. A plain `Unavailable` leaves that open."""


class Tools(Protocol):
    """The tool gateway."""

    async def describe(self, tenant: str) -> Mapping[str, ToolDescription]:
        """The tools of a tenant by name. Raises SomaError."""
        ...

    async def invoke(
        self, invocation: Invocation, timeout_s: float
    ) -> tuple[struct_pb2.Value, message_pb2.Error | None]:
        """Runs a tool: its result, or the error it failed with. Raises SomaError if the gateway gave no answer:
        Unavailable, DeadlineExceeded and Internal if it is not known whether the try did anything, NotBegun and the
        others if it did nothing.
        """
        ...


class Outbox(Protocol):
    """The way to one router. `soma_common.gather.Gather` is one."""

    def put(self, item: Outgoing) -> None:
        """Adds an item, never waits. Raises GatherFull over the bound, GatherClosed when the stream has ended."""
        ...

    def close(self) -> None:
        """Takes nothing more; what is there is still written."""
        ...

    def __len__(self) -> int:
        """Items that wait to be written."""
        ...


GoOn: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
"""What a turn does whose final was not taken."""


class Journal(Protocol):
    """What one running turn says to its router, and what it hears of it."""

    @property
    def inputs(self) -> Sequence[bytes]:
        """The messages the turn answers, as far as they have come; it grows while the turn runs."""
        ...

    async def record(self, step: int, body: turn_pb2.StepBody) -> None:
        """Proposes a step and returns when it is journaled; only then may it be acted on."""
        ...

    def conclude(self, step: int, body: turn_pb2.StepBody, inputs_seen: int, go_on: GoOn) -> bool:
        """Proposes the final, after which the turn has nothing to do. False if it has inputs beyond `inputs_seen`: then
        nothing is proposed. If further ones come before it is journaled it never will be, and the turn goes on with
        `go_on`."""
        ...

    def fail(self, step: int, body: turn_pb2.StepBody) -> None:
        """Proposes a failure. The turn is over: whether it was journaled is the router's care."""
        ...

    def show(self, step: int, offset: int, text: str) -> bool:
        """Sends text of the running step; False if the router is behind and wants it later."""
        ...
