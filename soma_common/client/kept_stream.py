"""One stream to a gateway at a time, opened again whenever it is lost, until it is closed or refused for good.

It moves frames and knows nothing of what is in them, except hello, welcome and heartbeats. Reader and writer never
wait for each other.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.gateway.v1.channel_service_pb2 import DESCRIPTOR, ConnectRequest, ConnectResponse, Hello, Welcome

from soma_common.errors import (
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    SomaError,
    Unavailable,
    from_rpc_error,
)
from soma_common.grpc.stream_channel import StreamingChannel
from soma_common.wakeup import WakeUp

_METHOD: Final = f"/{DESCRIPTOR.services_by_name['ChannelService'].full_name}/Connect"
FIRST_BACKOFF_S: Final = 0.05
LONGEST_BACKOFF_S: Final = 2.0
"""Between two tries to open a stream. A stream that lived as long was of use, whatever came over it."""
WELCOME_TIMEOUT_S: Final = 10.0

_RETRYABLE: Final = (Unavailable, ResourceExhausted, DeadlineExceeded, Internal)
"""Ends of a stream after which it is worth connecting again. All others need somebody to change something."""
_ENDS: Final = (grpc.aio.AioRpcError, asyncio.InvalidStateError)
"""What a call's `write` and `read` raise when the stream is over."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What goes over the stream: the functions of whoever uses it. None may block."""

    hello: Callable[[], Hello]
    """A stream is about to be opened, what belonged to the one before is void: returns who connects."""
    welcomed: Callable[[Welcome], None]
    """The gateway has answered hello."""
    next_frame: Callable[[Welcome], ConnectRequest | None]
    """Returns what has gathered for the gateway; None: nothing."""
    finished: Callable[[], bool]
    """Whether the stream may be closed, once `next_frame` has nothing more."""
    receive: Callable[[ConnectResponse], bool]
    """A frame came. Returns whether it answers something that was sent. What it raises ends the client."""
    lost: Callable[[], None]
    """The stream is gone; another follows unless `closing`."""
    failed: Callable[[SomaError], None]
    """There will be no stream any more."""


class KeptStream:
    """Runs as one task (`run`); `wake` says that `next_frame` may have something."""

    def __init__(self, channel: StreamingChannel, traffic: Traffic, target: str) -> None:
        """`target` is where `channel` leads, for the log."""
        self._connect = channel.stream_stream(
            _METHOD,
            request_serializer=ConnectRequest.SerializeToString,
            response_deserializer=ConnectResponse.FromString,
        )
        self._traffic = traffic
        self._target = target
        self._wake_writer = WakeUp()
        self._woken = False
        self._heard_at = self._wrote_at = 0.0
        self._of_use = False
        """Whether the present stream has brought something forward, so that another is worth opening at once."""
        self._given_up: Exception | None = None
        """Why our own writer has cancelled the present stream."""
        self.number = 0
        """Counts the streams; the present one has this number."""
        self.welcome: Welcome | None = None
        """What the gateway said; None while there is no stream."""
        self.connected = asyncio.Event()
        """Set with the first welcome."""
        self.closing = False
        """Set from outside: the present stream is the last."""
        self.trouble = ""
        """Why the last try to open a stream has failed; empty: none has since a gateway was there."""

    def wake(self) -> None:
        """There may be something to send, or a reason to close."""
        self._woken = True
        self._wake_writer()

    async def run(self) -> None:
        """Keeps a stream until `closing` or refused for good. However else it ends, `failed` is told."""
        try:
            await self._keep()
        except BaseException as error:
            if not (self.closing and isinstance(error, asyncio.CancelledError)):
                _log.exception("channel_client.failed")
                self._traffic.failed(_failure(error))
            if not isinstance(error, Exception):
                raise

    async def _keep(self) -> None:
        backoff = FIRST_BACKOFF_S
        while not self.closing:
            loss: SomaError | None = None
            try:
                await self._serve()
            except SomaError as error:
                if not isinstance(error, _RETRYABLE):
                    self._traffic.failed(error)
                    return
                loss = error
            # Not with the welcome: a gateway that cannot take what is sent first would be asked again without rest.
            if self._of_use:
                backoff = FIRST_BACKOFF_S
            if loss is not None:
                self._tell_loss(loss, backoff)
            self.welcome = None
            self._traffic.lost()
            if not self.closing:
                await asyncio.sleep(random.uniform(backoff / 2, backoff))
                backoff = min(backoff * 2, LONGEST_BACKOFF_S)

    def _tell_loss(self, error: SomaError, backoff_s: float) -> None:
        """Logs that a stream is over or did not begin. The first that does not begin is a warning: nobody else would
        say that this process waits, and it may wait for ever.
        """
        if self.welcome is not None or self.trouble:
            _log.info("channel_client.stream_lost", error=str(error), backoff_s=round(backoff_s, 3))
        else:
            _log.warning(
                "channel_client.no_gateway",
                target=self._target,
                error=str(error),
                check="the address, and that a gateway runs there; it is tried again until one does",
            )
        if self.welcome is None:
            self.trouble = str(error)

    def _tell_gain(self) -> None:
        """Logs that the waiting is over, if there was any."""
        if self.trouble:
            _log.info("channel_client.gateway_found", target=self._target, stream=self.number)
            self.trouble = ""

    async def _serve(self) -> None:
        """One stream from hello to its end. Raises SomaError when it ends badly; what the application's code raises is
        passed on as it is.
        """
        call: Any = self._connect()
        writer: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        welcomed_at: float | None = None
        self._of_use = False
        self._given_up = None
        try:
            self.number += 1
            self.welcome = welcome = await _greeted(call, ConnectRequest(hello=self._traffic.hello()))
            self._heard_at = self._wrote_at = welcomed_at = loop.time()
            self._traffic.welcomed(welcome)
            self.connected.set()
            self._tell_gain()
            writer = loop.create_task(self._write(call, welcome), name="channel-writer")
            while (frame := await self._read(call)) is not None:
                self._heard_at = loop.time()
                try:
                    self._of_use |= self._traffic.receive(frame)
                except SomaError as error:  # of a call that a callback made: it is not how this stream ends
                    raise RuntimeError(f"a callback raised {type(error).__name__}: {error}") from error
        finally:
            if welcomed_at is not None and loop.time() - welcomed_at >= LONGEST_BACKOFF_S:
                self._of_use = True
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.wait({writer})

    async def _read(self, call: Any) -> ConnectResponse | None:
        """The next frame; None: the stream has ended well. Raises SomaError when it has not."""
        try:
            frame = await call.read()
        except _ENDS as error:
            raise _end_of(error) from error
        except asyncio.CancelledError:
            if self._given_up is not None:
                raise self._given_up from None
            raise
        return None if frame is grpc.aio.EOF else frame

    async def _write(self, call: Any, welcome: Welcome) -> None:
        """Sends what has gathered, a heartbeat when nothing has; gives up on a gateway that is silent for three
        intervals.
        """
        interval = welcome.heartbeat_ms / 1000
        loop = asyncio.get_running_loop()
        clock = _Wakeups(loop, interval, lambda: self._wrote_at, self.wake)
        try:
            while True:
                self._woken = False
                frame = self._traffic.next_frame(welcome)
                if frame is None:
                    if self.closing or self._traffic.finished():
                        await call.done_writing()
                        return
                    if loop.time() - self._heard_at > 3 * interval:
                        self._given_up = _unavailable("the gateway has fallen silent")
                        call.cancel()
                        return
                    if loop.time() - self._wrote_at < interval:
                        await self._news()
                        continue
                    frame = ConnectRequest(heartbeat=True)
                await call.write(frame)
                self._wrote_at = loop.time()
        except _ENDS as error:
            _log.debug("channel_client.write_failed", error=repr(error))  # the reader learns how the stream ended
        except Exception as error:  # noqa: BLE001 - a defect: the reader would go on with nobody to write
            self._given_up = error
            call.cancel()
        finally:
            clock.cancel()

    async def _news(self) -> None:
        """Returns when `wake` was called since the last look at what there is to send."""
        if not self._woken:
            await self._wake_writer.wait()


class _Wakeups:
    """Wakes a writer that has been idle for an interval. One timer for the stream's life: one for each time the writer
    waits costs more than the frame that ends the wait.
    """

    __slots__ = ("_active_at", "_interval", "_loop", "_timer", "_wake")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        interval_s: float,
        active_at: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        """`active_at` returns when the writer last wrote, by the loop's clock."""
        self._loop, self._interval, self._active_at, self._wake = loop, interval_s, active_at, wake
        self._timer = loop.call_later(interval_s, self._due)

    def cancel(self) -> None:
        """Wakes nobody any more."""
        self._timer.cancel()

    def _due(self) -> None:
        now = self._loop.time()
        due = self._active_at() + self._interval
        self._timer = self._loop.call_at(due if due > now else now + self._interval, self._due)
        self._wake()


async def _greeted(call: Any, hello: ConnectRequest) -> Welcome:
    """Says hello and returns the answer. Raises SomaError; also if the stream ends well instead: nobody was there."""
    try:
        async with asyncio.timeout(WELCOME_TIMEOUT_S):
            await call.write(hello)
            first = await call.read()
    except _ENDS as error:
        raise _end_of(error) from error
    except TimeoutError as error:
        raise _unavailable("the gateway did not answer hello") from error
    if first is grpc.aio.EOF:
        raise _unavailable("the stream was ended before the gateway's welcome")
    welcome: Welcome = first.welcome
    return welcome


def _end_of(error: Exception) -> SomaError:
    if isinstance(error, grpc.aio.AioRpcError):
        return from_rpc_error(error)
    return _unavailable("the stream ended while it was opened")


def _failure(error: BaseException) -> Internal:
    # Not its repr: that of an OSError leaves out the file.
    return Internal(
        ErrorReason.ERROR_REASON_INTERNAL,
        f"a callback or the client itself failed; the log says where: {type(error).__name__}: {error}",
    )


def _unavailable(message: str) -> Unavailable:
    return Unavailable(ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE, message)
