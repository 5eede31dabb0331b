"""Undoing the calls of a turn: what they may have left behind, and whether all of it can be taken back.

    (no row) --first look--> REVERTED    no call has left anything
                   |-------> KEPT        an effect cannot be taken back: nothing is undone
                   +-------> UNDOING --every compensation succeeded--> REVERTED
                                |--a compensation failed-------------> KEPT

The first look decides once: what it found is stored before the first compensation runs, and everybody who goes on with
it follows it. Compensations run one after the other, the last call first. One that fails ends it: what was done before
may be needed by the effect that stays, and the fewer calls were undone, the truer is what the turn's steps say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from services.toolgw.domain.invocation import COMPENSATION_SUFFIX, Call, State
from services.toolgw.domain.outcome import Outcome
from services.toolgw.domain.tool import Effect, Json


class Reversal(Enum):
    """Where the undoing of a turn is."""

    UNDOING = "undoing"
    REVERTED = "reverted"
    KEPT = "kept"


@dataclass(frozen=True, slots=True)
class StoppedTurn:
    """A turn whose calls all have an end."""

    tenant: str
    agent: str
    channel: str
    session: str
    turn_id: str
    """32 hex digits."""

    @property
    def session_id(self) -> bytes:
        """The derived id of its session, 16 bytes."""
        return self.call("", {}, "", 0).session_id

    def call(self, tool: str, arguments: dict[str, Json], key: str, step: int) -> Call:
        """A call of this turn."""
        return Call(
            tenant=self.tenant,
            agent=self.agent,
            channel=self.channel,
            session=self.session,
            tool=tool,
            arguments=arguments,
            key=key,
            turn_id=self.turn_id,
            step=step,
        )


@dataclass(frozen=True, slots=True)
class PastCall:
    """A call of a stopped turn, as it is stored."""

    key: str
    step: int
    effect: Effect
    state: State
    outcome: Outcome | None
    """Set when DONE."""
    compensation: str
    """The tool that undoes it, by what its tool declared when the call was begun; empty: nothing does."""
    arguments: dict[str, Json] | None
    """Kept for calls that can be undone."""

    @property
    def may_have_effect(self) -> bool:
        """Whether it may have changed the world. A failure may have, unless the tool never began: what an endpoint did
        before it answered with an error is not known."""
        if self.effect is Effect.NONE or self.state is State.CANCELLED:
            return False
        if self.effect is Effect.WITH_RESULT:  # No result, no effect; one that runs may still get a result.
            return self.state is State.RUNNING or self._has_result
        return not (self.outcome is not None and self.outcome.never_ran)

    @property
    def can_be_undone(self) -> bool:
        """Whether what it did is known, and its tool says how to take it back."""
        return self._has_result and bool(self.compensation) and self.arguments is not None

    @property
    def _has_result(self) -> bool:
        return self.outcome is not None and self.outcome.failure is None

    def undone_in(self, turn: StoppedTurn) -> Call:
        """The call that undoes it; it must be one that can be undone."""
        assert self.outcome is not None
        arguments = {"arguments": self.arguments, "result": self.outcome.value}
        return turn.call(self.compensation, arguments, self.key + COMPENSATION_SUFFIX, self.step)


@dataclass(frozen=True, slots=True)
class Undoing:
    """What was decided about the calls of a turn."""

    state: Reversal
    effects: tuple[str, ...]
    """The keys of the calls that may have had an effect, the last call first."""
    kept: tuple[str, ...] = ()
    """Those of them whose effect stays; set when KEPT."""

    def ended(self, kept: tuple[str, ...]) -> Undoing:
        """With the compensations behind it; `kept` empty: all succeeded."""
        return replace(self, state=Reversal.KEPT if kept else Reversal.REVERTED, kept=kept)


def first_look(calls: Sequence[PastCall], has_tool: Callable[[str], bool]) -> Undoing:
    """What is to be done about `calls`, the last call first; `has_tool` says whether a compensation can be run."""
    with_effect = [call for call in calls if call.may_have_effect]
    undoing = Undoing(Reversal.UNDOING, tuple(call.key for call in with_effect))
    if not with_effect:
        return undoing.ended(())
    if not all(call.can_be_undone and has_tool(call.compensation) for call in with_effect):
        return undoing.ended(undoing.effects)
    return undoing
