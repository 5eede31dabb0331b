"""Watching turns and sessions from outside, without a gap over lost streams.

    async for event, position in watch_session(stub, "tenants/demo/agents/assistant/channels/line/sessions/room-7"):
        show(event)
        remember(position)

`stub` is a ChannelServiceStub of a gateway, or of several behind one address. A stream that breaks, a slow reader that
is sent away and an expired token lead to another stream behind the last event, and a gateway that is not there is
waited for, without end; the log says so. Whoever keeps the position beyond the life of the process hands it in as
`resume_from`. Every event comes once, in order; text that a given-up try had said is taken back by `restarted`: drop
what was shown of `from_step` and later steps of that turn.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog
from soma.common.v1.turn_pb2 import WatchPosition
from soma.gateway.v1.channel_service_pb2 import WatchSessionRequest, WatchTurnRequest

from soma_common.errors import (
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    from_rpc_error,
)
from soma_common.live_merge import Watched

if TYPE_CHECKING:
    from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceAsyncStub

FIRST_BACKOFF_S: Final = 0.05
LONGEST_BACKOFF_S: Final = 2.0

_PASSING: Final = (Unavailable, ResourceExhausted, DeadlineExceeded, Internal)

_log = structlog.get_logger(__name__)


async def watch_turn(
    stub: ChannelServiceAsyncStub, name: str, resume_from: WatchPosition | None = None
) -> AsyncIterator[Watched]:
    """The events of a turn by its resource name, with the positions behind them, up to its end.

    Raises SomaError that trying again does not change: TURN_NOT_FOUND, WATCH_POSITION_UNKNOWN, PERMISSION_DENIED.
    """

    if resume_from is not None and resume_from.ended:
        return

    def opened(after: WatchPosition | None) -> Any:
        return stub.WatchTurn(WatchTurnRequest(name=name, resume_from=after))

    async for watched in _kept(opened, resume_from):
        yield watched
        if watched.event.HasField("ended"):
            return


async def watch_session(
    stub: ChannelServiceAsyncStub, name: str, resume_from: WatchPosition | None = None
) -> AsyncIterator[Watched]:
    """The events of a session's turns by the session's resource name, with the positions behind them, without end.

    Raises SomaError that trying again does not change: WATCH_POSITION_UNKNOWN, PERMISSION_DENIED.
    """

    def opened(after: WatchPosition | None) -> Any:
        return stub.WatchSession(WatchSessionRequest(name=name, resume_from=after))

    async for watched in _kept(opened, resume_from):
        yield watched


async def _kept(
    opened: Callable[[WatchPosition | None], Any], position: WatchPosition | None
) -> AsyncIterator[Watched]:
    backoff_s = FIRST_BACKOFF_S
    told = False
    while True:
        heard = False
        trouble = "the stream was ended before its first event"
        call = opened(position)
        try:
            async for response in call:
                heard, told, backoff_s = True, False, FIRST_BACKOFF_S
                position = response.position
                yield Watched(response.event, response.position)
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed)
            renewable = heard and isinstance(error, Unauthenticated)
            if not (renewable or isinstance(error, _PASSING)):
                raise error from failed
            trouble = str(error)
        finally:
            call.cancel()
        if not heard:
            if not told:
                told = True
                _log.warning(
                    "watch.no_stream",
                    error=trouble,
                    check="the address, and that a gateway runs there; it is tried again until one does",
                )
            await asyncio.sleep(random.uniform(0.5, 1.0) * backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
