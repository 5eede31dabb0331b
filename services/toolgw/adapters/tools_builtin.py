"""The tools that are always there: the time, arithmetic, and notes that a session keeps."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final
from zoneinfo import ZoneInfo

from services.toolgw.application.ports import NoteReader
from services.toolgw.domain.expression import MAX_CHARACTERS, ExpressionError, compute
from services.toolgw.domain.invocation import Call
from services.toolgw.domain.outcome import Outcome, bad_arguments, failed
from services.toolgw.domain.tool import Effect, Json, ToolDefinition

TIMEOUT_S: Final = 5.0
MAX_NOTES: Final = 100
"""Notes of one session. Calls that run at the same moment may pass it by a few."""
MAX_NOTE_CHARACTERS: Final = 500
"""With 100 notes in every script a recall stays below the largest result."""


def _object(required: list[str], **properties: Json) -> dict[str, Json]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


class CurrentTime:
    """`current_time`: what time it is, in UTC and in a zone of the caller's choice."""

    definition = ToolDefinition(
        name="current_time",
        description="Returns the current date and time in UTC, and in a time zone if one is named.",
        parameters=_object(
            [],
            timezone={
                "type": "string",
                "maxLength": 64,
                "description": "IANA name of a time zone, for example Europe/Berlin. Leave out for UTC.",
            },
        ),
        effect=Effect.NONE,
        timeout_s=TIMEOUT_S,
    )

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now

    async def run(self, call: Call) -> Outcome:
        """Result: the time to the second as ISO 8601, in UTC (`...Z`) or with the offset of the zone."""
        now = self._now().astimezone(UTC).replace(microsecond=0)
        name: str = call.arguments.get("timezone") or "UTC"
        if name == "UTC":
            return Outcome(value=now.isoformat().replace("+00:00", "Z"))
        try:
            return Outcome(value=now.astimezone(ZoneInfo(name)).isoformat())
        except (OSError, ValueError, KeyError):  # What zoneinfo raises for names that are none, paths and folders.
            return bad_arguments(f"{name!r} is no IANA time zone; examples: Europe/Berlin, America/New_York, UTC")


class Calculate:
    """`calculate`: arithmetic."""

    definition = ToolDefinition(
        name="calculate",
        description=(
            "Computes an arithmetic expression exactly. Knows decimal numbers, parentheses and"
            " + - * / // (division rounded down) % (remainder) ** (power)."
        ),
        parameters=_object(
            ["expression"],
            expression={
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_CHARACTERS,
                "description": "The expression, for example (2 + 3) * 4.5 or 2**10",
            },
        ),
        effect=Effect.NONE,
        timeout_s=TIMEOUT_S,
    )

    async def run(self, call: Call) -> Outcome:
        """Result: the number as text, since JSON's numbers are not exact; ` (rounded)` follows one that is rounded."""
        try:
            computed = compute(call.arguments["expression"])
        except ExpressionError as error:
            return bad_arguments(str(error))
        return Outcome(value=computed.text if computed.exact else f"{computed.text} (rounded)")


class RememberNote:
    """`remember_note`: writes a note down. The note is stored with the call's result, so it is there exactly once."""

    definition = ToolDefinition(
        name="remember_note",
        description="Remembers a short note for the rest of this conversation, also after a restart.",
        parameters=_object(
            ["note"],
            note={
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_NOTE_CHARACTERS,
                "description": "What to remember, as one or two sentences.",
            },
        ),
        effect=Effect.WITH_RESULT,
        timeout_s=TIMEOUT_S,
        compensation="forget_note",
    )

    def __init__(self, notes: NoteReader) -> None:
        self._notes = notes

    async def run(self, call: Call) -> Outcome:
        """Result: `remembered`, the note."""
        note: str = call.arguments["note"]
        if "\0" in note:
            return bad_arguments("note: U+0000 cannot be stored; leave it out")
        if len(await self._notes.notes(call.tenant, call.session_id)) >= MAX_NOTES:
            return failed(f"this conversation has {MAX_NOTES} notes already, no more are kept", bound=str(MAX_NOTES))
        return Outcome(value={"remembered": note}, note=note)


class ForgetNote:
    """`forget_note`: undoes `remember_note`. The note goes with the storing of this call's result. Nobody is offered
    it: what a turn wrote down goes when the turn is dropped."""

    definition = ToolDefinition(
        name="forget_note",
        description="Removes the note that a call of remember_note wrote.",
        parameters=_object(["arguments", "result"], arguments={"type": "object"}, result={"type": "object"}),
        effect=Effect.WITH_RESULT,
        timeout_s=TIMEOUT_S,
        is_offered=False,
    )

    async def run(self, call: Call) -> Outcome:
        """Result: null. A note that is gone is as good as removed."""
        return Outcome(value=None, forgotten_note=call.compensates)


class RecallNotes:
    """`recall_notes`: what was written down in this session."""

    definition = ToolDefinition(
        name="recall_notes",
        description="Returns all notes remembered in this conversation, oldest first.",
        parameters=_object([]),
        effect=Effect.NONE,
        timeout_s=TIMEOUT_S,
    )

    def __init__(self, notes: NoteReader) -> None:
        self._notes = notes

    async def run(self, call: Call) -> Outcome:
        """Result: `notes`, a list of texts."""
        notes = await self._notes.notes(call.tenant, call.session_id)
        return Outcome(value={"notes": [note.text for note in notes]})
