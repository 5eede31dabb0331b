"""The router's exchange on a real bus: what is large goes in pieces, what is too large costs nobody else anything."""

import asyncio

import nats
from nats.aio.msg import Msg
from soma.common.v1.turn_pb2 import LiveEvent, TextDelta
from soma.router.v1.outbound_pb2 import LiveBatch

from services.router.adapters.exchange_nats import NatsOutbox
from soma_common.nats import subjects
from soma_common.nats.connection import connect_nats
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually

SESSION, OTHER = b"s" * 16, b"o" * 16


async def test_live_events_of_one_session_that_are_large_together_all_arrive(nats_server: FaultyNats) -> None:
    watcher = await nats.connect(nats_server.url, token=nats_server.token)
    heard: dict[str, list[int]] = {}

    async def hear(message: Msg) -> None:
        batch = LiveBatch.FromString(message.data)
        heard.setdefault(message.subject, []).extend(event.step for event in batch.events)

    await watcher.subscribe(subjects.live("*", SESSION), cb=hear)
    await watcher.subscribe(subjects.live("*", OTHER), cb=hear)
    await watcher.flush()
    client = await connect_nats(nats_server.url, nats_server.token_file, "router-0")
    outbox = NatsOutbox(client, "router-0", lambda: True)
    for step in range(12):
        _say(outbox, SESSION, step, "x" * 256_000)
    _say(outbox, b"too large to".ljust(16), 1, "x" * 2_000_000)
    _say(outbox, OTHER, 1, "small")
    publishing = asyncio.create_task(outbox.run())
    try:
        await eventually(lambda: len(heard) == 2)
        await eventually(lambda: heard[subjects.live("demo", SESSION)] == list(range(12)))
        assert heard[subjects.live("demo", OTHER)] == [1]
        assert not publishing.done()
    finally:
        publishing.cancel()
        await client.close()
        await watcher.close()


def _say(outbox: NatsOutbox, session: bytes, step: int, text: str) -> None:
    outbox.for_watchers("demo", session).MergeFrom(LiveEvent(step=step, text=TextDelta(text=text)))
