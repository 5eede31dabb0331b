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
WELCOME_TIMEOUT_S: Final = 10.0

_RETRYABLE: Final = (Unavailable, ResourceExhausted, DeadlineExceeded, Internal)
"""Ends of a stream after which it is worth connecting again. All others need somebody to change something."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What goes over the stream: the functions of whoever uses it. None may block."""

    hello: Callable[[], Hello]
    """A stream is about to be opened, what belonged to the one before is void: returns who connects."""
    next_frame: Callable[[Welcome], ConnectRequest | None]
    """Returns what has gathered for the gateway; None: nothing."""
    finished: Callable[[], bool]
    """Whether the stream may be closed, once `next_frame` has nothing more."""
    receive: Callable[[ConnectResponse], None]
    """A frame came."""
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
        self._silent = False
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
        """Keeps a stream until `closing` or refused for good."""
        backoff = FIRST_BACKOFF_S
        while not self.closing:
            try:
                await self._serve()
            except SomaError as error:
                if not isinstance(error, _RETRYABLE):
                    self._traffic.failed(error)
                    return
                self._tell_loss(error, backoff)
            except Exception as error:  # noqa: BLE001 - boundary: a callback of the application
                _log.exception("channel_client.failed")
                self._traffic.failed(Internal(ErrorReason.ERROR_REASON_INTERNAL, _failed_callback(error)))
                return
            if self.welcome is not None:
                backoff = FIRST_BACKOFF_S
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
        """One stream from hello to its end. Raises SomaError when it ends badly."""
        call: Any = self._connect()
        writer: asyncio.Task[None] | None = None
        self._silent = False
        try:
            self.number += 1
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(ConnectRequest(hello=self._traffic.hello()))
                first = await call.read()
            if first is grpc.aio.EOF:
                return
            self.welcome = first.welcome
            self._heard_at = self._wrote_at = asyncio.get_running_loop().time()
            self.connected.set()
            self._tell_gain()
            writer = asyncio.get_running_loop().create_task(self._write(call, first.welcome), name="channel-writer")
            while (frame := await call.read()) is not grpc.aio.EOF:
                self._heard_at = asyncio.get_running_loop().time()
                self._traffic.receive(frame)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.InvalidStateError as error:
            raise _unavailable("the stream ended while it was opened") from error
        except TimeoutError as error:
            raise _unavailable("the gateway did not answer hello") from error
        except asyncio.CancelledError as error:
            if self._silent:  # cancelled by our own writer
                raise _unavailable("the gateway has fallen silent") from error
            raise
        finally:
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.wait({writer})

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
                        self._silent = True
                        call.cancel()
                        return
                    if loop.time() - self._wrote_at < interval:
                        await self._news()
                        continue
                    frame = ConnectRequest(heartbeat=True)
                await call.write(frame)
                self._wrote_at = loop.time()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            _log.debug("channel_client.write_failed", error=repr(error))  # the reader learns how the stream ended
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


def _failed_callback(error: Exception) -> str:
    # Not its repr: that of an OSError leaves out the file.
    return f"a callback failed: {type(error).__name__}: {error}"


def _unavailable(message: str) -> Unavailable:
    return Unavailable(ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE, message)
