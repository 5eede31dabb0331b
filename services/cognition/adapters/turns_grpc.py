"""The RunTurns stream over gRPC: frames in, frames out.

    router's frames -> _read -> RouterSession.take ... turns ... -> Gather -> RunTurns yields -> router

Reading and writing are two tasks that never wait for each other: what is to be sent gathers while a frame is written
and goes out in the next one. So a router that does not read cannot keep its own confirmations from being read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Final, Protocol, TypeAlias

import structlog
from grpc import aio
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.cognition.v1 import cognition_service_pb2_grpc as cognition_grpc
from soma.common.v1 import error_reason_pb2 as reasons

from services.cognition.application.ports import Outgoing
from services.cognition.application.serve_routers import PROTOCOL, SILENT_INTERVALS, Brain, RouterSession
from soma_common.errors import DeadlineExceeded, FailedPrecondition, SomaError
from soma_common.gather import Gather, GatherClosed
from soma_common.telemetry import spans

Context: TypeAlias = "aio.ServicerContext[cognition.RunTurnsRequest, cognition.RunTurnsResponse]"

FRAME_BYTES: Final = 1024 * 1024
"""A frame is closed when it holds so much; one item alone may be larger (bounded by the largest gRPC message)."""

FRAME_ITEMS: Final = 512

_LINGER_S: Final = 0.002
_LINGER_TURNS: Final = 16
_LINGER_BELOW: Final = 0.25
"""With so many turns of a router running, a frame that would speak of less than this part of them waits for company: a
frame, and the group commit that it may cause, costs far more than an item. Text never waits, nor do few turns."""

_ITEMS_PER_CREDIT: Final = 4
_SPARE_ITEMS: Final = 4096

_log = structlog.get_logger(__name__)


class CognitionService(cognition_grpc.CognitionServiceServicer):
    """Serves `soma.cognition.v1.CognitionService`. `heartbeat_s` is the interval in seconds that the welcome
    announces."""

    def __init__(self, brain: Brain, heartbeat_s: float) -> None:
        self._brain = brain
        self._heartbeat_s = heartbeat_s

    async def RunTurns(
        self,
        request_iterator: AsyncIterator[cognition.RunTurnsRequest],
        context: Context,
    ) -> AsyncIterator[cognition.RunTurnsResponse]:
        """One router's stream, until either side ends it; its turns end with it."""
        frames = aiter(request_iterator)
        first = await self._first(frames)
        outbox: Gather[Outgoing] = Gather(self._brain.max_turns * _ITEMS_PER_CREDIT + _SPARE_ITEMS)
        session = self._brain.connect(first.hello.router, first.hello.protocol, outbox)
        # A generator that is suspended in a write when its call dies is never resumed: its `finally` alone would be
        # late.
        context.add_done_callback(lambda _: session.close(None))  # type: ignore[arg-type]  # the stub wants a class
        tasks = [
            asyncio.create_task(_read(frames, first, session), name=f"read {session.router}"),
            asyncio.create_task(self._beat(session), name=f"heartbeat {session.router}"),
        ]
        try:
            yield self._welcome(session)
            while True:
                for frame in frames_of(await gathered(outbox, session)):
                    if spans.watched:
                        spans.stage("cognition.frame", (proposal.turn_id for proposal in frame.proposals))
                    yield frame
        except GatherClosed:
            if session.failure is not None:
                raise session.failure from None
        finally:
            session.close(None)
            for task in tasks:
                task.cancel()

    async def _first(self, frames: AsyncIterator[cognition.RunTurnsRequest]) -> cognition.RunTurnsRequest:
        """The frame that holds hello. Raises PROTOCOL_ORDER for another, DEADLINE_EXCEEDED if none comes."""
        allowed_s = SILENT_INTERVALS * self._heartbeat_s
        try:
            async with asyncio.timeout(allowed_s):
                first = await anext(frames, None)
        except TimeoutError:
            raise DeadlineExceeded(
                reasons.ERROR_REASON_DEADLINE_EXCEEDED, f"no hello came within {allowed_s:g} s of opening RunTurns"
            ) from None
        if first is None or not first.HasField("hello"):
            raise FailedPrecondition(
                reasons.ERROR_REASON_PROTOCOL_ORDER, "the first frame of RunTurns must hold hello: say who connects"
            )
        return first

    def _welcome(self, session: RouterSession) -> cognition.RunTurnsResponse:
        return cognition.RunTurnsResponse(
            welcome=cognition.BrainWelcome(
                brain=self._brain.name,
                protocol=PROTOCOL,
                credit=session.granted,
                heartbeat_ms=round(self._heartbeat_s * 1000),
            )
        )

    async def _beat(self, session: RouterSession) -> None:
        while not session.closed.is_set():
            await asyncio.sleep(self._heartbeat_s)
            session.tick()


async def _read(
    frames: AsyncIterator[cognition.RunTurnsRequest], first: cognition.RunTurnsRequest, session: RouterSession
) -> None:
    """Takes frames until the router ends the stream, breaks its order or vanishes; then the stream is over."""
    try:
        first.ClearField("hello")
        session.take(first)
        async for frame in frames:
            session.take(frame)
        session.close(None)
    except SomaError as error:
        session.close(error)
    except Exception:  # noqa: BLE001 - boundary: however reading ends, the stream must not go on without a reader
        _log.warning("router.stream_broken", router=session.router, exc_info=True)
        session.close(None)


class _Load(Protocol):
    """How many turns a router runs here."""

    @property
    def running(self) -> int: ...


async def gathered(outbox: Gather[Outgoing], load: _Load) -> list[Outgoing]:
    """What goes out next: all there is, with a little patience for more under load. Raises GatherClosed at the end."""
    items = await outbox.take(FRAME_ITEMS)
    if (
        load.running >= _LINGER_TURNS
        and len(items) < load.running * _LINGER_BELOW
        and not any(type(item) is cognition.TurnText for item in items)
    ):
        await asyncio.sleep(_LINGER_S)
        items += outbox.take_now(FRAME_ITEMS)
    return items


def frames_of(items: list[Outgoing]) -> Iterator[cognition.RunTurnsResponse]:
    """Puts gathered items into as few frames as their size allows, keeping the order of each kind."""
    frame = cognition.RunTurnsResponse()
    proposals: list[cognition.Proposal] = []
    texts: list[cognition.TurnText] = []
    size = 0
    for item in items:
        # To extend a field by many is half as dear as to append them one by one.
        if isinstance(item, cognition.Proposal):
            proposals.append(item)
            size += item.ByteSize()
        elif isinstance(item, cognition.TurnText):
            texts.append(item)
            size += item.ByteSize()
        elif isinstance(item, cognition.StopTurn):
            frame.declined.append(item)
        else:
            frame.MergeFrom(item)
        if size > FRAME_BYTES:
            yield _filled(frame, proposals, texts)
            frame, size = cognition.RunTurnsResponse(), 0
            proposals.clear()
            texts.clear()
    yield _filled(frame, proposals, texts)


def _filled(
    frame: cognition.RunTurnsResponse, proposals: list[cognition.Proposal], texts: list[cognition.TurnText]
) -> cognition.RunTurnsResponse:
    frame.proposals.extend(proposals)
    frame.texts.extend(texts)
    return frame
