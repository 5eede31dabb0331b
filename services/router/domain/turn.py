"""A turn's life: Idle -> Thinking -> ToolCall -> Reflecting -> Idle, and what a step may do to it."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class TurnState(IntEnum):
    """Where a running turn is; the numbers are those of soma.common.v1.TurnState."""

    IDLE = 1
    THINKING = 2
    TOOL_CALL = 3
    REFLECTING = 4


class StepKind(IntEnum):
    """What a step is; the numbers are those of soma.cognition.v1.StepKind."""

    MODEL_REPLY = 1
    TOOL_RESULTS = 2
    FINAL = 3
    FAILURE = 4
    INTERIM_REPLY = 5


class TurnStatus(IntEnum):
    """Whether a turn runs; the numbers are those of soma.router.v1.TurnStatus."""

    RUNNING = 1
    CONVERGING = 2
    ENDED = 3


class Outcome(IntEnum):
    """How a message ends; the numbers are those of soma.common.v1.Outcome."""

    FINAL = 1
    ERROR = 2
    REJECTED = 3
    CANCELLED = 4
    INTERRUPTED = 5
    ABSORBED = 6
    EXPIRED = 7


_TRANSITIONS: Final[dict[tuple[TurnState, int], TurnState]] = {
    (TurnState.THINKING, StepKind.MODEL_REPLY): TurnState.TOOL_CALL,
    (TurnState.REFLECTING, StepKind.MODEL_REPLY): TurnState.TOOL_CALL,
    (TurnState.TOOL_CALL, StepKind.TOOL_RESULTS): TurnState.REFLECTING,
    (TurnState.THINKING, StepKind.INTERIM_REPLY): TurnState.REFLECTING,
    (TurnState.REFLECTING, StepKind.INTERIM_REPLY): TurnState.REFLECTING,
    (TurnState.THINKING, StepKind.FINAL): TurnState.IDLE,
    (TurnState.REFLECTING, StepKind.FINAL): TurnState.IDLE,
    (TurnState.THINKING, StepKind.FAILURE): TurnState.IDLE,
    (TurnState.TOOL_CALL, StepKind.FAILURE): TurnState.IDLE,
    (TurnState.REFLECTING, StepKind.FAILURE): TurnState.IDLE,
}


class InvalidTransition(Exception):
    """A step of this kind cannot follow in the turn's state."""

    def __init__(self, state: TurnState, kind: int) -> None:
        super().__init__(f"a step of kind {kind} cannot follow in state {state.name}")
        self.state = state
        self.kind = kind


def after(state: TurnState, kind: int) -> TurnState:
    """The state of a turn in `state` once a step of `kind` is journaled. Raises InvalidTransition."""
    try:
        return _TRANSITIONS[state, kind]
    except KeyError:
        raise InvalidTransition(state, kind) from None


def replay(kinds: list[int]) -> TurnState:
    """The state of a turn whose journal holds steps of `kinds`. Raises InvalidTransition for a journal no turn can
    have.
    """
    state = TurnState.THINKING
    for kind in kinds:
        state = after(state, kind)
    return state
