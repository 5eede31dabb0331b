"""Looking at running turns over core NATS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import LiveEvent

from soma_common.ids import SessionName
from soma_common.live import LiveHub, Subject
from soma_common.live_merge import Fate, Watched


class NatsWatches:
    """Port `Watches`."""

    def __init__(self, hub: LiveHub) -> None:
        self._hub = hub

    @asynccontextmanager
    async def watch(
        self, key: SessionKey, message_id: bytes, content_hash: bytes, lifetime_s: float
    ) -> AsyncIterator[AsyncIterator[LiveEvent]]:
        """Watches the turn that answers a message."""
        async with self._hub.watch(_subject(key, message_id, content_hash), lifetime_s=lifetime_s) as events:
            yield _without_positions(events)

    async def fate(self, key: SessionKey, message_id: bytes, content_hash: bytes) -> Fate:
        """Waits until it is known what becomes of a stored message."""
        return await self._hub.fate(_subject(key, message_id, content_hash))


def _subject(key: SessionKey, message_id: bytes, content_hash: bytes) -> Subject:
    session = SessionName(key.tenant, key.agent, key.channel, key.session)
    return Subject(session, message_id=message_id, content_hash=content_hash)


async def _without_positions(events: AsyncIterator[Watched]) -> AsyncIterator[LiveEvent]:
    async for event, _ in events:
        yield event
