"""The stream of a channel adapter, kept alive: connect, send, get answers, acknowledge, come back after a loss.

    async with ChannelClient("127.0.0.1:7400", token=token, tenant="demo", channel="line", instance="line-1") as client:
        receipt = await client.send("assistant", "room-7", "what is 17*23")
        async for event in client.events():
            if isinstance(event, Delivery):
                print(event.message.parts[0].text)
                await client.ack(event)

What it promises: an item is sent until it is answered, over as many streams as that takes, always with the same key
and in the order given; a delivery is shown once, unless it was nacked; queues are bounded. What it does not: live
events are dropped when they are not read, they hold nothing that the delivery does not.

For thousands of messages a second use `post` (no future per message) and the callbacks `on_delivery` and `on_live`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import grpc
import structlog
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error, Message, Part, Role
from soma.common.v1.turn_pb2 import ArrivalPolicy, Delivery, LiveEvent
from soma.gateway.v1.channel_service_pb2 import (
    Cancel,
    ConnectRequest,
    ConnectResponse,
    Hello,
    InboundMessage,
    Nack,
    Receipt,
    Welcome,
)

from soma_common.client.inbox import Arrival, Inbox
from soma_common.client.kept_stream import KeptStream, Traffic
from soma_common.client.outbox import Answer, Outbox
from soma_common.errors import (
    InvalidRequest,
    ResourceExhausted,
    SomaError,
    Unauthenticated,
    Unavailable,
    from_proto,
    to_proto,
)
from soma_common.grpc.stream_channel import StreamingChannel, open_stream_channel
from soma_common.newest_dispatch import NewestDispatch

PROTOCOL: Final = 1
MAX_FRAME_ITEMS: Final = 512
"""The contract's bound."""
MAX_FRAME_BYTES: Final = 2 * 1024 * 1024
"""Of items in a frame; a larger one goes alone."""
MAX_FRAME_ACKS: Final = 16 * 1024
MAX_FRAME_NACKS: Final = 256
"""Less than 1.2 MiB: the cause of a nack has up to 1024 characters."""
MAX_CONTENT_BYTES: Final = 8 * 1024 * 1024
"""The largest content any gateway can be set to take. With what else a frame may hold it is below the 16 MiB of one
gRPC message, beyond which a gateway ends the stream instead of refusing the item.
"""
MAX_NAMES_BYTES: Final = 16 * 1024
"""Of an item beside its content: names, key, trace. Those that keep the contract's rules have a tenth of it."""
RETRY_S: Final = 0.05
"""Before a refused item is tried again, when the refusal names no delay."""
LAST_FRAME_S: Final = 1.0
"""How long closing waits for the stream to send what is queued and end by itself."""
LOOK_AROUND_S: Final = 0.02
"""How often the client of a gateway that goes away looks for another one."""
LEAVE_AFTER: Final = 0.5
"""The part of a gateway's grace after which its client leaves, wherever to."""
MAX_LIVE: Final = 4096
"""Live events kept for `events()`; further ones are dropped until it is read."""

_USER: Final = Role.ROLE_USER
"""Looked up once: a look-up in a generated enum costs as much as making the message."""
_ROLE_BYTES: Final = Message(role=_USER).ByteSize()
_log = structlog.get_logger(__name__)


class ClientClosed(Exception):
    """The client was closed; nothing more is sent."""


class ChannelClient:
    """One adapter instance's stream. An async context manager, for one event loop."""

    def __init__(
        self,
        target: str,
        *,
        token: str | Callable[[], str],
        tenant: str,
        channel: str,
        instance: str,
        live: bool = True,
        credit: int = 256,
        outbox: int = 8192,
        on_delivery: Callable[[Delivery], None] | None = None,
        on_live: Callable[[LiveEvent], None] | None = None,
        grpc_channel: grpc.aio.Channel | None = None,
        connect_timeout_s: float | None = None,
    ) -> None:
        """`target` is `host:port` of a gateway, or several separated by commas.

        `token` is a bearer token, or a function that returns the present one; what it raises ends the client with
        Unauthenticated. `connect_timeout_s` bounds how long entering waits for a gateway; None: without end, so that
        an adapter may start before its gateway. Later losses are never given up. `instance` is stable over restarts of
        one adapter process and different for each. `credit` is how many deliveries may be unacknowledged at once;
        0: only send. `outbox` bounds the items without an answer.

        With `on_delivery`, deliveries go to it instead of `events()`: returning acknowledges, raising gives the
        delivery back to come again. `on_live` likewise gets the live events; what it raises ends the client with
        Internal. Both are called from the reader and must not block.
        """
        self._token: Callable[[], str] = (lambda: token) if isinstance(token, str) else _shown(token)
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        self._hello = Hello(
            tenant=tenant, channel=channel, instance=instance, live=live, credit=credit, protocol=PROTOCOL
        )
        self._own_channel = grpc_channel is None
        self._grpc: StreamingChannel = grpc_channel or open_stream_channel(target, token=self._token, service="gateway")
        self._stream = KeptStream(
            self._grpc,
            Traffic(
                self._open, self._welcomed, self._next_frame, self._finished, self._receive, self._lost, self._failed
            ),
            target,
        )
        self._on_delivery = on_delivery
        self._on_live = on_live
        self._shown = NewestDispatch()
        self._outbox = Outbox(outbox)
        self._inbox = Inbox()
        self._events: deque[Delivery | LiveEvent] = deque()
        self._waiting_live = 0
        self._acks: list[bytes] = []
        self._nacks: list[Nack] = []
        self._credit = 0
        self._max_content_bytes = MAX_CONTENT_BYTES
        """Of one message, as the last welcome said; before the first and if it did not say: MAX_CONTENT_BYTES."""
        self._hold = False
        self._leave_by = 0.0
        self._room = asyncio.Event()
        self._news = asyncio.Event()
        self._failure: SomaError | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Connects; waits for a gateway that is not there, and logs a warning that it does.

        Raises:
            SomaError: the gateway refuses for a reason that waiting does not change; Unavailable: none was there within
                `connect_timeout_s`.
            ClientClosed: the client was closed meanwhile.
        """
        self._task = asyncio.get_running_loop().create_task(self._stream.run(), name="channel-client")
        try:
            await self._connected()
            self._check_open()
        except BaseException:  # a caller that does not wait any longer too: nobody else would end the task
            await self.close(timeout_s=0)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def welcome(self) -> Welcome | None:
        """What the gateway said at the last connect; None while there is no stream."""
        return self._stream.welcome

    @property
    def streams(self) -> int:
        """How many streams there have been; more than one: the client has reconnected."""
        return self._stream.number

    @property
    def unanswered(self) -> int:
        """Items without receipt or refusal."""
        return len(self._outbox)

    @property
    def holds(self) -> bool:
        """Whether new items wait because the gateway goes away."""
        return self._hold

    # Sending.

    async def send(
        self,
        agent: str,
        session: str,
        content: str | Message,
        *,
        idempotency_key: str | None = None,
        policy: ArrivalPolicy.ValueType = ArrivalPolicy.ARRIVAL_POLICY_UNSPECIFIED,
        traceparent: str = "",
        patience_s: float = 30.0,
    ) -> Receipt:
        """Sends a message and returns its receipt: it is stored and will be answered.

        Without a key a random one is used. A full queue or an unavailable bus is tried again with the same key for
        `patience_s`. Messages of one session keep their order when each waits for the receipt of the one before.

        Raises:
            SomaError: of the class that says what to do; nothing is stored, except that Unavailable means "not known".
            ClientClosed: the client was closed meanwhile, also while the message waited for room in the outbox.
        """
        message = text_message(content) if isinstance(content, str) else content
        item = InboundMessage(
            agent=agent,
            session=session,
            idempotency_key=idempotency_key or uuid.uuid4().hex,
            message=message,
            policy=policy,
            traceparent=traceparent,
        )
        return await self._until_answered(item, patience_s)

    async def cancel(
        self,
        agent: str,
        session: str,
        turn_id: bytes = b"",
        *,
        idempotency_key: str | None = None,
        patience_s: float = 30.0,
    ) -> Receipt:
        """Stops a turn (16 bytes), or whatever runs in the session when the cancel is reached, after all messages
        sent before.

        Returns when the cancel is stored. Raises as `send`.
        """
        key = idempotency_key or uuid.uuid4().hex
        return await self._until_answered(
            Cancel(agent=agent, session=session, turn_id=turn_id, idempotency_key=key), patience_s
        )

    def post(self, item: InboundMessage | Cancel, answer: Answer) -> int:
        """Queues a message or cancel and returns its ref; `answer` is called once with the message id or the error.
        Never waits.

        Refusals are not tried again here. The item belongs to the client from now on. What `answer` raises is logged
        and harms nobody else.

        Raises:
            ResourceExhausted: the outbox is full.
            InvalidRequest: CONTENT_TOO_LARGE: the message is larger than the gateway's `max_content_bytes`;
                INVALID_REQUEST: the rest of the item is larger than names, key and trace can be.
            SomaError: the client has failed for good.
            ClientClosed: the client is closed.
        """
        self._check_open()
        if self._outbox.full:
            raise ResourceExhausted(
                ErrorReason.ERROR_REASON_QUEUE_FULL,
                "the client's outbox is full: wait for answers",
                {"bound": "client.outbox", "value": str(len(self._outbox))},
            )
        size = item.ByteSize()
        # What is no larger as a whole has no larger content: nearly every item is serialized only once to be measured.
        if size > self._max_content_bytes:
            _check_size(item, size, self._max_content_bytes)
        ref = self._outbox.add(item, size, answer)
        self._stream.wake()
        return ref

    # Receiving.

    async def events(self) -> AsyncIterator[Delivery | LiveEvent]:
        """Deliveries, to be acknowledged, and live events, in the order they came. Ends when the client is closed.

        Raises SomaError when the gateway refuses the stream for a reason that waiting does not change.
        """
        while True:
            while self._events:
                event = self._events.popleft()
                self._waiting_live -= isinstance(event, LiveEvent)
                yield event
            if self._failure is not None:
                raise self._failure
            if self._stream.closing:
                return
            self._news.clear()
            await self._news.wait()

    async def ack(self, delivery: Delivery) -> None:
        """The delivery is processed; it will not come again. Goes out with the next frame."""
        self._processed(delivery)

    async def nack(self, delivery: Delivery, *, delay_s: float = 1.0, cause: str = "") -> None:
        """The delivery could not be processed: it comes again after the delay, a bounded number of times."""
        self._nacks.append(Nack(delivery_id=delivery.delivery_id, delay_ms=int(delay_s * 1000), cause=cause[:1024]))
        self._credit += self._inbox.nack(delivery, self._stream.number)
        self._stream.wake()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Sends what is queued, waits for its answers at most so long, and ends the stream. May be called again.

        Whoever waits then, in `send`, `cancel` or `async with`, gets ClientClosed; `events` ends.
        """
        task = self._task
        try:
            if task is not None and not task.done() and not self._stream.closing:
                with suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await self._all_answered()
            self._stream.closing = True
            self._stream.wake()
            self._wake_all()
            if task is not None:
                await asyncio.wait({task}, timeout=LAST_FRAME_S)
        finally:  # a cancel from outside cuts the waiting short, not the end
            self._stream.closing = True
            self._wake_all()
            try:
                if task is not None:
                    task.cancel()
                    await asyncio.wait({task})
            finally:  # nor does a second one
                self._outbox.fail(Error(reason=ErrorReason.ERROR_REASON_DRAINING, message="the client was closed"))
                if self._own_channel:
                    await self._grpc.close()

    def _wake_all(self) -> None:
        """Everybody who waits looks again: the client is closed, or has failed."""
        for event in (self._stream.connected, self._news, self._room):
            event.set()

    async def _connected(self) -> None:
        """Returns with the first welcome, or a failure for good. Raises Unavailable when the time for it is over."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._stream.connected.wait()
        except TimeoutError:
            trouble = self._stream.trouble or "it does not answer"
            raise Unavailable(
                ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
                f"no gateway at {self._target} within {self._connect_timeout_s:g} s: check the address, and that it "
                f"runs ({trouble})",
            ) from None

    async def _all_answered(self) -> None:
        while len(self._outbox) and self._failure is None:
            self._room.clear()
            await self._room.wait()

    # What the stream asks for and brings.

    def _open(self) -> Hello:
        """Who connects, and what it has processed: acks and credit of the stream before mean nothing on a new one."""
        self._acks.clear()
        self._nacks.clear()
        self._credit = 0
        self._hold = False
        hello = Hello()
        hello.CopyFrom(self._hello)
        hello.processed.extend(self._inbox.processed())
        return hello

    def _finished(self) -> bool:
        """Whether a stream whose gateway goes away has served its items, and there is another gateway to go to.

        It stays while it can for the sake of the latter: answers and acknowledgements go on over it.
        """
        if not self._hold or self._outbox.in_flight:
            return False
        loop = asyncio.get_running_loop()
        if self._grpc.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY or loop.time() > self._leave_by:
            return True
        loop.call_later(LOOK_AROUND_S, self._stream.wake)
        return False

    def _welcomed(self, welcome: Welcome) -> None:
        self._max_content_bytes = min(welcome.max_content_bytes or MAX_CONTENT_BYTES, MAX_CONTENT_BYTES)

    def _next_frame(self, welcome: Welcome) -> ConnectRequest | None:
        """What has gathered, as far as it fits one frame; None: nothing."""
        items = [] if self._hold else self._outbox.take(welcome.max_unanswered, MAX_FRAME_ITEMS, MAX_FRAME_BYTES)
        if not (items or self._acks or self._nacks or self._credit):
            return None
        frame = ConnectRequest(
            acks=self._acks[:MAX_FRAME_ACKS], nacks=self._nacks[:MAX_FRAME_NACKS], credit=self._credit
        )
        del self._acks[:MAX_FRAME_ACKS], self._nacks[:MAX_FRAME_NACKS]
        self._credit = 0
        for item in items:
            if isinstance(item, InboundMessage):
                frame.messages.append(item)
            else:
                frame.cancels.append(item)
        return frame

    def _receive(self, frame: ConnectResponse) -> bool:
        """Answers go to their items, live events and deliveries to the application. Returns whether there were
        answers.
        """
        outbox = self._outbox
        for receipt in frame.receipts:
            outbox.answer(receipt.ref, receipt.message_id, None)
        for refusal in frame.refusals:
            outbox.answer(refusal.ref, b"", refusal.error)
        answers = bool(frame.receipts or frame.refusals)
        if answers:
            self._room.set()
            self._stream.wake()
        for event in frame.live:
            self._show_live(event)
        for delivery in frame.deliveries:
            self._show(delivery)
        if frame.HasField("drain"):
            # No new items on this stream; it is closed when those on their way are answered.
            loop = asyncio.get_running_loop()
            self._hold = True
            self._leave_by = loop.time() + frame.drain.grace_ms / 1000 * LEAVE_AFTER
            # Not at once: by then the channel knows that this gateway is none to go to.
            loop.call_later(LOOK_AROUND_S, self._stream.wake)
            _log.info("channel_client.drain", grace_ms=frame.drain.grace_ms)
        return answers

    def _lost(self) -> None:
        """Everything unanswered goes out again on the next stream."""
        self._outbox.rewind()

    def _failed(self, error: SomaError) -> None:
        """Everybody who waits is told."""
        self._failure = error
        self._wake_all()
        self._outbox.fail(to_proto(error))

    def _show_live(self, event: LiveEvent) -> None:
        if not self._shown.admits(event.turn_id, event.dispatch):
            return  # of two streams, as at a change of gateway, the older may still say what a replaced brain has said
        if self._on_live is not None:
            self._on_live(event)
        elif self._waiting_live < MAX_LIVE:
            self._waiting_live += 1
            self._events.append(event)
            self._news.set()

    def _show(self, delivery: Delivery) -> None:
        match self._inbox.arrive(delivery, self._stream.number):
            case Arrival.PROCESSED:
                self._acks.append(delivery.delivery_id)
                self._credit += 1
                self._stream.wake()
            case Arrival.IN_HAND:
                pass
            case Arrival.NEW if self._on_delivery is None:
                self._events.append(delivery)
                self._news.set()
            case Arrival.NEW:
                self._call_back(self._on_delivery, delivery)

    def _call_back(self, on_delivery: Callable[[Delivery], None], delivery: Delivery) -> None:
        try:
            on_delivery(delivery)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - boundary: the application's own code
            _log.exception("channel_client.on_delivery_failed")
            self._nacks.append(Nack(delivery_id=delivery.delivery_id, delay_ms=1000, cause=repr(error)[:1024]))
            self._credit += self._inbox.nack(delivery, self._stream.number)
            self._stream.wake()
        else:
            self._processed(delivery)

    def _processed(self, delivery: Delivery) -> None:
        self._acks.append(delivery.delivery_id)
        self._credit += self._inbox.ack(delivery, self._stream.number)
        self._stream.wake()

    async def _until_answered(self, item: InboundMessage | Cancel, patience_s: float) -> Receipt:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while True:
            while self._outbox.full and not self._stream.closing and self._failure is None:
                self._room.clear()
                await self._room.wait()
            answered: asyncio.Future[bytes] = loop.create_future()
            ref = self.post(item, _settle(answered))
            try:
                return Receipt(ref=ref, message_id=await answered)
            except (ResourceExhausted, Unavailable) as error:
                if self._stream.closing:
                    raise ClientClosed from error
                delay = error.retry_delay_s or RETRY_S
                if loop.time() + delay >= deadline:
                    raise
                await asyncio.sleep(delay)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._stream.closing or self._task is None:
            raise ClientClosed


def _check_size(item: InboundMessage | Cancel, size: int, max_content_bytes: int) -> None:
    """Refuses, as the gateway does, what it would. Raises InvalidRequest. `size` is that of the item, in bytes."""
    content = 0
    if isinstance(item, InboundMessage):
        # The gateway counts the message as it stores it, with the role that it sets if there is none.
        content = item.message.ByteSize() + (0 if item.message.role else _ROLE_BYTES)
    if content > max_content_bytes:
        raise InvalidRequest(
            ErrorReason.ERROR_REASON_CONTENT_TOO_LARGE,
            f"message: {content} bytes; at most {max_content_bytes}: send big content as a file reference",
            {"max_content_bytes": str(max_content_bytes)},
        )
    if size - content > MAX_NAMES_BYTES:
        raise InvalidRequest(
            ErrorReason.ERROR_REASON_INVALID_REQUEST,
            f"item: {size - content} bytes beside the message; at most {MAX_NAMES_BYTES}: shorten its names, key or "
            "trace",
        )


def text_message(text: str) -> Message:
    """A user's message of plain text."""
    return Message(role=_USER, parts=[Part(text=text)])


def _shown(token: Callable[[], str]) -> Callable[[], str]:
    """`token`, whose failure is told as what it is to the client: no valid token. Its text says why, such as which
    file is not there.
    """

    def ask() -> str:
        try:
            return token()
        except Exception as error:  # boundary: the application's own code
            raise Unauthenticated(
                ErrorReason.ERROR_REASON_UNAUTHENTICATED, f"the token cannot be had: {type(error).__name__}: {error}"
            ) from error

    return ask


def _settle(future: asyncio.Future[bytes]) -> Answer:
    def answer(message_id: bytes, error: Error | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(message_id)
        else:
            future.set_exception(from_proto(error))

    return answer
