"""Puts sessions, lines and running turns back as the store has them: what a new owner of a partition begins with.

Everything that a former owner was about to do and had not stored is decided again here, from what is stored, by the
same rules: who joins a running turn, who stops it, who is refused, what is waited for and until when.

There may be very much of it, so nothing here takes long: what is read is taken in page by page before the partition is
anybody's, and then put back session by session, each as a whole, with breaks between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from services.router.domain.session import QueuedMessage, Session, SessionKey, Turn
from services.router.domain.turn import Outcome, TurnStatus
from soma_common.clock import monotonic

if TYPE_CHECKING:
    from services.router.application.ports import PendingRow
    from services.router.application.run_turns import TurnRunner
    from services.router.application.state import RouterState
    from services.router.domain.partition import Partition

_FIRST_CONTROL = 2
"""Inbound kinds from here on are controls (soma.router.v1.InboundKind)."""
SLICE: Final = 500
"""So many messages and controls are put back without a break, or one session: some milliseconds."""


class _SessionFound:
    """What is pending in one session, in order of position."""

    __slots__ = ("controls", "inputs", "row", "turn_row", "waiting")

    def __init__(self, row: PendingRow) -> None:
        self.row = row
        """Any of its rows: all of them name the session."""
        self.turn_row: PendingRow | None = None
        """The first input of the turn that runs."""
        self.inputs: list[QueuedMessage] = []
        self.waiting: list[tuple[QueuedMessage, bool]] = []
        """Each with whether it came after the running turn had begun."""
        self.controls: list[PendingRow] = []

    def __len__(self) -> int:
        return len(self.inputs) + len(self.waiting) + len(self.controls)


class Found:
    """What is pending in a partition, as far as it was read. It is nobody's yet: to give it up is to forget it."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.read_at = 0.0
        """When the first of it was read, by the monotonic clock: ages count from there."""
        self._sessions: dict[bytes, _SessionFound] = {}

    def add(self, rows: Sequence[PendingRow]) -> None:
        """Takes the next rows, in order of position."""
        self.read_at = self.read_at or monotonic()
        for row in rows:
            self.positions.append(row.position)
            session = self._sessions.get(row.session_id)
            if session is None:
                session = self._sessions[row.session_id] = _SessionFound(row)
            if row.kind >= _FIRST_CONTROL:
                session.controls.append(row)
                continue
            message = _message(row, self.read_at)
            if row.turn_id is None or not (row.first_position or 0) <= row.position <= (row.last_position or 0):
                session.waiting.append((message, row.came_later))
                continue
            session.turn_row = session.turn_row or row
            session.inputs.append(message)

    def taken(self) -> Iterator[_SessionFound]:
        """Each session once, those first whose turn runs: they have their places before another turn starts."""
        idle = [id_ for id_, session in self._sessions.items() if session.turn_row is None]
        running = [id_ for id_, session in self._sessions.items() if session.turn_row is not None]
        for ids in (running, idle):
            for id_ in ids:
                yield self._sessions.pop(id_)


def restore_sessions(state: RouterState, runner: TurnRunner, partition: Partition, found: Found) -> Iterator[None]:
    """Takes over what was found pending in a partition and goes on with it. Where it yields, others may be let do
    something; it ends there if the partition is lost. A session is there with all that is its own, or not at all.
    """
    unbroken = 0
    for session in found.taken():
        if unbroken >= SLICE:
            yield
            unbroken = 0
            if partition.lost:
                return
        _restore(state, runner, partition, session, found.read_at)
        unbroken += len(session)
    runner.assign()


def _restore(
    state: RouterState, runner: TurnRunner, partition: Partition, found: _SessionFound, read_at: float
) -> None:
    row = found.row
    key = SessionKey(row.tenant, row.agent, row.channel, row.session)
    session = state.add_session(partition, row.session_id, key, row.turn_count, row.delivery_count)
    session.paused = row.paused
    if found.turn_row is not None:
        session.turn = _turn(session, found.inputs, found.turn_row, read_at)
        runner.resume(session.turn)
    for message, came_later in found.waiting:
        runner.arrivals.restore(session, message, came_later)
    for control in found.controls:
        runner.controls.apply(
            session, control.kind, control.position, control.target_turn, came_later=control.came_later
        )
    runner.arrivals.meet(session)
    runner.arrivals.ready(session)


def _message(row: PendingRow, now: float) -> QueuedMessage:
    return QueuedMessage(
        row.position,
        row.message_id,
        row.deliver,
        row.fault,
        row.traceparent,
        None,
        size=row.size,
        policy=row.policy,
        debounce_s=row.debounce_ms / 1000,
        debounce_max_s=row.debounce_max_ms / 1000,
        ingested_at=now - row.age_ms / 1000,
        rolled_back=row.rolled_back,
    )


def _turn(session: Session, inputs: list[QueuedMessage], row: PendingRow, now: float) -> Turn:
    assert row.turn_id is not None, "the row of an input names its turn"
    return Turn(
        id=row.turn_id,
        session=session,
        number=session.turn_count + 1,
        inputs=inputs,
        revision=row.agent_revision or "",
        deliver=any(message.deliver for message in inputs),
        dispatch=row.dispatch or 1,
        strikes=row.strikes or 0,
        status=TurnStatus(row.status or TurnStatus.RUNNING),
        journal_loaded=False,
        # An older release stopped turns only by cancelling them.
        stop_as=Outcome(row.stop or Outcome.CANCELLED),
        stopped_at=now - (row.stop_age_ms or 0) / 1000,
    )
