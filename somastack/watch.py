"""Watching turns and sessions from a terminal: a watch that is lost goes on behind the last event it brought."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final, Literal, Protocol, TypeVar

import grpc
from rich.console import Console
from rich.text import Text
from soma.common.v1.turn_pb2 import LiveEvent, QueueState, WatchPosition

from soma_common.errors import ResourceExhausted, Unavailable, from_rpc_error
from somastack.tables import lasting
from somastack.turn_view import TurnView

PATIENCE_S: Final = 30.0
"""How long a watch is begun again that the stack does not serve."""
RETRY_EVERY_S: Final = 0.5


class Watched(Protocol):
    """What a watch brings: WatchTurnResponse or WatchSessionResponse."""

    @property
    def event(self) -> LiveEvent: ...

    @property
    def position(self) -> WatchPosition: ...

    def HasField(self, field_name: Literal["position"]) -> bool: ...  # noqa: N802 - protobuf's name


W = TypeVar("W", bound=Watched)


async def followed(
    begin: Callable[[WatchPosition | None], "grpc.aio.UnaryStreamCall[Any, W]"], patience_s: float = PATIENCE_S
) -> AsyncGenerator[W, None]:
    """What the watch brings that `begin` starts, as often as that takes; the caller leaves when it has seen enough.

    Raises:
        SomaError: refused, or not served for `patience_s`.
    """
    position: WatchPosition | None = None
    served_at = time.monotonic()
    while True:
        call = begin(position)
        try:
            async for told in call:
                yield told
                position = told.position if told.HasField("position") else position
                served_at = time.monotonic()
        except grpc.aio.AioRpcError as error:
            refusal = from_rpc_error(error)
            again = isinstance(refusal, (Unavailable, ResourceExhausted))
            if not again or time.monotonic() > served_at + patience_s:
                raise refusal from error
        finally:
            call.cancel()
        await asyncio.sleep(RETRY_EVERY_S)


async def until(events: AsyncGenerator[W, None], done: Callable[[W], bool]) -> None:
    """Hand every event to `done` until it says that this was the last."""
    async with aclosing(events) as told:
        async for event in told:
            if done(event):
                return


class SessionView:
    """The turns of a session on a terminal, one after the other, with what waits between them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._turn_id = b""
        self._view = TurnView(console)

    def show(self, event: LiveEvent) -> None:
        """Show what happened."""
        if event.WhichOneof("event") == "queued":
            self._console.print(Text(_waiting(event.queued), style="dim"))
            return
        if event.turn_id != self._turn_id:
            self._turn_id, self._view = event.turn_id, TurnView(self._console, event.agent)
            number = f" {event.turn_number}" if event.turn_number else ""
            self._console.print(Text(f"turn{number}  {event.turn_id.hex()}", style="dim"))
        if event.WhichOneof("event") == "ended":
            self._view.finish(event.ended)
        else:
            self._view.show(event)


def _waiting(queue: QueueState) -> str:
    if not queue.count:
        return "nothing waits"
    shown = ", ".join(f"{message.message_id.hex()} for {lasting(message.age_ms)}" for message in queue.messages[:3])
    more = f" and {queue.count - 3} more" if queue.count > 3 else ""
    return f"{queue.count} waiting: {shown}{more}"
