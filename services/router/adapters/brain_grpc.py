"""The router's end of RunTurns: one stream to each brain, made again whenever it is lost.

The reader never waits for the writer. What gathers while a frame is being written goes out in the next. Heartbeats
travel inside the frames, because a transport's keepalive ends at a sidecar and does not see a frozen process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, cast

import grpc
import structlog
from soma.cognition.v1.cognition_service_pb2 import (
    AddInputs,
    Confirm,
    RouterHello,
    RunTurnsRequest,
    RunTurnsResponse,
    StartTurn,
    StopTurn,
)
from soma.cognition.v1.cognition_service_pb2_grpc import CognitionServiceStub

from soma_common.clock import monotonic
from soma_common.grpc.channel import open_channel
from soma_common.telemetry import spans
from soma_common.telemetry.metrics import gauge

if TYPE_CHECKING:
    from services.router.application.brains import BrainPool
    from services.router.application.run_turns import TurnRunner

PROTOCOL: Final = 1
_CONNECT_TIMEOUT_S: Final = 3.0
_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 1.0
_SILENT_INTERVALS: Final = 4
_FRAME_BYTES: Final = 1024 * 1024
"""A frame is closed when it holds so much; a single turn may make it larger (6 MB: its context, inputs and journal)."""

log = structlog.get_logger(__name__)

BRAINS = gauge("soma_router_brains", "Brains this router has a stream to.")

_Call = grpc.aio.StreamStreamCall[RunTurnsRequest, RunTurnsResponse]


class GrpcBrainLink:
    """A stream that is up."""

    def __init__(self, call: _Call, brain: str, credit: int, may_speak: Callable[[], bool]) -> None:
        self.brain = brain
        self.credit = credit
        self._call = call
        self._may_speak = may_speak
        self._frame = RunTurnsRequest()
        self._wake = asyncio.Event()

    def start(self, start: StartTurn) -> None:
        """Runs a turn there."""
        if spans.watched:
            spans.stage("router.callbacks", (start.turn_id,))
        self._frame.starts.append(start)
        self._wake.set()

    def confirm(self, turn_id: bytes, dispatch: int, step: int) -> None:
        """Says that a step is journaled."""
        self._frame.confirms.append(Confirm(turn_id=turn_id, dispatch=dispatch, step=step))
        self._wake.set()

    def stop(self, turn_id: bytes, dispatch: int) -> None:
        """Stops a turn there."""
        self._frame.stops.append(StopTurn(turn_id=turn_id, dispatch=dispatch))
        self._wake.set()

    def add_inputs(self, turn_id: bytes, dispatch: int, first: int, inputs: list[bytes]) -> None:
        """Gives a turn there further inputs."""
        self._frame.add_inputs.append(AddInputs(turn_id=turn_id, dispatch=dispatch, first=first, inputs=inputs))
        self._wake.set()

    async def write(self, heartbeat_s: float) -> None:
        """Writes frames until the stream ends; at least one per heartbeat interval."""
        while True:
            try:
                async with asyncio.timeout(heartbeat_s):
                    await self._wake.wait()
            except TimeoutError:
                self._frame.heartbeat = True
            self._wake.clear()
            frame, self._frame = self._frame, RunTurnsRequest()
            if not self._may_speak():
                # The lease may be somebody else's by now: nothing of what was decided before may be confirmed or
                # started. A brain that is not confirmed must not wait for it for ever, a final above all: its turn is
                # over here, nobody would stop it later.
                frame.stops.extend(StopTurn(turn_id=c.turn_id, dispatch=c.dispatch) for c in frame.confirms)
                frame.ClearField("starts")
                frame.ClearField("confirms")
                frame.ClearField("add_inputs")
            for part in _parts(frame):
                if spans.watched:
                    spans.stage("router.frame", (start.turn_id for start in part.starts))
                await self._call.write(part)


def _parts(frame: RunTurnsRequest) -> Iterator[RunTurnsRequest]:
    """A frame in pieces that the transport takes: many turns may start at once, each with megabytes to read. A turn's
    further inputs stay behind its start."""
    items: list[StartTurn | AddInputs] = [*frame.starts, *frame.add_inputs]
    if len(items) < 2 or frame.ByteSize() <= _FRAME_BYTES:
        yield frame
        return
    frame.ClearField("starts")
    frame.ClearField("add_inputs")
    yield frame
    stopped = {stop.turn_id: stop.dispatch for stop in frame.stops}
    part, size = RunTurnsRequest(), 0
    for item in items:
        if stopped.get(item.turn_id, 0) >= item.dispatch:
            continue  # in one frame the stop would have kept it from running
        more = item.ByteSize()
        if size and size + more > _FRAME_BYTES:
            yield part
            part, size = RunTurnsRequest(), 0
        if isinstance(item, StartTurn):
            part.starts.append(item)
        else:
            part.add_inputs.append(item)
        size += more
    if size:
        yield part


class _Silence:
    """Cancels a call of which nothing was heard for too long. One timer for the stream, not one per frame."""

    def __init__(self, call: _Call, brain: str, limit_s: float) -> None:
        self._call = call
        self._brain = brain
        self._limit_s = limit_s
        self._heard_at = monotonic()
        self._timer = asyncio.get_running_loop().call_later(limit_s / 8, self._check)

    def heard(self) -> None:
        """A frame has come."""
        self._heard_at = monotonic()

    def stop(self) -> None:
        """Nobody listens any more."""
        self._timer.cancel()

    def _check(self) -> None:
        silent_s = monotonic() - self._heard_at
        if silent_s > self._limit_s:
            log.warning("router.brain_silent", brain=self._brain, for_s=round(silent_s, 3))
            self._call.cancel()
            return
        self._timer = asyncio.get_running_loop().call_later(self._limit_s / 8, self._check)


class BrainConnector:
    """Keeps a stream to one address."""

    def __init__(
        self,
        target: str,
        token: Callable[[], str],
        router: str,
        brains: BrainPool,
        runner: TurnRunner,
        may_speak: Callable[[], bool],
    ) -> None:
        self._target = target
        self._token = token
        self._router = router
        self._brains = brains
        self._runner = runner
        self._may_speak = may_speak

    async def run(self) -> None:
        """Connects, serves the stream, connects again; until cancelled."""
        wait_s = _FIRST_WAIT_S
        while True:
            channel = open_channel(self._target, token=self._token, service="cognition")
            began = monotonic()
            try:
                await self._serve(CognitionServiceStub(channel))
            except (grpc.aio.AioRpcError, TimeoutError, ConnectionError) as error:
                log.info("router.brain_unreachable", target=self._target, error=_brief(error))
            finally:
                await channel.close()
            wait_s = _FIRST_WAIT_S if monotonic() - began > _LONGEST_WAIT_S else min(wait_s * 2, _LONGEST_WAIT_S)
            await asyncio.sleep(wait_s)

    async def _serve(self, stub: CognitionServiceStub) -> None:
        # Without an iterator of requests the call is written to; the types know only the other way.
        call = cast(_Call, stub.RunTurns())  # type: ignore[call-arg]
        link: GrpcBrainLink | None = None
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await call.write(RunTurnsRequest(hello=RouterHello(router=self._router, protocol=PROTOCOL)))
                first = await call.read()
            if not isinstance(first, RunTurnsResponse) or not first.HasField("welcome"):
                raise ConnectionError("the brain did not welcome this router")
            welcome = first.welcome
            heartbeat_s = welcome.heartbeat_ms / 1000
            link = GrpcBrainLink(call, welcome.brain, welcome.credit, self._may_speak)
            writer = asyncio.create_task(link.write(heartbeat_s), name=f"brain writer {welcome.brain}")
            self._brains.add(link)
            BRAINS.inc()
            log.info("router.brain_connected", brain=welcome.brain, credit=welcome.credit, target=self._target)
            self._runner.assign()
            await self._read(call, link, heartbeat_s * _SILENT_INTERVALS, writer)
        finally:
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            if link is not None:
                BRAINS.dec()
                log.warning("router.brain_lost", brain=link.brain)
                self._runner.on_link_down(link)

    async def _read(self, call: _Call, link: GrpcBrainLink, silent_s: float, writer: asyncio.Task[None]) -> None:
        silence = _Silence(call, link.brain, silent_s)
        try:
            while not writer.done():
                frame = await call.read()
                if not isinstance(frame, RunTurnsResponse):
                    return
                silence.heard()
                self._take(link, frame)
        except asyncio.CancelledError:
            # Cancelled by the silence check, the call ends this coroutine too; an outside cancel goes on.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        finally:
            silence.stop()

    def _take(self, link: GrpcBrainLink, frame: RunTurnsResponse) -> None:
        if frame.proposals:
            if spans.watched:
                spans.stage("router.brain", (proposal.turn_id for proposal in frame.proposals))
            self._runner.on_proposals(link, frame.proposals)
        if frame.texts:
            self._runner.on_texts(link, frame.texts)
        if frame.declined:
            self._runner.on_declined(link, frame.declined)
        if frame.draining:
            self._brains.remove(link)
        if frame.credit:
            link.credit += frame.credit
            self._runner.assign()


def _brief(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
