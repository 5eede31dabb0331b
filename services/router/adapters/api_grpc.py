"""SessionService and TurnService: reads of what was committed, cancels through the lane, watches through the owner."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final
from uuid import uuid4

import grpc
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.errors import APIError
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import Step, StepBody
from soma.router.v1 import session_service_pb2 as sessions
from soma.router.v1 import turn_service_pb2 as turns
from soma.router.v1.inbound_pb2 import InBatch, Inbound, InboundKind
from soma.router.v1.session_service_pb2_grpc import SessionServiceServicer
from soma.router.v1.turn_service_pb2_grpc import TurnServiceServicer

from services.router.adapters.watch_grpc import TurnWatches
from services.router.application.group import StoreLost
from services.router.application.read_sessions import SessionReader, SessionRow, StepRow, TurnRow
from services.router.domain.turn import TurnStatus as Status
from soma_common import ids
from soma_common.clock import monotonic, now_ms
from soma_common.errors import InvalidRequest, NotFound, Unavailable
from soma_common.ids import InvalidName, SessionName, TurnName
from soma_common.layout import BATCH_FORMAT, LaneLayout
from soma_common.nats import subjects
from soma_common.paging import Page

_CANCEL_WAIT_S: Final = 5.0
_CANCEL_POLL_S: Final = 0.05


def _unavailable(error: StoreLost) -> Unavailable:
    del error
    return Unavailable(
        ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, "the database does not answer; retry", retry_delay_s=1.0
    )


def _session_name(name: str) -> SessionName:
    try:
        return SessionName.parse(name)
    except InvalidName as error:
        raise InvalidRequest(ErrorReason.ERROR_REASON_INVALID_REQUEST, str(error)) from error


def _turn_name(name: str) -> TurnName:
    try:
        return TurnName.parse(name)
    except InvalidName as error:
        raise InvalidRequest(ErrorReason.ERROR_REASON_INVALID_REQUEST, str(error)) from error


class SessionApi(SessionServiceServicer):
    """Reads sessions and their messages."""

    def __init__(self, reader: SessionReader) -> None:
        self._reader = reader

    async def GetSession(
        self, request: sessions.GetSessionRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> sessions.GetSessionResponse:
        """Returns one session."""
        name = _session_name(request.name)
        try:
            row = await self._reader.session(name.tenant, name.id)
        except StoreLost as error:
            raise _unavailable(error) from error
        if row is None:
            raise _no_session(name)
        return sessions.GetSessionResponse(session=_session(row))

    async def ListSessions(
        self, request: sessions.ListSessionsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> sessions.ListSessionsResponse:
        """Lists sessions of a tenant, agent or channel by name."""
        tenant, agent, channel = _parent(request.parent)
        page = Page.asked(("sessions", request.parent, str(request.state)), request.page_size, request.page_token)
        after = tuple(page.after.split("/")) if page.after else ("", "", "")
        busy = None if not request.state else request.state == sessions.SESSION_STATE_BUSY
        try:
            rows = await self._reader.sessions(tenant, agent, channel, busy, after, page.size + 1)  # type: ignore[arg-type]
        except StoreLost as error:
            raise _unavailable(error) from error
        answer = sessions.ListSessionsResponse(sessions=[_session(row) for row in rows[: page.size]])
        if len(rows) > page.size:
            last = rows[page.size - 1]
            answer.next_page_token = page.next_token(f"{last.agent}/{last.channel}/{last.session}")
        return answer

    async def ListMessages(
        self, request: sessions.ListMessagesRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> sessions.ListMessagesResponse:
        """Lists the messages of a session in the order accepted."""
        name = _session_name(request.parent)
        page = Page.asked(("messages", request.parent), request.page_size, request.page_token)
        try:
            if await self._reader.session(name.tenant, name.id) is None:
                raise _no_session(name)
            rows = await self._reader.messages(name.tenant, name.id, int(page.after or 0), page.size + 1)
        except StoreLost as error:
            raise _unavailable(error) from error
        answer = sessions.ListMessagesResponse()
        for row in rows[: page.size]:
            item = answer.messages.add(message_id=row.message_id.hex())
            with suppress(DecodeError):  # what cannot be read is stored all the same, and its turn has said so
                item.message.ParseFromString(row.content)
            item.accept_time.FromDatetime(datetime.fromtimestamp(row.accept_ms / 1000, UTC))
            if row.turn_id is not None:
                item.turn = str(TurnName(name, row.turn_id))
        if len(rows) > page.size:
            answer.next_page_token = page.next_token(str(rows[page.size - 1].position))
        return answer


class TurnApi(TurnWatches, TurnServiceServicer):
    """Reads and stops turns; watching them is next door."""

    def __init__(self, reader: SessionReader, client: Client, js: JetStreamContext, layout: LaneLayout) -> None:
        self._reader = reader
        self._client = client
        self._js = js
        self._layout = layout

    async def GetTurn(
        self, request: turns.GetTurnRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> turns.GetTurnResponse:
        """Returns one turn."""
        return turns.GetTurnResponse(turn=_turn(await self._find(_turn_name(request.name))))

    async def ListTurns(
        self, request: turns.ListTurnsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> turns.ListTurnsResponse:
        """Lists turns of a session in order, or of a tenant newest first."""
        page = Page.asked(("turns", request.parent, str(request.status)), request.page_size, request.page_token)
        status = request.status or None
        try:
            if "/" in request.parent.removeprefix("tenants/"):
                name = _session_name(request.parent)
                rows = await self._reader.session_turns(
                    name.tenant, name.id, status, int(page.after or 0), page.size + 1
                )
                place = str(rows[page.size - 1].number) if len(rows) > page.size else ""
            else:
                tenant = _parent(request.parent)[0]
                before = None
                if page.after:
                    when, turn_hex = page.after.split("/")
                    before = (datetime.fromisoformat(when), bytes.fromhex(turn_hex))
                rows = await self._reader.tenant_turns(tenant, status, before, page.size + 1)
                last = rows[page.size - 1] if len(rows) > page.size else None
                place = f"{last.create_time.isoformat()}/{last.turn_id.hex()}" if last else ""
        except StoreLost as error:
            raise _unavailable(error) from error
        answer = turns.ListTurnsResponse(turns=[_turn(row) for row in rows[: page.size]])
        if place:
            answer.next_page_token = page.next_token(place)
        return answer

    async def ListSteps(
        self, request: turns.ListStepsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> turns.ListStepsResponse:
        """Lists the journaled steps of a turn in order."""
        name = _turn_name(request.parent)
        page = Page.asked(("steps", request.parent), request.page_size, request.page_token)
        await self._find(name)
        try:
            rows = await self._reader.steps(name.session.tenant, name.turn_id, int(page.after or 0), page.size + 1)
        except StoreLost as error:
            raise _unavailable(error) from error
        answer = turns.ListStepsResponse(steps=[_step(row) for row in rows[: page.size]])
        if len(rows) > page.size:
            answer.next_page_token = page.next_token(str(rows[page.size - 1].step))
        return answer

    async def CancelTurn(
        self, request: turns.CancelTurnRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> turns.CancelTurnResponse:
        """Stores a cancel behind the messages accepted before it, and answers once the turn converges or has ended."""
        name = _turn_name(request.name)
        row = await self._find(name)
        if row.status == Status.ENDED:
            return turns.CancelTurnResponse(turn=_turn(row))
        await self._publish_cancel(name, request.request_id or uuid4().hex)
        deadline = monotonic() + _CANCEL_WAIT_S
        while row.status == Status.RUNNING:
            if monotonic() > deadline:
                raise Unavailable(
                    ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
                    "the cancel is stored and not applied yet; ask for the turn, or retry with the same request_id",
                    retry_delay_s=1.0,
                )
            await asyncio.sleep(_CANCEL_POLL_S)
            row = await self._find(name)
        return turns.CancelTurnResponse(turn=_turn(row))

    async def _publish_cancel(self, name: TurnName, request_id: str) -> None:
        session = name.session
        session_id = session.id
        key = f"cancel/{request_id}"
        item = Inbound(
            session_id=session_id,
            message_id=ids.message_id(session.tenant, session.agent, session.channel, session.session, key),
            content_hash=ids.content_hash(name.turn_id),
            accept_time_ms=now_ms(),
            agent=session.agent,
            channel=session.channel,
            session=session.session,
            kind=InboundKind.INBOUND_KIND_CANCEL,
            cancel_turn_id=name.turn_id,
        )
        lane = ids.lane_of(ids.partition_of(session_id, self._layout.partitions), self._layout.lanes)
        batch = InBatch(format=BATCH_FORMAT, tenant=session.tenant, items=[item])
        try:
            await self._js.publish(
                subjects.inbound(session.tenant, lane),
                batch.SerializeToString(),
                timeout=2.0,
                headers={"Nats-Msg-Id": uuid4().hex},
            )
        except (NatsError, APIError, TimeoutError) as error:
            raise Unavailable(
                ErrorReason.ERROR_REASON_BUS_UNAVAILABLE,
                "it is not known whether the cancel was stored: retry with the same request_id",
                retry_delay_s=1.0,
            ) from error

    async def _find(self, name: TurnName) -> TurnRow:
        try:
            row = await self._reader.turn(name.session.tenant, name.turn_id)
        except StoreLost as error:
            raise _unavailable(error) from error
        if row is None or row.session_id != name.session.id:
            raise NotFound(
                ErrorReason.ERROR_REASON_TURN_NOT_FOUND,
                f"there is no turn {name}; it exists once its message is stored",
            )
        return row


def _parent(parent: str) -> tuple[str, str | None, str | None]:
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


def _no_session(name: SessionName) -> NotFound:
    return NotFound(
        ErrorReason.ERROR_REASON_SESSION_NOT_FOUND,
        f"there is no session {name}; it exists once a message is stored in it",
    )


def _session(row: SessionRow) -> sessions.Session:
    name = SessionName(row.tenant, row.agent, row.channel, row.session)
    running = row.running_turn is not None
    session = sessions.Session(
        name=str(name),
        key=SessionKey(tenant=row.tenant, agent=row.agent, channel=row.channel, session=row.session),
        state=sessions.SESSION_STATE_BUSY if running else sessions.SESSION_STATE_IDLE,
        message_count=row.message_count,
        turn_count=row.turn_count + running,
        queued_count=max(0, row.pending_count - running),
        running_turn=str(TurnName(name, row.running_turn)) if row.running_turn is not None else "",
        undelivered_count=row.undelivered_count,
    )
    session.create_time.FromDatetime(row.create_time)
    session.update_time.FromDatetime(row.update_time)
    return session


def _turn(row: TurnRow) -> turns.Turn:
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


def _step(row: StepRow) -> Step:
    step = Step(number=row.step, dispatch=row.dispatch, body=StepBody.FromString(row.body))
    step.create_time.FromDatetime(row.create_time)
    return step
