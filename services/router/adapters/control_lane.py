"""Controls on their way to a session: through its lane, behind every message accepted before."""

from __future__ import annotations

from typing import Final
from uuid import uuid4

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.errors import APIError
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.router.v1.inbound_pb2 import InBatch, Inbound, InboundKind

from soma_common import ids
from soma_common.clock import now_ms
from soma_common.errors import ResourceExhausted, Unavailable
from soma_common.ids import SessionName
from soma_common.layout import BATCH_FORMAT, LaneLayout
from soma_common.nats import subjects

_TIMEOUT_S: Final = 2.0
_BOUND_REACHED: Final = 10077
"""JetStream's error code for a stream or subject that is full."""


class ControlLane:
    """Stores items in the lanes for callers of the API. What is stored is applied, whatever dies."""

    def __init__(self, js: JetStreamContext, layout: LaneLayout) -> None:
        self._js = js
        self._layout = layout

    async def control(
        self, session: SessionName, kind: InboundKind.ValueType, request_id: str, target: bytes = b""
    ) -> bytes:
        """Stores a control of a session; `target` is the turn that it names. The same kind and request id mean the
        same control. Returns its message id; raises Unavailable or ResourceExhausted.
        """
        verb = InboundKind.Name(kind).removeprefix("INBOUND_KIND_").lower()
        item = self._item(session, f"{verb}/{request_id}", target)
        item.kind = kind
        item.cancel_turn_id = target
        await self._store(session, item)
        return item.message_id

    async def message(self, session: SessionName, key: str, content: bytes) -> bytes:
        """Stores a message of the platform, `content` being a serialized Message. Returns its id; raises as above."""
        item = self._item(session, key, content)
        item.kind = InboundKind.INBOUND_KIND_MESSAGE
        item.content = content
        item.deliver = True
        await self._store(session, item)
        return item.message_id

    def _item(self, session: SessionName, key: str, hashed: bytes) -> Inbound:
        return Inbound(
            session_id=session.id,
            message_id=self._layout.message_id(session.tenant, session.agent, session.channel, session.session, key),
            content_hash=ids.content_hash(hashed),
            accept_time_ms=now_ms(),
            agent=session.agent,
            channel=session.channel,
            session=session.session,
        )

    async def _store(self, session: SessionName, item: Inbound) -> None:
        lane = self._layout.lane_of(item.session_id)
        batch = InBatch(format=BATCH_FORMAT, tenant=session.tenant, items=[item])
        try:
            await self._js.publish(
                subjects.inbound(session.tenant, lane),
                batch.SerializeToString(),
                timeout=_TIMEOUT_S,
                headers={"Nats-Msg-Id": uuid4().hex},
            )
        except APIError as error:
            if error.err_code == _BOUND_REACHED:
                raise ResourceExhausted(
                    ErrorReason.ERROR_REASON_QUEUE_FULL,
                    "the tenant has as many accepted items waiting as it may; nothing was stored",
                    {"bound": "lane"},
                    retry_delay_s=1.0,
                ) from error
            raise _unknown() from error
        except (NatsError, OSError, TimeoutError) as error:
            raise _unknown() from error


def _unknown() -> Unavailable:
    return Unavailable(
        ErrorReason.ERROR_REASON_BUS_UNAVAILABLE,
        "it is not known whether the request was stored: retry with the same request_id",
        retry_delay_s=1.0,
    )
