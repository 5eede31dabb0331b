"""Puts sessions, lines and running turns back as the store has them: what a new owner of a partition begins with.

Everything that a former owner was about to do and had not stored is decided again here, from what is stored, by the
same rules: who joins a running turn, who stops it, who is refused, what is waited for and until when.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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


def restore_sessions(
    state: RouterState, runner: TurnRunner, partition: Partition, pending: Sequence[PendingRow]
) -> None:
    """Takes over what is pending in a partition, in order of position, and goes on with it."""
    now = monotonic()
    waiting: list[tuple[Session, QueuedMessage, bool]] = []
    for row in pending:
        session = _session(state, partition, row)
        if row.kind >= _FIRST_CONTROL:
            continue
        message = _message(row, now)
        if row.turn_id is None or not (row.first_position or 0) <= row.position <= (row.last_position or 0):
            waiting.append((session, message, row.came_later))
        elif session.turn is not None:
            session.turn.inputs.append(message)
            session.turn.deliver |= message.deliver
        else:
            session.turn = _turn(session, message, row, now)
    sessions = list(partition.sessions.values())
    for session in sessions:
        if session.turn is not None:
            runner.resume(session.turn)
    for session, message, came_later in waiting:
        runner.arrivals.restore(session, message, came_later)
    for row in pending:
        if row.kind >= _FIRST_CONTROL:
            runner.controls.apply(partition.sessions[row.session_id], row.kind, row.position, row.target_turn)
    for session in sessions:
        runner.arrivals.meet(session)
        runner.arrivals.ready(session)
    runner.assign()


def _session(state: RouterState, partition: Partition, row: PendingRow) -> Session:
    session = partition.sessions.get(row.session_id)
    if session is None:
        key = SessionKey(row.tenant, row.agent, row.channel, row.session)
        session = state.add_session(partition, row.session_id, key, row.turn_count, row.delivery_count)
        session.paused = row.paused
    return session


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


def _turn(session: Session, message: QueuedMessage, row: PendingRow, now: float) -> Turn:
    assert row.turn_id is not None, "the caller has looked"
    return Turn(
        id=row.turn_id,
        session=session,
        number=session.turn_count + 1,
        inputs=[message],
        revision=row.agent_revision or "",
        deliver=message.deliver,
        dispatch=row.dispatch or 1,
        strikes=row.strikes or 0,
        status=TurnStatus(row.status or TurnStatus.RUNNING),
        journal_loaded=False,
        # An older release stopped turns only by cancelling them.
        stop_as=Outcome(row.stop or Outcome.CANCELLED),
        stopped_at=now - (row.stop_age_ms or 0) / 1000,
    )
