"""The router's end of RunTurns: one stream to each brain, made again whenever it is lost.

The reader never waits for the writer. What gathers while a frame is being written goes out in the next. Heartbeats
travel inside the frames, because a transport's keepalive ends at a sidecar and does not see a frozen process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc
import structlog
from soma.cognition.v1.cognition_service_pb2 import (
    DESCRIPTOR,
    AddInputs,
    RouterHello,
    RunTurnsRequest,
    RunTurnsResponse,
    StartTurn,
    StopTurn,
)

from soma_common.clock import monotonic
from soma_common.grpc.stream_call import StreamCall
from soma_common.grpc.stream_channel import StreamingChannel, open_stream_channel
from soma_common.telemetry import spans
from soma_common.telemetry.metrics import gauge

if TYPE_CHECKING:
    from services.router.application.brains import BrainPool
    from services.router.application.run_turns import TurnRunner

PROTOCOL: Final = 1
_METHOD: Final = f"/{DESCRIPTOR.services_by_name['CognitionService'].full_name}/RunTurns"
_CONNECT_TIMEOUT_S: Final = 3.0
_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 1.0
_SILENT_INTERVALS: Final = 4
_END_LINGER_S: Final = 0.005
_FRAME_BYTES: Final = 1024 * 1024
"""A frame is closed when it holds so much; a single turn may make it larger (6 MB: its context, inputs and journal)."""

log = structlog.get_logger(__name__)

BRAINS = gauge("soma_router_brains", "Brains this router has a stream to.")

_STARTS, _ADD_INPUTS = (
    bytes([RunTurnsRequest.DESCRIPTOR.fields_by_name[name].number << 3 | 2]) for name in ("starts", "add_inputs")
)
"""What stands before each item of these fields on the wire: the field's number, and that a length follows."""

_Item = tuple[bytes, int, bytes]
"""Turn, dispatch, and the field of the frame that is about them."""

_Call: TypeAlias = "StreamCall | grpc.aio.StreamStreamCall[bytes, RunTurnsResponse]"


class GrpcBrainLink:
    """A stream that is up.

    Turns are serialized when they are handed in and put behind each other as they go: fields of a message that stand
    one after the other are the message. Kept in one message they would be copied into it, counted and then serialized.
    """

    def __init__(self, call: _Call, brain: str, credit: int, may_speak: Callable[[], bool]) -> None:
        self.brain = brain
        self.credit = credit
        self._call = call
        self._may_speak = may_speak
        self._head = RunTurnsRequest()
        """The frame but for its turns and their inputs."""
        self._starts: list[_Item] = []
        self._inputs: list[_Item] = []
        self._wake = asyncio.Event()
        self._ends: asyncio.TimerHandle | None = None
        """Sends confirmations that nothing else has taken along."""

    def start(self, start: StartTurn) -> None:
        """Runs a turn there."""
        if spans.watched:
            spans.stage("router.callbacks", (start.turn_id,))
        self._starts.append((start.turn_id, start.dispatch, _field(_STARTS, start)))
        self._wake.set()

    def confirm(self, turn_id: bytes, dispatch: int, step: int) -> None:
        """Says that a step is journaled."""
        self._head.confirms.add(turn_id=turn_id, dispatch=dispatch, step=step)
        self._wake.set()

    def confirm_end(self, turn_id: bytes, dispatch: int, step: int) -> None:
        """Says that a turn's last step is journaled, with the next frame if there is one soon: under load there is, and
        a frame costs as much as a turn.
        """
        self._head.confirms.add(turn_id=turn_id, dispatch=dispatch, step=step)
        if self._ends is None:
            self._ends = asyncio.get_running_loop().call_later(_END_LINGER_S, self._wake.set)

    def stop(self, turn_id: bytes, dispatch: int) -> None:
        """Stops a turn there."""
        self._head.stops.add(turn_id=turn_id, dispatch=dispatch)
        self._wake.set()

    def add_inputs(self, turn_id: bytes, dispatch: int, first: int, inputs: list[bytes]) -> None:
        """Gives a turn there further inputs."""
        added = AddInputs(turn_id=turn_id, dispatch=dispatch, first=first, inputs=inputs)
        self._inputs.append((turn_id, dispatch, _field(_ADD_INPUTS, added)))
        self._wake.set()

    async def write(self, heartbeat_s: float) -> None:
        """Writes frames until the stream ends; at least one per heartbeat interval."""
        beats = asyncio.create_task(self._beat(heartbeat_s), name=f"heartbeat {self.brain}")
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._forget_timer()
                head, self._head = self._head, RunTurnsRequest()
                items, self._starts, self._inputs = [*self._starts, *self._inputs], [], []
                if not self._may_speak():
                    # The lease may be somebody else's by now: nothing of what was decided before may be confirmed or
                    # started. A brain that is not confirmed must not wait for it for ever, a final above all: its turn
                    # is over here, nobody would stop it later.
                    head.stops.extend(StopTurn(turn_id=c.turn_id, dispatch=c.dispatch) for c in head.confirms)
                    head.ClearField("confirms")
                    items = []
                for turn_ids, frame in _frames(head, items):
                    if spans.watched:
                        spans.stage("router.frame", turn_ids)
                    await self._call.write(frame)
        finally:
            beats.cancel()
            self._forget_timer()

    def _forget_timer(self) -> None:
        if self._ends is not None:
            self._ends.cancel()
            self._ends = None

    async def _beat(self, heartbeat_s: float) -> None:
        """Says at every interval that this end lives, whether or not other frames went: a frame per interval costs
        less than a timer around each.
        """
        while True:
            await asyncio.sleep(heartbeat_s)
            self._head.heartbeat = True
            self._wake.set()


def _field(tag: bytes, message: StartTurn | AddInputs) -> bytes:
    """An item of a repeated field of the frame, as it stands on the wire."""
    body = message.SerializeToString()
    size, left = bytearray(), len(body)
    while left > 0x7F:
        size.append(left & 0x7F | 0x80)
        left >>= 7
    size.append(left)
    return b"".join((tag, size, body))


def _frames(head: RunTurnsRequest, items: list[_Item]) -> Iterator[tuple[list[bytes], bytes]]:
    """A frame in pieces that the transport takes, each with whom it is about: many turns may start at once, each with
    megabytes to read. A turn's further inputs stay behind its start.
    """
    first = head.SerializeToString()
    if len(items) < 2 or len(first) + sum(len(item[2]) for item in items) <= _FRAME_BYTES:
        yield [item[0] for item in items], b"".join((first, *(item[2] for item in items)))
        return
    yield [], first
    stopped = {stop.turn_id: stop.dispatch for stop in head.stops}
    part: list[_Item] = []
    size = 0
    for item in items:
        turn_id, dispatch, wire = item
        if stopped.get(turn_id, 0) >= dispatch:
            continue  # in one frame the stop would have kept it from running
        if size and size + len(wire) > _FRAME_BYTES:
            yield [turn_id for turn_id, _, _ in part], b"".join(wire for _, _, wire in part)
            part, size = [], 0
        part.append(item)
        size += len(wire)
    if part:
        yield [turn_id for turn_id, _, _ in part], b"".join(wire for _, _, wire in part)


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
            channel = open_stream_channel(self._target, token=self._token, service="cognition")
            began = monotonic()
            try:
                await self._serve(channel)
            except (grpc.aio.AioRpcError, TimeoutError, ConnectionError) as error:
                log.info("router.brain_unreachable", target=self._target, error=_brief(error))
            finally:
                await channel.close()
            wait_s = _FIRST_WAIT_S if monotonic() - began > _LONGEST_WAIT_S else min(wait_s * 2, _LONGEST_WAIT_S)
            await asyncio.sleep(wait_s)

    async def _serve(self, channel: StreamingChannel) -> None:
        # Not by the stub: frames are written as bytes. Without an iterator of requests the call is written to.
        open_stream: Any = channel.stream_stream(_METHOD, response_deserializer=RunTurnsResponse.FromString)
        call: _Call = open_stream()
        link: GrpcBrainLink | None = None
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                hello = RunTurnsRequest(hello=RouterHello(router=self._router, protocol=PROTOCOL))
                await call.write(hello.SerializeToString())
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
