"""The watches of ChannelService: names into ids, events with their positions out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import WatchPosition
from soma.gateway.v1.channel_service_pb2 import (
    WatchSessionRequest,
    WatchSessionResponse,
    WatchTurnRequest,
    WatchTurnResponse,
)

from soma_common.errors import InvalidRequest
from soma_common.grpc.token_life import token_seconds_left
from soma_common.ids import InvalidName, SessionName, TurnName
from soma_common.live import LiveHub, Subject

Context = grpc.aio.ServicerContext[Any, Any]


class Watches:
    """The watches, for the class that serves the rest of the service."""

    def __init__(self, hub: LiveHub) -> None:
        self._hub = hub

    async def WatchTurn(self, request: WatchTurnRequest, context: Context) -> AsyncIterator[WatchTurnResponse]:
        """Streams what a turn does."""
        try:
            name = TurnName.parse(request.name)
        except InvalidName as error:
            raise InvalidRequest(ErrorReason.ERROR_REASON_INVALID_REQUEST, str(error)) from error
        after = _resumed(request)
        if after is not None and after.turn_id != name.turn_id:
            raise InvalidRequest(ErrorReason.ERROR_REASON_INVALID_REQUEST, "resume_from is a position of another turn")
        subject = Subject(name.session, turn_id=name.turn_id)
        async with self._hub.watch(subject, after=after, lifetime_s=token_seconds_left()) as events:
            async for event, position in events:
                yield WatchTurnResponse(event=event, position=position)

    async def WatchSession(self, request: WatchSessionRequest, context: Context) -> AsyncIterator[WatchSessionResponse]:
        """Streams what the turns of a session do."""
        try:
            name = SessionName.parse(request.name)
        except InvalidName as error:
            raise InvalidRequest(ErrorReason.ERROR_REASON_INVALID_REQUEST, str(error)) from error
        lifetime_s = token_seconds_left()
        async with self._hub.watch(Subject(name), after=_resumed(request), lifetime_s=lifetime_s) as events:
            async for event, position in events:
                yield WatchSessionResponse(event=event, position=position)


def _resumed(request: WatchTurnRequest | WatchSessionRequest) -> WatchPosition | None:
    return request.resume_from if request.HasField("resume_from") else None
