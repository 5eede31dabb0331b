"""Looking at running turns over core NATS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.aio.client import Client
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import LiveEvent

from services.gateway.application.ports import SlowWatcher
from soma_common.errors import ResourceExhausted
from soma_common.ids import SessionName
from soma_common.live import LiveWatcher


class NatsWatches:
    """Port `Watches`."""

    def __init__(self, nc: Client, partitions: int) -> None:
        self._nc = nc
        self._partitions = partitions

    @asynccontextmanager
    async def watch(
        self, key: SessionKey, message_id: bytes, content_hash: bytes
    ) -> AsyncIterator[AsyncIterator[LiveEvent]]:
        """Watches the turn that answers a message."""
        session = SessionName(key.tenant, key.agent, key.channel, key.session)
        watcher = LiveWatcher(
            self._nc, session, partitions=self._partitions, message_id=message_id, content_hash=content_hash
        )
        async with watcher as events:
            yield _translated(events)


async def _translated(events: AsyncIterator[LiveEvent]) -> AsyncIterator[LiveEvent]:
    try:
        async for event in events:
            yield event
    except ResourceExhausted as error:
        raise SlowWatcher(error.message) from error
