"""A watch that breaks: from where it is begun again, what is shown then, and when it is given up."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome, TextDelta, WatchPosition
from soma.router.v1.turn_service_pb2 import WatchTurnRequest, WatchTurnResponse
from soma.router.v1.turn_service_pb2_grpc import TurnServiceStub

from soma_common.errors import (
    STATUS_DETAILS_KEY,
    FailedPrecondition,
    ResourceExhausted,
    SomaError,
    Unavailable,
    to_status,
)
from soma_common.grpc.channel import open_channel
from somastack.watch import followed, until

if TYPE_CHECKING:
    from soma.router.v1.turn_service_pb2_grpc import TurnServiceAsyncStub

    Context = grpc.aio.ServicerContext[WatchTurnRequest, WatchTurnResponse]

TEXT = "abcdef"
UNAVAILABLE = Unavailable(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, "not now")
TOO_SLOW = ResourceExhausted(ErrorReason.ERROR_REASON_QUEUE_FULL, "read faster")
UNKNOWN = FailedPrecondition(ErrorReason.ERROR_REASON_WATCH_POSITION_UNKNOWN, "too old")


class Turns:
    """Streams TEXT, a character an event, from the position asked for; each watch is cut as `cuts` says.

    A cut is how many events come before, and the refusal; None: the stream just ends.
    """

    def __init__(self, *cuts: tuple[int, SomaError | None]) -> None:
        self.asked: list[int | None] = []
        """The offsets to go on from."""
        self._cuts = list(cuts)

    async def watch(self, request: WatchTurnRequest, context: "Context") -> AsyncIterator[WatchTurnResponse]:
        """Serve WatchTurn."""
        begin = request.resume_from.offset if request.HasField("resume_from") else None
        self.asked.append(begin)
        count, refusal = self._cuts.pop(0) if self._cuts else (len(TEXT), None)
        for offset in range(begin or 0, len(TEXT))[:count]:
            event = LiveEvent(dispatch=1, step=1, text=TextDelta(offset=offset, text=TEXT[offset]))
            yield WatchTurnResponse(event=event, position=WatchPosition(dispatch=1, step=1, offset=offset + 1))
        if refusal is not None:
            status = to_status(refusal)
            context.set_trailing_metadata(((STATUS_DETAILS_KEY, status.SerializeToString()),))
            code = next(code for code in grpc.StatusCode if code.value[0] == refusal.code)
            await context.abort(code, refusal.message)
        if not self._cuts and count == len(TEXT):
            yield WatchTurnResponse(event=LiveEvent(ended=Delivery(outcome=Outcome.OUTCOME_FINAL)))


@asynccontextmanager
async def serving(turns: Turns) -> AsyncIterator["TurnServiceAsyncStub"]:
    """`turns` behind a real socket."""
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(
        turns.watch, WatchTurnRequest.FromString, WatchTurnResponse.SerializeToString
    )
    methods = grpc.method_handlers_generic_handler("soma.router.v1.TurnService", {"WatchTurn": handler})
    server.add_generic_rpc_handlers((methods,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", token=None, service="router", wait_for_ready=True) as channel:
            yield TurnServiceStub(channel)
    finally:
        await server.stop(None)


async def seen(turns: Turns, patience_s: float = 10.0) -> str:
    """What a watch shows, to the turn's end."""
    shown: list[str] = []

    def show(told: WatchTurnResponse) -> bool:
        shown.append(told.event.text.text)
        return told.event.WhichOneof("event") == "ended"

    async with serving(turns) as service:
        watch = followed(lambda at: service.WatchTurn(WatchTurnRequest(name="t", resume_from=at)), patience_s)
        await until(watch, show)
    return "".join(shown)


async def test_a_watch_that_is_cut_goes_on_behind_its_last_event() -> None:
    turns = Turns((2, UNAVAILABLE), (0, UNAVAILABLE), (3, None), (1, TOO_SLOW))
    assert await seen(turns) == TEXT
    assert turns.asked == [None, 2, 2, 5, 6]


async def test_a_refusal_that_no_retry_helps_ends_the_watch() -> None:
    turns = Turns((2, UNKNOWN))
    with pytest.raises(FailedPrecondition) as refused:
        await seen(turns)
    assert refused.value.reason == ErrorReason.ERROR_REASON_WATCH_POSITION_UNKNOWN
    assert turns.asked == [None]


async def test_a_stack_that_does_not_come_back_is_waited_for_no_longer() -> None:
    turns = Turns((1, UNAVAILABLE), *[(0, UNAVAILABLE)] * 50)
    with pytest.raises(Unavailable):
        await seen(turns, patience_s=1.2)
    assert turns.asked[:3] == [None, 1, 1]
    assert len(turns.asked) < 10
