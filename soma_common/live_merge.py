"""Joins what is known of a running turn into one gap-free sequence.

A watcher hears of a turn from two sides: live events as they happen, and snapshots that say where it stands. Both
overlap, either may come first, live events may be lost. The place of an event is (dispatch, step, offset); what is
at or below the place reached is dropped, what lies beyond a gap is held until a snapshot fills it. So every watcher
shows the same content, however it was framed.

A new dispatch of the turn replaces what the one before had not journaled: that is announced by `TurnRestarted`, by
the router or, when that was lost, by us.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from soma.common.v1.turn_pb2 import LiveEvent, TurnState

MAX_HELD: Final = 4096
"""Live events held while a snapshot is on its way. More say that the snapshot does not come: they are dropped, the
next fills in.
"""


class TurnMerge:
    """The place reached in one turn, chosen by its id or by a message that it answers. No I/O."""

    def __init__(self, *, turn_id: bytes = b"", message_id: bytes = b"", by_snapshot: bool = False) -> None:
        """Exactly one of the ids is given, 16 bytes.

        `by_snapshot`: a live event that names the message does not make its turn ours, as the message's key may have
        been used for other content too, which has the same message id; only a snapshot tells.
        """
        self._turn_id = turn_id
        self._message_id = message_id
        self._by_snapshot = by_snapshot
        self._held: list[LiveEvent] = []
        self._dispatch = 0
        self._step = 0
        self._text = 0
        self._calls: set[int] = set()
        self._results: set[int] = set()
        self._last_calls: frozenset[int] = frozenset()
        self._state: TurnState.ValueType = TurnState.TURN_STATE_UNSPECIFIED
        self.gap = False
        """Whether something is missing, so that only a snapshot lets it go on."""
        self.named = False
        """Whether a live event named our message in a turn not known to be ours, so that a snapshot is to tell."""
        self.ended = False
        """Whether the event that ends the turn was given out."""

    def live(self, events: Iterable[LiveEvent]) -> list[LiveEvent]:
        """Events as they happen; returns those to show now. Sets `gap` when one is missing."""
        shown: list[LiveEvent] = []
        for event in events:
            if self.ended:
                break
            if self._foreign(event, learn=not self._by_snapshot):
                continue
            if not self._turn_id or (self.gap and not self._begins(event)):
                self._hold(event)
            else:
                self._advance(event, shown)
        return shown

    def snapshot(self, events: Iterable[LiveEvent]) -> list[LiveEvent]:
        """Where the turn stands; returns what was not shown yet, then the held live events that go on from there.

        The events may come in any order of steps.
        """
        shown: list[LiveEvent] = []
        self.gap = False
        for event in sorted(events, key=_place):
            if not self.ended and not self._foreign(event, learn=True):
                self._advance(event, shown, jump=True)
        if self._turn_id:
            held, self._held = self._held, []
            shown.extend(self.live(held))
        return shown

    def lost(self) -> None:
        """The connection was lost: events may be missing before the next one."""
        self.gap = True

    def unknown(self) -> None:
        """The owner does not know the turn yet: what was held can only be about other turns, unless our message was
        named since it was asked.
        """
        if not self.named:
            self._held.clear()

    def _foreign(self, event: LiveEvent, *, learn: bool) -> bool:
        """Whether an event is about another turn. `learn`: an event that names our message tells our turn's id."""
        names_message = bool(self._message_id) and (
            self._message_id in event.message_ids
            or (event.WhichOneof("event") == "ended" and self._message_id in event.ended.message_ids)
        )
        if names_message and event.turn_id != self._turn_id:
            if not learn:
                self.named = True
                return bool(self._turn_id)
            # The first, or another one that absorbed the message.
            self._turn_id = event.turn_id
            self._dispatch = 0
            self._next_step(0)
        return bool(self._turn_id) and event.turn_id != self._turn_id

    def _begins(self, event: LiveEvent) -> bool:
        """Whether nothing of our turn can lie before this event."""
        return event.WhichOneof("event") == "ended" or (
            self._dispatch == 0 and event.dispatch == 1 and event.step <= 1 and bool(event.message_ids)
        )

    def _hold(self, event: LiveEvent) -> None:
        if len(self._held) >= MAX_HELD:
            self._held.clear()
        self._held.append(event)

    def _advance(self, event: LiveEvent, shown: list[LiveEvent], *, jump: bool = False) -> None:
        """Shows the event if it is the next; `jump`: it comes from a snapshot, before which nothing is missing."""
        kind = event.WhichOneof("event")
        if kind == "ended":
            self.ended = True
            shown.append(event)
            return
        if event.dispatch < self._dispatch or kind is None:
            return
        if event.dispatch > self._dispatch and not self._new_dispatch(event, shown, jump):
            return
        if event.step < self._step:
            return
        if event.step > self._step:
            if not jump and self._step and not (event.step == self._step + 1 and self._step_complete()):
                self._miss(event)
                return
            self._next_step(event.step)
        self.gap = False
        self._show(kind, event, shown, jump)

    def _step_complete(self) -> bool:
        """Whether the step we are in may be followed by another: its calls, or the results of all calls, were shown."""
        return bool(self._calls) or (bool(self._results) and self._results >= self._last_calls)

    def _new_dispatch(self, event: LiveEvent, shown: list[LiveEvent], jump: bool) -> bool:
        """Goes over to a newer dispatch. Returns whether `event` is still to be looked at."""
        if event.WhichOneof("event") == "restarted":
            self._restart(event.dispatch, event.restarted.from_step)
            shown.append(event)
            if not jump and event.restarted.from_step > max(self._step, 1):
                self.gap = True  # steps were journaled that were never shown
            return False
        if self._dispatch:
            if not jump:
                self._miss(event)
                return False
            # Steps before ours are journaled, since ours followed them; ours may not be.
            notice = LiveEvent(
                agent=event.agent,
                session=event.session,
                turn_id=event.turn_id,
                dispatch=event.dispatch,
                step=self._step,
            )
            notice.restarted.from_step = self._step
            shown.append(notice)
            self._restart(event.dispatch, self._step)
        else:
            if not jump and not self._begins(event):
                self._miss(event)
                return False
            self._dispatch = event.dispatch
        return True

    def _restart(self, dispatch: int, from_step: int) -> None:
        """What was shown of `from_step` and later is taken back; what lies before is journaled and stays."""
        self._dispatch = dispatch
        self.gap = False
        if from_step <= self._step:
            self._next_step(from_step)

    def _next_step(self, step: int) -> None:
        self._last_calls = frozenset(self._calls) if step == self._step + 1 else frozenset()
        self._step = step
        self._text = 0
        self._calls.clear()
        self._results.clear()
        self._state = TurnState.TURN_STATE_UNSPECIFIED

    def _show(self, kind: str, event: LiveEvent, shown: list[LiveEvent], jump: bool) -> None:
        match kind:
            case "state":
                if event.state != self._state:
                    self._state = event.state
                    shown.append(event)
            case "text":
                self._show_text(event, shown)
            case "tool_call":
                if event.tool_call.index not in self._calls:
                    self._calls.add(event.tool_call.index)
                    shown.append(event)
            case "tool_result":
                if not jump and self._last_calls and event.tool_result.index not in self._last_calls:
                    self._miss(event)  # its call was never shown
                elif event.tool_result.index not in self._results:
                    self._results.add(event.tool_result.index)
                    shown.append(event)
            case "restarted":
                pass  # of the dispatch we are in: announced before

    def _show_text(self, event: LiveEvent, shown: list[LiveEvent]) -> None:
        offset, text = event.text.offset, event.text.text
        if offset > self._text:
            self._miss(event)
            return
        new = text[self._text - offset :]
        if not new:
            return
        if len(new) < len(text):
            rest = LiveEvent()
            rest.CopyFrom(event)
            rest.text.offset = self._text
            rest.text.text = new
            event = rest
        self._text += len(new)
        shown.append(event)

    def _miss(self, event: LiveEvent) -> None:
        self.gap = True
        self._hold(event)


def _place(event: LiveEvent) -> tuple[bool, int, int]:
    return event.WhichOneof("event") == "ended", event.dispatch, event.step
