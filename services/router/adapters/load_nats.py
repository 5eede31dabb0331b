"""Core NATS: what waits here and how far the lanes are taken in, told to the gateways."""

from __future__ import annotations

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from soma.router.v1.outbound_pb2 import LaneProgress, MailboxLoad

from soma_common.nats import subjects

log = structlog.get_logger(__name__)


class NatsLoads:
    """Sends loads; one that cannot leave now is lost, the next one says more."""

    def __init__(self, client: Client, router: str) -> None:
        self._client = client
        self._router = router

    async def send(self, tenant: str, load: MailboxLoad) -> None:
        """Tells all gateways what waits for a tenant."""
        await self._publish(subjects.load(tenant, self._router), load.SerializeToString())

    async def send_progress(self, progress: LaneProgress) -> None:
        """Tells all gateways how far a lane is taken in."""
        await self._publish(subjects.progress(progress.lane), progress.SerializeToString())

    async def _publish(self, subject: str, payload: bytes) -> None:
        if not self._client.is_connected:
            return
        try:
            await self._client.publish(subject, payload)
        except (NatsError, OSError) as error:
            log.debug("router.load_lost", subject=subject, error=repr(error))
