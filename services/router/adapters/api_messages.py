"""Rows and names as the API says them."""

from __future__ import annotations

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import Step, StepBody
from soma.router.v1 import session_service_pb2 as sessions
from soma.router.v1 import turn_service_pb2 as turns

from services.router.application.group import StoreLost
from services.router.application.read_sessions import SessionRow, StepRow, TurnRow
from soma_common import ids
from soma_common.errors import InvalidRequest, NotFound, ResourceExhausted, SomaError, Unavailable
from soma_common.ids import InvalidName, SessionName, TurnName


def unavailable(error: StoreLost) -> SomaError:
    """The store did not answer, or was not asked because too many reads of the tenant wait for it."""
    if isinstance(error.__cause__, ResourceExhausted):
        return error.__cause__
    return Unavailable(
        ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, "the database does not answer; retry", retry_delay_s=1.0
    )


def session_name(name: str) -> SessionName:
    """Reads a session's name. Raises InvalidRequest."""
    try:
        return SessionName.parse(name)
    except InvalidName as error:
        raise InvalidRequest(ErrorReason.ERROR_REASON_INVALID_REQUEST, str(error)) from error


def turn_name(name: str) -> TurnName:
    """Reads a turn's name. Raises InvalidRequest."""
    try:
        return TurnName.parse(name)
    except InvalidName as error:
        raise InvalidRequest(ErrorReason.ERROR_REASON_INVALID_REQUEST, str(error)) from error


def parent_of(parent: str) -> tuple[str, str | None, str | None]:
    """The tenant, agent and channel that a parent names. Raises InvalidRequest."""
    parts = parent.split("/")
    values = parts[1::2]
    if (
        len(parts) % 2
        or tuple(parts[::2]) != ("tenants", "agents", "channels")[: len(values)]
        or not all(ids.is_slug(value) for value in values)
    ):
        raise InvalidRequest(
            ErrorReason.ERROR_REASON_INVALID_REQUEST,
            f"parent {parent!r} is not tenants/{{t}}, optionally followed by /agents/{{a}} and /channels/{{c}}",
        )
    return values[0], values[1] if len(values) > 1 else None, values[2] if len(values) > 2 else None


def no_session(name: SessionName) -> NotFound:
    """Nobody has said anything in that session."""
    return NotFound(
        ErrorReason.ERROR_REASON_SESSION_NOT_FOUND,
        f"there is no session {name}; it exists once a message is stored in it",
    )


def session_of(row: SessionRow) -> sessions.Session:
    """A session."""
    name = SessionName(row.tenant, row.agent, row.channel, row.session)
    running = row.running_turn is not None
    session = sessions.Session(
        name=str(name),
        key=SessionKey(tenant=row.tenant, agent=row.agent, channel=row.channel, session=row.session),
        state=sessions.SESSION_STATE_BUSY if running else sessions.SESSION_STATE_IDLE,
        message_count=row.message_count,
        turn_count=row.turn_count + running,
        queued_count=row.queued_count,
        paused=row.paused,
        running_turn=str(TurnName(name, row.running_turn)) if row.running_turn is not None else "",
        undelivered_count=row.undelivered_count,
    )
    session.create_time.FromDatetime(row.create_time)
    session.update_time.FromDatetime(row.update_time)
    if row.oldest_queued_time is not None:
        session.oldest_queued_time.FromDatetime(row.oldest_queued_time)
    return session


def turn_of(row: TurnRow) -> turns.Turn:
    """A turn."""
    name = TurnName(SessionName(row.tenant, row.agent, row.channel, row.session), row.turn_id)
    turn = turns.Turn(
        name=str(name),
        number=row.number,
        status=row.status,  # type: ignore[arg-type]
        outcome=row.outcome,  # type: ignore[arg-type]
        dispatch=row.dispatch,
        step_count=row.step_count,
        message_ids=[message_id.hex() for message_id in row.message_ids],
        agent_revision=row.agent_revision,
        stopping=row.stopping,  # type: ignore[arg-type]
    )
    turn.create_time.FromDatetime(row.create_time)
    if row.end_time is not None:
        turn.end_time.FromDatetime(row.end_time)
    if row.last_body is not None:
        body = StepBody.FromString(row.last_body)
        if body.HasField("final"):
            turn.message.CopyFrom(body.final.message)
        elif body.HasField("failure"):
            turn.error.CopyFrom(body.failure)
    return turn


def step_of(row: StepRow) -> Step:
    """A journaled step."""
    step = Step(number=row.step, dispatch=row.dispatch, body=StepBody.FromString(row.body))
    step.create_time.FromDatetime(row.create_time)
    return step


def no_turn(name: TurnName) -> NotFound:
    """No message has come to that turn."""
    return NotFound(
        ErrorReason.ERROR_REASON_TURN_NOT_FOUND,
        f"there is no turn {name}; it exists once it begins",
    )
