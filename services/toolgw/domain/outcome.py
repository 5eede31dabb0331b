"""What a run leaves behind: a value or a failure, both of bounded size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import orjson
from soma.common.v1.error_reason_pb2 import ErrorReason

from services.toolgw.domain.tool import Json
from soma_common.errors import Reason

MAX_RESULT_BYTES: Final = 64 * 1024
"""Largest result, as JSON."""
MAX_RESULT_DEPTH: Final = 24
"""Deepest nesting of a result: a level of JSON is up to three of protobuf, whose readers stop at 100."""
SHOWN_CHARACTERS: Final = 2000
"""How much of a result that is too large the failure shows."""
TRUNCATED: Final = "[truncated]"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a tool did not do what it was asked. Told to the model; it does not end the turn."""

    reason: Reason
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run: `failure`, or else `value`."""

    value: Json = None
    failure: Failure | None = None
    note: str | None = None
    """A note to be stored in the transaction that stores this."""
    forgotten_note: str | None = None
    """The key of the call whose note is to be removed in the transaction that stores this."""
    never_ran: bool = False
    """True: it failed before the tool did anything, so nothing is to be undone."""


class OutcomeUnknown(Exception):
    """A run was cut off and nobody can tell whether it had its effect; the text says where."""


def failed(message: str, **metadata: str) -> Outcome:
    """The tool failed; `message` is for the model."""
    return Outcome(failure=Failure(ErrorReason.ERROR_REASON_TOOL_FAILED, message, metadata))


def never_begun(message: str, **metadata: str) -> Outcome:
    """The tool failed before it could do anything; `message` is for the model."""
    return Outcome(failure=Failure(ErrorReason.ERROR_REASON_TOOL_FAILED, message, metadata), never_ran=True)


def bad_arguments(message: str) -> Outcome:
    """The arguments do not fit the tool, which did nothing; `message` tells the model what to change."""
    return Outcome(failure=Failure(ErrorReason.ERROR_REASON_TOOL_ARGUMENTS_INVALID, message), never_ran=True)


def bounded(outcome: Outcome) -> Outcome:
    """`outcome`, or a failure that shows its beginning if it is too large or too deep to be carried and stored."""
    if outcome.failure is not None:
        return outcome
    if _deeper_than(outcome.value, MAX_RESULT_DEPTH):
        return failed(f"the result is nested deeper than {MAX_RESULT_DEPTH} levels", bound_levels=str(MAX_RESULT_DEPTH))
    try:
        text = orjson.dumps(outcome.value)
    except TypeError as error:  # orjson's error for what JSON cannot hold: integers beyond 64 bits, lone surrogates
        return failed(f"the result cannot be written as JSON: {error}")
    if len(text) <= MAX_RESULT_BYTES:
        return outcome
    shown = text[: SHOWN_CHARACTERS * 4].decode(errors="ignore")[:SHOWN_CHARACTERS]
    return failed(
        f"the result has {len(text)} bytes, more than {MAX_RESULT_BYTES}; it begins: {shown}{TRUNCATED}",
        bound_bytes=str(MAX_RESULT_BYTES),
        size_bytes=str(len(text)),
    )


def _deeper_than(value: Json, levels: int) -> bool:
    if isinstance(value, Mapping):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value.values())
    if isinstance(value, list | tuple):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value)
    return False
