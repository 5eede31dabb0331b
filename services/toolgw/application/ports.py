"""What the tool gateway's use cases need from the outside, named by need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Protocol, TypeAlias

from services.toolgw.domain.invocation import Call, Invocation, State
from services.toolgw.domain.outcome import Outcome
from services.toolgw.domain.reversal import PastCall, StoppedTurn, Undoing
from services.toolgw.domain.tool import Json, ToolDefinition


class Tool(Protocol):
    """Something that can be run."""

    @property
    def definition(self) -> ToolDefinition:
        """What it is."""
        ...

    async def run(self, call: Call) -> Outcome:
        """Run it once with arguments that fit its schema.

        Raises:
            OutcomeUnknown: it was cut off in the middle, and it may have had its effect.
            Unavailable: what it needs, such as the database, does not answer. A tool that may run again is run again
                when it is asked for; of others the outcome is unknown.
        """
        ...


class ArgumentRules(Protocol):
    """Checks arguments against a tool's JSON Schema."""

    async def violations(self, parameters: Mapping[str, Json], arguments: Mapping[str, Json]) -> Sequence[str]:
        """What does not fit, each with its place; empty when everything does."""
        ...


@dataclass(frozen=True, slots=True)
class Note:
    """Something a session was asked to remember."""

    text: str
    create_time: datetime


class NoteReader(Protocol):
    """The notes of sessions."""

    async def notes(self, tenant: str, session_id: bytes) -> Sequence[Note]:
        """All notes of a session, oldest first."""
        ...


class Finish(Enum):
    """What became of an outcome that was to be stored."""

    STORED = auto()
    """It is the end of the call."""
    LATE = auto()
    """The outcome of the call was unknown already: kept for the record, changes nothing."""
    REFUSED = auto()
    """The call was decided otherwise in between."""


class InvocationStore(Protocol):
    """Calls under their keys, durable. Every method raises Unavailable (STORE_UNAVAILABLE) when the database does not
    answer."""

    async def claim(self, call: Call, tool: ToolDefinition, claim: str, dead: Invocation | None) -> Invocation:
        """Make a call RUNNING here under a new claim, and return what is stored under its key afterwards.

        `dead` None: the key is new. Otherwise it is the RUNNING call whose dead runner is to be replaced. The caller
        owns the call when the answer's claim is its own, and may repeat a claim whose outcome it did not learn.
        """
        ...

    async def find(self, tenant: str, key: str) -> Invocation | None:
        """What is stored under a key."""
        ...

    async def finish(self, call: Call, claim: str, outcome: Outcome) -> Finish:
        """Store the outcome of a claim, and what belongs to it, in one transaction. May be repeated when its own
        outcome was not learned."""
        ...

    async def end_without_result(self, tenant: str, key: str, claim: str, state: State) -> bool:
        """Move the RUNNING call of a claim to CANCELLED or UNKNOWN; False: it was decided otherwise in between."""
        ...

    async def abandon(self, tenant: str, key: str, claim: str, *, counts: bool = True) -> None:
        """Say that nobody works on a claim any more: the call stays RUNNING, without a living runner. With `counts`
        False the attempt is not counted: it did nothing, and the tool is not to blame."""
        ...

    async def cancel(self, tenant: str, session_id: bytes, key: str) -> Invocation | None:
        """Store a tombstone under a new key and return None; or return what is stored under it. A call that runs is
        marked as asked to end, the first time."""
        ...


Look: TypeAlias = Callable[[Sequence[PastCall]], Undoing]
"""What is to be done about the calls of a turn."""


class ReversalStore(Protocol):
    """What was decided about the calls of stopped turns, durable. Every method raises Unavailable as above."""

    async def find_reversal(self, turn: StoppedTurn) -> Undoing | None:
        """What was decided; None: nothing yet."""
        ...

    async def calls_of(self, turn: StoppedTurn) -> Sequence[PastCall]:
        """The calls of a turn that may have changed something, the last first; no compensations."""
        ...

    async def begin_reversal(self, turn: StoppedTurn, look: Look) -> Undoing:
        """Decide by a look at the calls of a turn, unless somebody has; return what is decided. No call of the turn
        that may change something begins between the look and the decision, or later: it counts as cancelled."""
        ...

    async def end_reversal(self, turn: StoppedTurn, undoing: Undoing) -> Undoing:
        """Store how the compensations ended, unless somebody has; return what is stored."""
        ...


class LeaseStore(Protocol):
    """Where a runner shows that it lives."""

    async def renew(self, lease_s: float) -> None:
        """Say that this runner lives for `lease_s` from now on. Raises Unavailable."""
        ...

    async def replace_predecessors(self) -> None:
        """Say that earlier processes of this instance are dead: their calls need not wait for a lease to run out."""
        ...

    async def release(self) -> None:
        """Say that this runner is gone."""
        ...


class ToolAccess(Protocol):
    """Which tools an agent may use."""

    async def allows(self, tenant: str, agent: str, tool: str) -> bool:
        """Whether the agent exists, is in use, and its spec names the tool."""
        ...
