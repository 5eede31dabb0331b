"""Controls of sessions: cancel, interrupt, pause and resume reach their session in the order in which they and its
messages were accepted.

A control is done with when what it says is stored; a cancel of a message that waits, when that message has ended in its
turn of the queue. Until then it is pending like a message, and a new owner of the partition applies it again: every
control may be applied twice.
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

    def apply(self, session: Session, kind: int, position: int, target: bytes | None) -> None:
        """A control of `kind` (soma.router.v1.InboundKind) reaches the session; `target` is the turn it names."""
        control = PendingControl(position)
        session.controls.append(control)
        self._state.busy(session)
        if kind in _PAUSES:
            session.paused = _PAUSES[kind]
            self._settle(session, paused=session.paused)
            self._ready(session)
        elif kind == InboundKind.INBOUND_KIND_INTERRUPT:
            self._settle(session, self._stop(session, position, target, Outcome.INTERRUPTED))
        elif kind == InboundKind.INBOUND_KIND_CANCEL_ALL:
            self._cancel_rolled_back(control, session)
            self._cancel_queued(control, session, all_of_them=True)
            self._settle(session, self._stop(session, position, None, Outcome.CANCELLED))
            self._ready(session)
        else:
            stopped = self._stop(session, position, target, Outcome.CANCELLED)
            if stopped is None:
                self._cancel_queued(control, session, target=target)
            self._settle(session, stopped)
            self._ready(session)

    def message_ended(self, session: Session, message: QueuedMessage) -> ControlItem | None:
        """A waiting message that was cancelled comes to its end: what stores that the cancel is done with, to be
        written in the same transaction. Before it the cancel could be lost, after it be applied to another message.
        """
        for control in session.controls:
            if control.waits_for is message:
                control.waits_for = None
        return self._settled(session)

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
                message.cancelled = True
                control.waits_for = message
                continue
            if target is None:
                meant = session.turn is None and not message.cancelled
            else:
                meant = ids.turn_id(session.id, message.message_id) == target
            if meant:
                message.cancelled = True
                control.waits_for = message
                return

    def _cancel_rolled_back(self, control: PendingControl, session: Session) -> None:
        """Cancels what waits again once the end of a turn is stored that was rolled back: it came before the control,
        too.
        """
        turn = session.turn
        if turn is not None and turn.ending and turn.stop_as is Outcome.ABSORBED:
            for message in turn.inputs:
                message.cancelled = True
            control.waits_for = turn.inputs[-1]

    def _settle(self, session: Session, stopped: Turn | None = None, paused: bool | None = None) -> None:
        item = self._settled(session, stopped, paused)
        if item is not None:
            self.committer.put(item)

    def _settled(self, session: Session, stopped: Turn | None = None, paused: bool | None = None) -> ControlItem | None:
        """Notes durably how far the session's controls are done with, which turn is to converge, and a pause; None if
        there is nothing to note.
        """
        done: list[int] = []
        while session.controls and session.controls[0].waits_for is None:
            done.append(session.controls.popleft().position)
        if not done and stopped is None and paused is None:
            return None
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
