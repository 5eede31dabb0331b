"""Joins what is known of running turns into one gap-free sequence, from any place on. No I/O.

A watcher hears of a turn from two sides: live events as they happen, and pages that say what lies behind the place it
has reached. Both overlap, either may come first, live events may be lost. The place is (turn, dispatch, step,
offset), see WatchPosition; what is below it is dropped, what lies beyond a gap is held until a page fills it. So
every watcher shows the same content, however it was framed.

What a page says of journaled steps is the truth. Text of a running step is what its dispatch has said so far: when
another dispatch does the step again, or the step is journaled as something else, what was shown is taken back by
`TurnRestarted` first, announced by the router or, when that was lost, by us.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome, TurnState, WatchPosition
from soma.router.v1.outbound_pb2 import WatchSnapshot

MAX_HELD: Final = 4096
"""Live events held while a page is on its way. More say that it does not come: they are dropped, the next fills in."""
_PAST: Final = 16


class Watched(NamedTuple):
    """An event to show, and the place behind it."""

    event: LiveEvent
    position: WatchPosition


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a message."""

    turn_id: bytes = b""
    """The turn that has taken it; empty: it waits."""
    ahead: int = 0
    """How many messages of the session are before it while it waits, the running turn included."""
    ended: Delivery | None = None
    """The outcome, if that turn has ended."""


def final_text(event: LiveEvent) -> str | None:
    """The text of the last step of a turn that ended with an answer: what the model said last is the last part of the
    message, interim replies are the parts before. None for a turn that ended otherwise.
    """
    if event.ended.outcome != Outcome.OUTCOME_FINAL:
        return None
    parts = event.ended.message.parts
    return parts[-1].text if parts else ""


def is_answer(event: LiveEvent, message_id: bytes) -> bool:
    """Whether an event is the end of a turn with the outcome of a message; else the message is another turn's."""
    ended = event.ended
    mine = not ended.message_ids or message_id in ended.message_ids
    return event.HasField("ended") and mine and ended.outcome != Outcome.OUTCOME_ABSORBED


class WatchMerge:
    """The place reached by one watcher of a turn, of the turn that answers a message, or of a session."""

    def __init__(
        self,
        *,
        turn_id: bytes = b"",
        message_id: bytes = b"",
        by_snapshot: bool = False,
        session: bool = False,
        after: WatchPosition | None = None,
    ) -> None:
        """Exactly one of `turn_id`, `message_id` (16 bytes each) and `session` is given.

        `by_snapshot`: a live event that names the message does not make its turn ours, as the message's key may have
        been used for other content too, which has the same message id; only a page tells. `after`: where an earlier
        watch got to.
        """
        self._message_id = message_id
        self._by_snapshot = by_snapshot
        self._session = session
        self._given_up: set[bytes] = set()
        """Turns that took our message and did not answer it."""
        self._past: deque[bytes] = deque(maxlen=_PAST)
        self._held: list[LiveEvent] = []
        self._held_lost = False
        self._synced = False
        """Whether live events go on from the place reached."""
        self._fresh = session and after is None
        """Whether the session's present is where the watch begins."""
        self._queue: tuple[tuple[bytes, ...], int] | None = None
        self._number = 0
        self._dispatch = 0
        """The dispatch that the content shown of the step came from."""
        self._newest = 0
        """The newest dispatch of the turn that is known."""
        self._begin(turn_id)
        if after is not None:
            self._turn = after.turn_id or turn_id
            self._dispatch = after.dispatch
            self._step, self._offset = max(after.step, 1), after.offset
            self._turn_ended = after.ended
        self.gap = True
        """Whether something is missing, so that only a page lets it go on."""
        self.named = False
        """Whether a live event named our message in a turn not known to be ours, so that a page is to tell."""
        self.ended = bool(turn_id) and self._turn_ended
        """Whether the event that ends the watch was given out."""
        self.position_unknown = False
        """Whether the place to go on from is of no turn that is known."""

    @property
    def position(self) -> WatchPosition:
        """The place reached: everything before it was shown."""
        if self._fresh:
            return WatchPosition()
        return WatchPosition(
            turn_id=self._turn,
            dispatch=self._dispatch,
            step=self._step if self._turn else 0,
            offset=self._offset,
            ended=self._turn_ended,
        )

    @property
    def about_message(self) -> bool:
        """Whether the next page is to say which turn answers the message."""
        return bool(self._message_id) and not self._turn

    # ---- live events

    def live(self, events: Iterable[LiveEvent]) -> list[Watched]:
        """Events as they happen; returns those to show now. Sets `gap` when one is missing."""
        shown: list[Watched] = []
        for event in events:
            if self.ended:
                break
            if event.HasField("queued"):
                self._show_queue(event, shown)
            elif not self._concerns(event):
                continue
            elif not self._synced:
                self._hold(event)
            elif event.turn_id == self._turn:
                self._go_on(event, shown)
            else:
                self._other_turn(event, shown)
        return shown

    def lost(self) -> None:
        """The connection was lost: events may be missing before the next one."""
        self._synced, self.gap = False, True

    def _concerns(self, event: LiveEvent) -> bool:
        """Whether an event may be about what is watched."""
        if event.turn_id == self._turn:
            return not self._turn_ended
        if self._session:
            rejected = event.HasField("ended") and event.ended.outcome == Outcome.OUTCOME_REJECTED
            old = event.turn_id in self._past or 0 < event.turn_number <= self._number
            return not (rejected or old)
        if self._message_id and event.turn_id not in self._given_up:
            if self._names(event):
                self.named = True
            return self.named or not self._turn
        return False

    def _names(self, event: LiveEvent) -> bool:
        return self._message_id in event.message_ids or (
            event.HasField("ended") and self._message_id in event.ended.message_ids
        )

    def _other_turn(self, event: LiveEvent, shown: list[Watched]) -> None:
        """An event of a turn that we are not in."""
        free = not self._turn or self._turn_ended
        if self._message_id:
            if not self._names(event):
                return
            begins = free and not self._by_snapshot and self._is_beginning(event)
        else:
            begins = free and event.turn_number == self._number + 1 and self._is_beginning(event)
        if not begins:
            self._miss(event)
            return
        self.named = False
        self._begin(event.turn_id, event.turn_number)
        self._go_on(event, shown)

    def _go_on(self, event: LiveEvent, shown: list[Watched]) -> None:
        """A live event of the turn we are in."""
        if event.dispatch < self._newest:
            return
        if event.HasField("restarted"):
            self._restarted(event, shown)
            return
        if event.dispatch != self._dispatch:
            if self._dispatch or not self._is_beginning(event):
                self._miss(event)
                return
            self._dispatch = self._newest = event.dispatch
        if event.HasField("ended"):
            self._ended_live(event, shown)
        elif event.step == self._step:
            self._show(event, shown)
        elif event.step == self._step + 1 and event.HasField("step_size") and event.step_size == self._offset:
            self._enter(event.step)
            self._show(event, shown)
        elif event.step > self._step:
            self._miss(event)

    def _restarted(self, event: LiveEvent, shown: list[Watched]) -> None:
        if event.dispatch == self._newest:
            return  # of the dispatch we are in: announced before
        if event.restarted.from_step > self._step:
            self._miss(event)  # steps were journaled that were never shown
            return
        self._enter(event.restarted.from_step)
        self._dispatch = self._newest = event.dispatch
        self._give(event, shown)

    def _ended_live(self, event: LiveEvent, shown: list[Watched]) -> None:
        """The end is shown when nothing is missing before it: else the journal tells how the turn went on."""
        text = final_text(event)
        if event.step == self._step and text is not None and self._offset <= len(text):
            self._rest_of_final(event, text, shown)
        elif event.step != self._step or not event.HasField("step_size") or event.step_size != self._offset:
            self._miss(event)
            return
        self._end(event, shown)

    def _rest_of_final(self, event: LiveEvent, text: str, shown: list[Watched]) -> None:
        if self._offset == len(text):
            return
        rest = _of_turn(event)
        rest.text.offset, rest.text.text = self._offset, text[self._offset :]
        self._offset = self._text = len(text)
        self._give(rest, shown)

    # ---- pages

    def page(self, page: WatchSnapshot) -> list[Watched]:
        """What lies behind the place that was asked about; then the held live events that go on from there.

        Sets `gap` if more is to be asked for.
        """
        shown: list[Watched] = []
        if page.position_unknown:
            self.position_unknown = True
            return shown
        self.gap = False
        if self._is_stale(page):
            self._synced, self.gap = False, True
            return shown
        events = sorted(page.events, key=_order)
        if not self._turn and self._session:
            self._find_place(page, events)
        for event in events:
            if self.ended or self.gap:
                break
            if event.HasField("queued"):
                self._show_queue(event, shown)
            elif self._is_ours(event):
                self._read(event, shown)
        if self.ended:
            return shown
        if page.more or self.gap:
            self._synced, self.gap = False, True
            return shown
        self._synced = True
        self._replay_held(shown)
        return shown

    def unknown(self) -> None:
        """The owner does not know the turn yet: what was held can only be about other turns, unless our message was
        named since it was asked.
        """
        self.gap = self._held_lost
        self._synced = not self.gap
        self._held_lost = False
        if not self.named:
            self._held.clear()

    def _is_stale(self, page: WatchSnapshot) -> bool:
        """Whether it comes from an owner that does not know yet that it is one no more."""
        last = next((e for e in reversed(page.events) if e.turn_id == self._turn and not e.HasField("queued")), None)
        return last is not None and not page.more and last.dispatch < self._newest

    def _is_ours(self, event: LiveEvent) -> bool:
        """Whether an event of a page is of the turn we are in or of the one to go on with."""
        if event.turn_id == self._turn:
            return not self._turn_ended
        if self._turn and not self._turn_ended:
            return False  # it was asked for before live events brought us further
        if event.turn_id in self._given_up or event.turn_id in self._past:
            return False
        self.named = False
        self._begin(event.turn_id, event.turn_number)
        return True

    def _read(self, event: LiveEvent, shown: list[Watched]) -> None:
        """An event of a page: behind a step that was journaled comes a state with its size."""
        self._number = event.turn_number or self._number
        if event.HasField("ended"):
            self._read_end(event, shown)
            return
        if event.HasField("step_size") and event.step != self._step + 1:
            self.gap = event.step > self._step  # else it was asked for before live events brought us further
            return
        if event.HasField("step_size"):
            if not self._fits(event, shown):
                return
            self._enter(event.step)
        if event.step < self._step:
            if event.dispatch <= self._newest:
                return
            self._enter(event.step)  # the store lost steps
            self._announce(event, shown)
        elif event.step > self._step:
            self._enter(event.step)
        elif event.dispatch != self._dispatch and self._offset:
            self._take_back(event, shown)
        self._dispatch = event.dispatch
        self._newest = max(self._newest, event.dispatch)
        self._show(event, shown)

    def _read_end(self, event: LiveEvent, shown: list[Watched]) -> None:
        text = final_text(event)
        if event.step > self._step:
            self.gap = True
        elif event.step < self._step:
            if self._offset:
                self._take_back(event, shown)  # said, and never journaled
        elif event.HasField("step_size"):
            self._fits(event, shown)
        elif text is not None and self._offset <= len(text):
            self._rest_of_final(event, text, shown)
        if not self.gap:
            self._end(event, shown)

    def _fits(self, event: LiveEvent, shown: list[Watched]) -> bool:
        """Whether the step we are in was shown as it is journaled, whole; else it is read again from its beginning."""
        if self._offset > event.step_size:
            self._take_back(event, shown)
        self.gap = self._offset != event.step_size
        return not self.gap

    def _take_back(self, event: LiveEvent, shown: list[Watched]) -> None:
        self._enter(self._step)
        self._announce(event, shown)

    def _announce(self, event: LiveEvent, shown: list[Watched]) -> None:
        self._dispatch = event.dispatch
        notice = _of_turn(event)
        notice.step = notice.restarted.from_step = self._step
        self._give(notice, shown)

    def _find_place(self, page: WatchSnapshot, events: list[LiveEvent]) -> None:
        """Where a watch of the session begins: with the running turn, or behind the last one."""
        self._fresh = False
        first = next((event for event in events if event.turn_id), None)
        if first is not None:
            self._begin(first.turn_id, first.turn_number)
        elif page.HasField("idle_at"):
            idle = page.idle_at
            self._begin(idle.turn_id, page.idle_number)
            self._dispatch, self._step, self._offset = idle.dispatch, max(idle.step, 1), idle.offset
            self._turn_ended = True
            self._past.append(self._turn)

    def _replay_held(self, shown: list[Watched]) -> None:
        held, self._held = self._held, []
        lost, self._held_lost = self._held_lost, False
        shown.extend(self.live(held))
        if lost:
            self._synced, self.gap = False, True

    # ---- the place

    def _begin(self, turn_id: bytes, number: int = 0) -> None:
        """Goes to the beginning of a turn."""
        self._turn = turn_id
        self._number = number or self._number
        self._dispatch = self._newest = 0
        self._turn_ended = not turn_id and self._session
        self._inputs = 0
        self._enter(1)

    def _enter(self, step: int) -> None:
        """Goes to the beginning of a step."""
        self._step = step
        self._offset = 0
        self._text = 0
        self._state: TurnState.ValueType = TurnState.TURN_STATE_UNSPECIFIED

    def _is_beginning(self, event: LiveEvent) -> bool:
        """Whether nothing of its turn can lie before this event."""
        return (
            event.HasField("state")
            and event.dispatch == 1
            and event.step == 1
            and (bool(event.message_ids) or bool(event.turn_number))
        )

    def _show(self, event: LiveEvent, shown: list[Watched]) -> None:
        """Shows what is new in an event of the step we are in."""
        match event.WhichOneof("event"):
            case "state":
                # A step has one state, and a turn's messages only grow: anything else is old.
                if not self._state or len(event.message_ids) > self._inputs:
                    self._state = event.state
                    self._inputs = max(self._inputs, len(event.message_ids))
                    self._give(event, shown)
            case "text":
                self._show_text(event, shown)
            case "tool_call" | "tool_result" as kind:
                index = event.tool_call.index if kind == "tool_call" else event.tool_result.index
                end = event.next_offset or self._text + index + 1
                if end == self._offset + 1:
                    self._offset = end
                    self._give(event, shown)
                elif end > self._offset:
                    self._miss(event)

    def _show_text(self, event: LiveEvent, shown: list[Watched]) -> None:
        offset, text = event.text.offset, event.text.text
        if offset > self._offset:
            self._miss(event)
            return
        new = text[self._offset - offset :] if offset < self._offset else text
        if not new:
            return
        if len(new) < len(text):
            rest = _of_turn(event)
            rest.text.offset, rest.text.text = self._offset, new
            event = rest
        self._offset += len(new)
        self._text = self._offset
        self._give(event, shown)

    def _show_queue(self, event: LiveEvent, shown: list[Watched]) -> None:
        told = tuple(message.message_id for message in event.queued.messages), event.queued.count
        if self._session and told != self._queue:
            self._queue = told
            self._give(event, shown)

    def _end(self, event: LiveEvent, shown: list[Watched]) -> None:
        """The turn is over; the watch is, unless it goes on with another turn."""
        self._dispatch = self._newest = event.dispatch
        self._turn_ended = True
        self._give(event, shown)
        if self._session:
            self._number = event.turn_number or self._number
            self._past.append(self._turn)
        elif self._message_id and not is_answer(event, self._message_id):
            self._given_up.add(self._turn)
            self._begin(b"")
            self._synced, self.gap = False, True
        else:
            self.ended = True

    def _give(self, event: LiveEvent, shown: list[Watched]) -> None:
        shown.append(Watched(event, self.position))

    def _miss(self, event: LiveEvent) -> None:
        self._synced, self.gap = False, True
        self._hold(event)

    def _hold(self, event: LiveEvent) -> None:
        if len(self._held) >= MAX_HELD:
            self._held.clear()
            self._held_lost = True
        self._held.append(event)


def _order(event: LiveEvent) -> tuple[bool, int]:
    return event.HasField("ended"), event.step


def _of_turn(event: LiveEvent) -> LiveEvent:
    """An event of the same place without content."""
    return LiveEvent(
        agent=event.agent,
        session=event.session,
        turn_id=event.turn_id,
        dispatch=event.dispatch,
        step=event.step,
        turn_number=event.turn_number,
    )
