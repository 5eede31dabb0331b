"""What a tool is, and what running it does to the world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

Json = Any
"""A JSON value: None, bool, int, float, str, list or dict with text keys."""


class Effect(Enum):
    """What a run does to the world, which decides what may happen after its runner died in the middle.

    | effect         | run again? | cancelled after the death of its runner |
    |----------------|------------|-----------------------------------------|
    | NONE           | yes        | cancelled                               |
    | WITH_RESULT    | yes        | cancelled                               |
    | IDEMPOTENT     | yes        | outcome unknown                         |
    | SIDE_EFFECTFUL | never      | outcome unknown                         |
    """

    NONE = "none"
    """It only reads."""
    WITH_RESULT = "with_result"
    """Its effect is stored in the transaction that stores its result: no result, no effect."""
    IDEMPOTENT = "idempotent"
    """The same change however often it runs under one key."""
    SIDE_EFFECTFUL = "side_effectful"
    """A change each time it runs."""

    @property
    def may_run_again(self) -> bool:
        """Whether a run whose end is not known may be repeated."""
        return self is not Effect.SIDE_EFFECTFUL

    @property
    def vanishes_with_runner(self) -> bool:
        """Whether a run that left no result has left nothing else either."""
        return self in (Effect.NONE, Effect.WITH_RESULT)


class ToolKind(Enum):
    """Where a tool runs."""

    BUILT_IN = "built_in"
    """In this process."""
    HTTP = "http"
    """Behind an HTTP endpoint."""


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A tool as a model and an operator see it."""

    name: str
    """1 to 64 letters, digits, `_` and `-`: what model endpoints accept."""
    description: str
    parameters: Mapping[str, Json]
    """JSON Schema (2020-12) of the arguments, which are always an object."""
    effect: Effect
    timeout_s: float
    """Longest run in seconds."""
    tenants: frozenset[str] | None = None
    """The only tenants that have it; None: all."""
    kind: ToolKind = ToolKind.BUILT_IN
    compensation: str = ""
    """The tool that undoes a call of this one, given the call's `arguments` and `result`; empty: nothing does."""
    is_offered: bool = True
    """Whether it can be listed, and called by name; False: it only compensates."""

    def serves(self, tenant: str) -> bool:
        """Whether `tenant` has this tool."""
        return self.tenants is None or tenant in self.tenants
