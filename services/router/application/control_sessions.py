"""Controls of sessions: cancel, interrupt, pause and resume reach their session in the order in which they and its
messages were accepted.

A control is done with when what it says is stored; a cancel of a message that waits, when that message has ended in its
turn of the queue. Until then it is pending like a message, and a new owner of the partition applies it again: every
control may be applied twice.

What is done with is stored as a position, so no control is done with before those ahead of it. One that has nothing of
its own to wait for, behind one that waits, is therefore kept as a part of that: memory holds no more of them than there
are cancelled messages, however many are sent. The mailbox counts each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from soma.router.v1.inbound_pb2 import InboundKind

from services.router.application.items import ControlItem
from services.router.application.stop_turns import Stopper
from services.router.domain.session import PendingControl, QueuedMessage, Session, Turn
from services.router.domain.turn import Outcome
from soma_common import ids

if TYPE_CHECKING:
    from services.router.application.commit_group import GroupCommitter
    from services.router.application.state import RouterState

_PAUSES: Final[dict[int, bool]] = {InboundKind.INBOUND_KIND_PAUSE: True, InboundKind.INBOUND_KIND_RESUME: False}


class SessionControls:
    """Applies controls. `ready` has a session looked at: its next turn may start, or its first message end, now."""

    def __init__(self, state: RouterState, stopper: Stopper, ready: Callable[[Session], None]) -> None:
        self._state = state
        self._stopper = stopper
        self._ready = ready
        self.committer: GroupCommitter

    def apply(
        self, session: Session, kind: int, position: int, target: bytes | None, *, came_later: bool = True
    ) -> None:
        """A control of `kind` (soma.router.v1.InboundKind) reaches the session; `target` is the turn it names.
        `came_later`: after the turn that runs had begun. One that came before and is applied again was for another if
        it names none: that is over.
        """
        control = PendingControl(position)
        self._state.busy(session)
        if kind in _PAUSES:
            session.paused = _PAUSES[kind]
            self._settle(session, control, paused=session.paused)
            self._ready(session)
        elif kind == InboundKind.INBOUND_KIND_INTERRUPT:
            stopped = None
            if target is not None or came_later:
                stopped = self._stop(session, position, target, Outcome.INTERRUPTED)
            self._settle(session, control, stopped)
        elif kind == InboundKind.INBOUND_KIND_CANCEL_ALL:
            self._cancel_rolled_back(control, session)
            self._cancel_queued(control, session, all_of_them=True)
            self._settle(session, control, self._stop(session, position, None, Outcome.CANCELLED))
            self._ready(session)
        else:
            stopped = None
            if target is not None or came_later:
                stopped = self._stop(session, position, target, Outcome.CANCELLED)
            if stopped is None:
                self._cancel_queued(control, session, target=target)
            self._settle(session, control, stopped)
            self._ready(session)

    def message_ended(self, session: Session, message: QueuedMessage) -> ControlItem | None:
        """A waiting message that was cancelled comes to its end: what stores that the cancel is done with, to be
        written in the same transaction. Before it the cancel could be lost, after it be applied to another message.
        """
        control = message.cancelled_by
        if control is None or control.waits_for is not message:
            return None
        control.waits_for = None
        done: list[int] = []
        count = 0
        while session.controls and session.controls[0].waits_for is None:
            control = session.controls.popleft()
            done.append(control.position)
            if control.last_position:
                done.append(control.last_position)
            count += control.count
        if not done:
            return None
        self._state.mailbox.controls_taken(session, count)
        return self._item(session, done)

    def _stop(self, session: Session, position: int, target: bytes | None, outcome: Outcome) -> Turn | None:
        """Stops the turn that runs, if the control came after the message that it answers."""
        turn = session.turn
        if turn is None or turn.inputs[0].position > position or target not in (None, turn.id):
            return None
        self._stopper.stop(turn, outcome)
        return turn

    def _cancel_queued(
        self, control: PendingControl, session: Session, *, target: bytes | None = None, all_of_them: bool = False
    ) -> None:
        """Cancels waiting messages: all that came before the control, or the one whose turn it names, or the next if
        it names none and nothing runs. They end without a turn when it comes to them, in their order.
        """
        for message in session.queue:
            if message.position > control.position:
                return
            if all_of_them:
                self._cancel(control, message)
                continue
            if target is None:
                meant = session.turn is None and not message.cancelled
            else:
                # Kept: it costs more than all the rest, and the next control would ask every message again.
                message.turn_id = message.turn_id or ids.turn_id(session.id, message.message_id)
                meant = message.turn_id == target
            if meant:
                self._cancel(control, message)
                return

    def _cancel_rolled_back(self, control: PendingControl, session: Session) -> None:
        """Cancels what waits again once the end of a turn is stored that was rolled back: it came before the control,
        too.
        """
        turn = session.turn
        if turn is not None and turn.ending and turn.stop_as is Outcome.ABSORBED:
            for message in turn.inputs:
                self._cancel(control, message)

    def _cancel(self, control: PendingControl, message: QueuedMessage) -> None:
        """Cancels a message that waits. If a control did so before, it is that one that waits for the end."""
        message.cancelled = True
        if message.cancelled_by is None:
            message.cancelled_by = control
            control.waits_for = message

    def _settle(
        self, session: Session, control: PendingControl, stopped: Turn | None = None, paused: bool | None = None
    ) -> None:
        """Has a control that was applied stored as done with, or wait; what it stopped or paused is stored at once."""
        done = [] if self._waits(session, control) else [control.position]
        if done or stopped is not None or paused is not None:
            self.committer.put(self._item(session, done, stopped, paused))

    def _waits(self, session: Session, control: PendingControl) -> bool:
        """Puts a control in the session's line if it is not done with; returns whether it is there."""
        if control.waits_for is not None:
            session.controls.append(control)
        elif session.controls:
            last = session.controls[-1]
            last.last_position = control.position
            last.count += 1
            # The floor stays below it: the position of the one that it is a part of is pending.
            session.partition.pending.discard(control.position)
        else:
            return False
        self._state.mailbox.control_added(session)
        return True

    def _item(
        self, session: Session, done: list[int], stopped: Turn | None = None, paused: bool | None = None
    ) -> ControlItem:
        """Notes durably how far the session's controls are done with, which turn is to converge, and a pause."""
        outcome = stopped.stop_as if stopped is not None else Outcome.CANCELLED
        key = session.key
        session.storing += 1
        return ControlItem(
            session.partition, session.id, key.tenant, done, self._stored, turn=stopped, stop_as=outcome, paused=paused
        )

    def _stored(self, item: ControlItem) -> None:
        for position in item.positions:
            item.partition.pending.discard(position)
        if item.turn is not None:
            self._stopper.stored(item.turn)
        session = item.partition.sessions.get(item.session_id)
        if session is None:
            return
        session.storing -= 1
        if session.idle:
            self._state.idle(session)
        else:
            self._ready(session)
