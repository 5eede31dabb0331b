"""Core NATS: what waits here, told to the gateways."""

from __future__ import annotations

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from soma.router.v1.outbound_pb2 import MailboxLoad

from soma_common.nats import subjects

log = structlog.get_logger(__name__)


class NatsLoads:
    """Sends loads; one that cannot leave now is lost, the next one says more."""

    def __init__(self, client: Client, router: str) -> None:
        self._client = client
        self._router = router

    async def send(self, tenant: str, load: MailboxLoad) -> None:
        """Tells all gateways what waits for a tenant."""
        if not self._client.is_connected:
            return
        try:
            await self._client.publish(subjects.load(tenant, self._router), load.SerializeToString())
        except (NatsError, OSError) as error:
            log.debug("router.load_lost", tenant=tenant, error=repr(error))
