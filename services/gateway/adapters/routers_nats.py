"""The way to and from the routers over core NATS: deliveries and live events in, acks and presence out."""

from __future__ import annotations

from collections.abc import Callable

import nats.errors
import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from soma.router.v1.outbound_pb2 import AckBatch, OutBatch, Presence

from services.gateway.application.ports import BusSilent
from soma_common.nats import subjects
from soma_common.telemetry import spans

PENDING_BYTES = 64 * 1024 * 1024
"""Handed over and not yet looked at; over it NATS drops, and the routers hand over again."""

_log = structlog.get_logger(__name__)


class NatsRouters:
    """Port `Routers`."""

    def __init__(self, nc: Client, gateway: str) -> None:
        self._nc = nc
        self._gateway = gateway

    @property
    def losses(self) -> int:
        """How often the connection was lost and made again."""
        return self._nc.stats["reconnects"]

    async def send_acks(self, tenant: str, router: str, batch: AckBatch) -> None:
        """Tells a router what became of its deliveries. Raises BusSilent."""
        await self._publish(subjects.acks(tenant, router), batch.SerializeToString())

    async def announce(self, tenant: str, presence: Presence) -> None:
        """Tells all routers which streams of a tenant are here. Raises BusSilent."""
        await self._publish(subjects.presence(tenant, self._gateway), presence.SerializeToString())

    async def listen(self, hand_over: Callable[[str, OutBatch], None]) -> Subscription:
        """Gives every batch of every tenant to `hand_over`, with the tenant its subject names."""

        async def on_batch(message: Msg) -> None:
            try:
                batch = OutBatch.FromString(message.data)
            except DecodeError:
                _log.error("out.undecodable", subject=message.subject, bytes=len(message.data))
                return
            if spans.watched:
                spans.begin(handover.delivery.turn_id for handover in batch.deliveries)
            hand_over(subjects.tenant_of(message.subject), batch)

        return await self._nc.subscribe(
            subjects.outbound("*", self._gateway), cb=on_batch, pending_bytes_limit=PENDING_BYTES
        )

    async def _publish(self, subject: str, payload: bytes) -> None:
        # News of now: what cannot leave now is not worth keeping for later.
        if not self._nc.is_connected:
            raise BusSilent
        try:
            await self._nc.publish(subject, payload)
        except (nats.errors.Error, OSError) as error:
            raise BusSilent from error
