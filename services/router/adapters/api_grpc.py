"""SessionService and TurnService: reads of what was committed; controls and watches are next door."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

import grpc
from google.protobuf.message import DecodeError
from soma.router.v1 import session_service_pb2 as sessions
from soma.router.v1 import turn_service_pb2 as turns
from soma.router.v1.session_service_pb2_grpc import SessionServiceServicer
from soma.router.v1.turn_service_pb2_grpc import TurnServiceServicer

from services.router.adapters.api_messages import (
    no_session,
    parent_of,
    session_name,
    session_of,
    step_of,
    turn_name,
    turn_of,
    unavailable,
)
from services.router.adapters.control_grpc import SessionControls, TurnControls
from services.router.adapters.control_lane import ControlLane
from services.router.adapters.watch_grpc import SessionWatches, TurnWatches
from services.router.application.group import StoreLost
from services.router.application.read_sessions import SessionReader
from soma_common.ids import TurnName
from soma_common.live import LiveHub
from soma_common.paging import Page


class SessionApi(SessionControls, SessionWatches, SessionServiceServicer):
    """Reads sessions and their messages; controlling and watching them is next door."""

    def __init__(self, reader: SessionReader, lane: ControlLane, hub: LiveHub) -> None:
        self._reader = reader
        self._lane = lane
        self._hub = hub

    async def GetSession(
        self, request: sessions.GetSessionRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> sessions.GetSessionResponse:
        """Returns one session."""
        name = session_name(request.name)
        try:
            row = await self._reader.session(name.tenant, name.id)
        except StoreLost as error:
            raise unavailable(error) from error
        if row is None:
            raise no_session(name)
        return sessions.GetSessionResponse(session=session_of(row))

    async def ListSessions(
        self, request: sessions.ListSessionsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> sessions.ListSessionsResponse:
        """Lists sessions of a tenant, agent or channel by name."""
        tenant, agent, channel = parent_of(request.parent)
        page = Page.asked(("sessions", request.parent, str(request.state)), request.page_size, request.page_token)
        after = tuple(page.after.split("/")) if page.after else ("", "", "")
        busy = None if not request.state else request.state == sessions.SESSION_STATE_BUSY
        try:
            rows = await self._reader.sessions(tenant, agent, channel, busy, after, page.size + 1)  # type: ignore[arg-type]
        except StoreLost as error:
            raise unavailable(error) from error
        answer = sessions.ListSessionsResponse(sessions=[session_of(row) for row in rows[: page.size]])
        if len(rows) > page.size:
            last = rows[page.size - 1]
            answer.next_page_token = page.next_token(f"{last.agent}/{last.channel}/{last.session}")
        return answer

    async def ListMessages(
        self, request: sessions.ListMessagesRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> sessions.ListMessagesResponse:
        """Lists the messages of a session in the order accepted."""
        name = session_name(request.parent)
        page = Page.asked(("messages", request.parent), request.page_size, request.page_token)
        try:
            if await self._reader.session(name.tenant, name.id) is None:
                raise no_session(name)
            rows = await self._reader.messages(name.tenant, name.id, int(page.after or 0), page.size + 1)
        except StoreLost as error:
            raise unavailable(error) from error
        answer = sessions.ListMessagesResponse()
        for row in rows[: page.size]:
            item = answer.messages.add(
                message_id=row.message_id.hex(),
                policy=row.policy,
                outcome=row.outcome or 0,
                queue_position=row.queue_position,
                queue_age_ms=row.age_ms if row.queue_position else 0,
            )
            with suppress(DecodeError):  # what cannot be read is stored all the same, and its turn has said so
                item.message.ParseFromString(row.content)
            item.accept_time.FromDatetime(datetime.fromtimestamp(row.accept_ms / 1000, UTC))
            if row.turn_id is not None:
                item.turn = str(TurnName(name, row.turn_id))
        if len(rows) > page.size:
            answer.next_page_token = page.next_token(str(rows[page.size - 1].position))
        return answer


class TurnApi(TurnControls, TurnWatches, TurnServiceServicer):
    """Reads turns; watching and stopping them is next door."""

    def __init__(self, reader: SessionReader, lane: ControlLane, hub: LiveHub) -> None:
        self._reader = reader
        self._lane = lane
        self._hub = hub

    async def GetTurn(
        self, request: turns.GetTurnRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> turns.GetTurnResponse:
        """Returns one turn."""
        return turns.GetTurnResponse(turn=turn_of(await self._turn(turn_name(request.name))))

    async def ListTurns(
        self, request: turns.ListTurnsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> turns.ListTurnsResponse:
        """Lists turns of a session in order, or of a tenant newest first."""
        page = Page.asked(("turns", request.parent, str(request.status)), request.page_size, request.page_token)
        status = request.status or None
        try:
            if "/" in request.parent.removeprefix("tenants/"):
                name = session_name(request.parent)
                rows = await self._reader.session_turns(
                    name.tenant, name.id, status, int(page.after or 0), page.size + 1
                )
                place = str(rows[page.size - 1].number) if len(rows) > page.size else ""
            else:
                tenant = parent_of(request.parent)[0]
                before = None
                if page.after:
                    when, turn_hex = page.after.split("/")
                    before = (datetime.fromisoformat(when), bytes.fromhex(turn_hex))
                rows = await self._reader.tenant_turns(tenant, status, before, page.size + 1)
                last = rows[page.size - 1] if len(rows) > page.size else None
                place = f"{last.create_time.isoformat()}/{last.turn_id.hex()}" if last else ""
        except StoreLost as error:
            raise unavailable(error) from error
        answer = turns.ListTurnsResponse(turns=[turn_of(row) for row in rows[: page.size]])
        if place:
            answer.next_page_token = page.next_token(place)
        return answer

    async def ListSteps(
        self, request: turns.ListStepsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> turns.ListStepsResponse:
        """Lists the journaled steps of a turn in order."""
        name = turn_name(request.parent)
        page = Page.asked(("steps", request.parent), request.page_size, request.page_token)
        await self._turn(name)
        try:
            rows = await self._reader.steps(name.session.tenant, name.turn_id, int(page.after or 0), page.size + 1)
        except StoreLost as error:
            raise unavailable(error) from error
        answer = turns.ListStepsResponse(steps=[step_of(row) for row in rows[: page.size]])
        if len(rows) > page.size:
            answer.next_page_token = page.next_token(str(rows[page.size - 1].step))
        return answer
