"""The controls of the API: each is stored in the session's lane and answered once its effect is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar
from uuid import uuid4

import grpc
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Message, Role
from soma.router.v1 import session_service_pb2 as sessions
from soma.router.v1 import turn_service_pb2 as turns
from soma.router.v1.inbound_pb2 import InboundKind

from services.router.adapters.api_messages import (
    no_session,
    no_turn,
    session_name,
    session_of,
    turn_name,
    turn_of,
    unavailable,
)
from services.router.adapters.control_lane import ControlLane
from services.router.application.group import StoreLost
from services.router.application.read_sessions import SessionReader, SessionRow, TurnRow
from services.router.domain.turn import Outcome, TurnStatus
from soma_common import ids
from soma_common.clock import monotonic
from soma_common.errors import FailedPrecondition, ResourceExhausted, Unavailable
from soma_common.ids import SessionName, TurnName

_WAIT_S: Final = 5.0
_POLL_S: Final = 0.05
RESUMABLE: Final = frozenset({Outcome.ERROR, Outcome.CANCELLED, Outcome.INTERRUPTED})
GO_ON: Final = "Go on where you were stopped."
"""What a resumed turn is asked."""
RESUMES: Final = "resumes"
"""Metadata key of the message that resumes a turn; its value is the stopped turn's id."""

_Row = TypeVar("_Row")
_Context = grpc.aio.ServicerContext[object, object]


class TurnControls:
    """The controls of `TurnService`, for the class that serves the rest of it."""

    _reader: SessionReader
    _lane: ControlLane

    async def CancelTurn(self, request: turns.CancelTurnRequest, context: _Context) -> turns.CancelTurnResponse:
        """Stops a turn; answers once it converges or has ended."""
        row = await self._stop(request.name, request.request_id, InboundKind.INBOUND_KIND_CANCEL)
        return turns.CancelTurnResponse(turn=turn_of(row))

    async def InterruptTurn(
        self, request: turns.InterruptTurnRequest, context: _Context
    ) -> turns.InterruptTurnResponse:
        """Stops a turn and keeps its work; answers once it converges or has ended."""
        row = await self._stop(request.name, request.request_id, InboundKind.INBOUND_KIND_INTERRUPT)
        return turns.InterruptTurnResponse(turn=turn_of(row))

    async def ResumeTurn(self, request: turns.ResumeTurnRequest, context: _Context) -> turns.ResumeTurnResponse:
        """Asks the agent to go on where a turn was stopped: a message of the session like any other."""
        name = turn_name(request.name)
        row = await self._turn(name)
        if row.status != TurnStatus.ENDED or row.outcome not in RESUMABLE:
            state = "runs" if row.status != TurnStatus.ENDED else f"ended with {Outcome(row.outcome).name}"
            raise FailedPrecondition(
                ErrorReason.ERROR_REASON_TURN_NOT_RESUMABLE,
                f"the turn {state}; only one that was interrupted, was cancelled or failed can be resumed",
                {"turn": str(name)},
            )
        message = Message(role=Role.ROLE_USER, metadata={RESUMES: name.turn_id.hex()})
        message.parts.add(text=GO_ON)
        key = f"resume/{name.turn_id.hex()}/{request.request_id or uuid4().hex}"
        message_id = await self._lane.message(name.session, key, message.SerializeToString(deterministic=True))
        turn_id = ids.turn_id(name.session.id, message_id)
        return turns.ResumeTurnResponse(message_id=message_id.hex(), turn_name=str(TurnName(name.session, turn_id)))

    async def _stop(self, turn: str, request_id: str, kind: InboundKind.ValueType) -> TurnRow:
        name = turn_name(turn)
        row = await self._find(name)
        is_interrupt = kind == InboundKind.INBOUND_KIND_INTERRUPT
        if row is None:
            if is_interrupt or not await self._waits(name):
                raise no_turn(name)
        elif row.status == TurnStatus.ENDED or (row.status == TurnStatus.CONVERGING and is_interrupt):
            return row
        await self._lane.control(name.session, kind, request_id or uuid4().hex, name.turn_id)
        stopped = await _applied(lambda: self._find(name), _is_stopped)
        assert stopped is not None, "it was looked for until it was there"
        return stopped

    async def _turn(self, name: TurnName) -> TurnRow:
        row = await self._find(name)
        if row is None:
            raise no_turn(name)
        return row

    async def _find(self, name: TurnName) -> TurnRow | None:
        try:
            row = await self._reader.turn(name.session.tenant, name.turn_id)
        except StoreLost as error:
            raise unavailable(error) from error
        return row if row is not None and row.session_id == name.session.id else None

    async def _waits(self, name: TurnName) -> bool:
        try:
            return await self._reader.waits(name.session.tenant, name.session.id, name.turn_id)
        except StoreLost as error:
            raise unavailable(error) from error


class SessionControls:
    """The controls of `SessionService`, for the class that serves the rest of it."""

    _reader: SessionReader
    _lane: ControlLane

    async def PauseSession(
        self, request: sessions.PauseSessionRequest, context: _Context
    ) -> sessions.PauseSessionResponse:
        """Starts no turn from here on."""
        row = await self._pause(request.name, request.request_id, paused=True)
        return sessions.PauseSessionResponse(session=session_of(row))

    async def ResumeSession(
        self, request: sessions.ResumeSessionRequest, context: _Context
    ) -> sessions.ResumeSessionResponse:
        """Starts turns again."""
        row = await self._pause(request.name, request.request_id, paused=False)
        return sessions.ResumeSessionResponse(session=session_of(row))

    async def InterruptSession(
        self, request: sessions.InterruptSessionRequest, context: _Context
    ) -> sessions.InterruptSessionResponse:
        """Stops whatever runs and keeps its work."""
        row = await self._control(request.name, request.request_id, InboundKind.INBOUND_KIND_INTERRUPT)
        return sessions.InterruptSessionResponse(session=session_of(row))

    async def CancelSession(
        self, request: sessions.CancelSessionRequest, context: _Context
    ) -> sessions.CancelSessionResponse:
        """Stops whatever runs, and ends whatever waits."""
        row = await self._control(request.name, request.request_id, InboundKind.INBOUND_KIND_CANCEL_ALL)
        return sessions.CancelSessionResponse(session=session_of(row))

    async def _pause(self, session: str, request_id: str, *, paused: bool) -> SessionRow:
        """Also where it is so already: a control that was accepted before may be about to change it."""
        name = session_name(session)
        await self._session(name)
        kind = InboundKind.INBOUND_KIND_PAUSE if paused else InboundKind.INBOUND_KIND_RESUME
        control = await self._lane.control(name, kind, request_id or uuid4().hex)

        async def stored() -> bool:
            # Behind a cancel that is not done with it holds before it is done with itself.
            done = await self._done(name, control)
            return bool(done) or (done is not None and (await self._session(name)).paused == paused)

        await _applied(stored, bool)
        return await _applied(lambda: self._session(name), bool)

    async def _control(self, session: str, request_id: str, kind: InboundKind.ValueType) -> SessionRow:
        name = session_name(session)
        await self._session(name)
        control = await self._lane.control(name, kind, request_id or uuid4().hex)
        await _applied(lambda: self._done(name, control), lambda done: done is not None)
        return await _applied(lambda: self._session(name), bool)

    async def _done(self, name: SessionName, control: bytes) -> bool | None:
        try:
            return await self._reader.control_done(name.tenant, control)
        except StoreLost as error:
            raise unavailable(error) from error

    async def _session(self, name: SessionName) -> SessionRow:
        try:
            row = await self._reader.session(name.tenant, name.id)
        except StoreLost as error:
            raise unavailable(error) from error
        if row is None:
            raise no_session(name)
        return row


def _is_stopped(row: TurnRow | None) -> bool:
    return row is not None and row.status != TurnStatus.RUNNING


async def _applied(look: Callable[[], Awaitable[_Row]], is_applied: Callable[[_Row], bool]) -> _Row:
    """Looks until a stored control shows. Raises Unavailable when that takes too long: it will still be applied."""
    deadline = monotonic() + _WAIT_S
    while True:
        with suppress(ResourceExhausted):  # Too many reads of the tenant; to say so would say that nothing was stored.
            row = await look()
            if is_applied(row):
                return row
        if monotonic() > deadline:
            raise Unavailable(
                ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
                "the request is stored and not applied yet; look again, or retry with the same request_id",
                retry_delay_s=1.0,
            )
        await asyncio.sleep(_POLL_S)
