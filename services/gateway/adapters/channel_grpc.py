"""ChannelService over gRPC: turns calls into use cases and refusals into statuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import grpc
import structlog
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Message, SessionKey
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome
from soma.gateway.v1.channel_service_pb2 import (
    ConnectRequest,
    ConnectResponse,
    Decision,
    Receipt,
    SendMessageRequest,
    SendMessageResponse,
    StreamTurnRequest,
    StreamTurnResponse,
    Welcome,
)
from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceServicer

from services.gateway.adapters.metrics import observe_refusal
from services.gateway.adapters.watch_grpc import Watches
from services.gateway.application.adapter_stream import LAST_FRAMES_S, AdapterStream
from services.gateway.application.serve_streams import PROTOCOL, ServeStreams
from services.gateway.application.stream_turn import DecideMessage, SendMessage, StreamTurn
from services.gateway.domain.admission import Submission
from services.gateway.domain.refusal import Refused, protocol_order
from soma_common import errors, ids
from soma_common.failpoints import failpoint_async
from soma_common.grpc.token_life import token_seconds_left
from soma_common.live import LiveHub
from soma_common.live_merge import Fate
from soma_common.telemetry import spans

Context = grpc.aio.ServicerContext[Any, Any]

DECISION_S: Final = 9.0
"""How long `wait_for_decision` waits for a caller who sets no deadline."""
_ANSWER_IN: Final = 0.9
"""Part of a caller's time after which it is answered, so that the answer arrives."""

_log = structlog.get_logger(__name__)


class ChannelServicer(Watches, ChannelServiceServicer):
    """The handlers. Identity, tenant and request rules are checked before they run, items of a stream inside them."""

    def __init__(
        self,
        streams: ServeStreams,
        send: SendMessage,
        decide: DecideMessage,
        stream_turn: StreamTurn,
        hub: LiveHub,
        *,
        max_content_bytes: int,
    ) -> None:
        super().__init__(hub)
        self._streams = streams
        self._send = send
        self._decide = decide
        self._stream_turn = stream_turn
        self._max_content_bytes = max_content_bytes

    async def Connect(  # type: ignore[override] # gRPC takes a coroutine that writes as well as a generator
        self, request_iterator: AsyncIterator[ConnectRequest], context: Context
    ) -> None:
        """The stream of a channel adapter. Writes by itself: a generator costs two resumptions more for each frame."""
        lasts_s = token_seconds_left()
        first = await anext(request_iterator, None)
        try:
            if first is None or not first.HasField("hello"):
                raise protocol_order("the first frame holds no hello: say who connects before anything else")
            stream = self._streams.open(first.hello)
        except Refused as refused:
            raise _told(refused) from None
        loop = asyncio.get_running_loop()
        reader = loop.create_task(_read(stream, first, request_iterator))
        expiry = loop.call_later(lasts_s, lambda: stream.end(_expired()))
        try:
            async with stream.writing():
                write = context.write
                await write(ConnectResponse(welcome=self._welcome()))
                while (frame := await stream.next_frame()) is not None:
                    if spans.watched:
                        spans.stage("gateway.deliver", (delivery.turn_id for delivery in frame.deliveries), last=True)
                    await write(frame)
                    for refusal in frame.refusals:
                        observe_refusal(refusal.error)
                    if frame.deliveries:
                        await failpoint_async("gateway.after_delivery_before_ack")
        except Refused as refused:
            raise _told(refused) from None
        finally:
            expiry.cancel()
            self._streams.leave(stream)
            reader.cancel()
            await asyncio.wait({reader}, timeout=LAST_FRAMES_S)

    async def SendMessage(self, request: SendMessageRequest, context: Context) -> SendMessageResponse:
        """Accepts one message; the answer is the receipt."""
        submission = _submission(request, deliver=not request.no_delivery)
        try:
            message_id = await self._send(submission, request.message)
        except Refused as refused:
            raise _told(refused) from None
        session = ids.SessionName(submission.tenant, submission.agent, submission.channel, submission.session)
        answer = SendMessageResponse(message_id=message_id.hex(), session_name=str(session))
        if not request.wait_for_decision:
            answer.turn_name = str(ids.TurnName(session, ids.turn_id(session.id, message_id)))
            return answer
        fate = await self._decided(submission, request.message, message_id, context)
        answer.turn_name = str(ids.TurnName(session, fate.turn_id)) if fate.turn_id else ""
        answer.ahead = fate.ahead
        if fate.ended is not None:
            answer.decision = Decision.DECISION_ENDED
        else:
            answer.decision = Decision.DECISION_TAKEN if fate.turn_id else Decision.DECISION_QUEUED
        return answer

    async def _decided(self, submission: Submission, message: Message, message_id: bytes, context: Context) -> Fate:
        """What became of a stored message. Raises the error of one that its policy refused, and DeadlineExceeded."""
        left_s: float | None = context.time_remaining()
        try:
            async with asyncio.timeout(_ANSWER_IN * left_s if left_s is not None else DECISION_S):
                fate = await self._decide(submission, message)
        except TimeoutError:
            raise errors.DeadlineExceeded(
                ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED,
                "the message is stored; what becomes of it is not known yet: ask again with the same idempotency key",
                {"message_id": message_id.hex()},
            ) from None
        if fate.ended is not None and fate.ended.outcome == Outcome.OUTCOME_REJECTED:
            raise errors.from_proto(fate.ended.error)
        return fate

    async def StreamTurn(self, request: StreamTurnRequest, context: Context) -> AsyncIterator[StreamTurnResponse]:
        """Accepts one message and shows its turn."""
        try:
            submission = _submission(request, deliver=request.deliver)
            shown = self._stream_turn(submission, request.message, token_seconds_left())
            async with aclosing(shown) as events:
                async for event in events:
                    match event:
                        case bytes():
                            yield StreamTurnResponse(receipt=Receipt(message_id=event))
                        case LiveEvent():
                            yield StreamTurnResponse(live=event)
                        case Delivery():
                            yield StreamTurnResponse(outcome=event)
        except Refused as refused:
            raise _told(refused) from None

    def _welcome(self) -> Welcome:
        bounds = self._streams.bounds
        return Welcome(
            gateway=self._streams.gateway,
            heartbeat_ms=int(bounds.heartbeat_s * 1000),
            max_content_bytes=self._max_content_bytes,
            max_unanswered=bounds.unanswered_items,
            protocol=PROTOCOL,
        )


async def _read(stream: AdapterStream, first: ConnectRequest, frames: AsyncIterator[ConnectRequest]) -> None:
    """Applies frames as they come; the stream's writer is the one to end the call."""
    try:
        await stream.until_announced()
        await stream.receive_items(first)
        async for frame in frames:
            await stream.receive(frame)
    except Refused as refused:
        stream.end(refused)
    except errors.SomaError as error:
        stream.end(Refused.of(errors.to_proto(error)))
    except Exception:  # noqa: BLE001 - boundary: the writer would wait for ever for a reader that is gone
        _log.exception("connect.reader_failed", stream=stream.number)
        stream.end(_defect())
    else:
        stream.half_close()


def _told(refused: Refused) -> errors.SomaError:
    observe_refusal(refused.error)
    return errors.from_proto(refused.error)


def _submission(request: SendMessageRequest | StreamTurnRequest, *, deliver: bool) -> Submission:
    key: SessionKey = request.session
    return Submission(
        key.tenant,
        key.agent,
        key.channel,
        key.session,
        request.idempotency_key,
        policy=request.policy,
        deliver=deliver,
    )


def _expired() -> Refused:
    return Refused(
        ErrorReason.ERROR_REASON_UNAUTHENTICATED, "the token of this stream has expired: connect again with a new one"
    )


def _defect() -> Refused:
    return Refused(ErrorReason.ERROR_REASON_INTERNAL, "the gateway has a defect; its log has the details")
