"""The watches of the API: where a turn stands, then what happens."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
from nats.aio.client import Client
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.router.v1 import turn_service_pb2 as turns

from services.router.application.group import StoreLost
from services.router.application.read_sessions import SessionReader
from soma_common.errors import InvalidRequest, NotFound, Unavailable
from soma_common.ids import InvalidName, TurnName
from soma_common.layout import LaneLayout
from soma_common.live import LiveWatcher


class TurnWatches:
    """The watch of `TurnService`, for the class that serves the rest of it."""

    _reader: SessionReader
    _client: Client
    _layout: LaneLayout

    async def WatchTurn(
        self, request: turns.WatchTurnRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[turns.WatchTurnResponse]:
        """Streams what a turn does: first where it stands, then what happens, last its outcome."""
        name = await self._existing(request.name)
        watcher = LiveWatcher(self._client, name.session, partitions=self._layout.partitions, turn_id=name.turn_id)
        async with watcher as events:
            async for event in events:
                yield turns.WatchTurnResponse(event=event)

    async def _existing(self, turn: str) -> TurnName:
        """The turn of a resource name. Raises InvalidRequest, NotFound or Unavailable."""
        try:
            name = TurnName.parse(turn)
            row = await self._reader.turn(name.session.tenant, name.turn_id)
        except InvalidName as error:
            raise InvalidRequest(ErrorReason.ERROR_REASON_INVALID_REQUEST, str(error)) from error
        except StoreLost as error:
            text = "the database does not answer; retry"
            raise Unavailable(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, text, retry_delay_s=1.0) from error
        if row is None or row.session_id != name.session.id:
            raise NotFound(
                ErrorReason.ERROR_REASON_TURN_NOT_FOUND,
                f"there is no turn {name}; it exists once its message is stored",
            )
        return name
