"""A lane on a real NATS server, read by a real LaneReader and Ingest into a mailbox that is a list."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import StreamState
from soma.router.v1.inbound_pb2 import InBatch, Inbound

from services.router.adapters.inbound_nats import LaneReader
from services.router.application.group import CommitItem
from services.router.application.ingest_messages import Ingest
from services.router.application.items import CursorItem, DeadItem, IngestItem
from services.router.application.state import RouterState
from services.router.domain.lane_window import LaneWindow
from services.router.domain.partition import Cursor, Partition
from soma_common import ids
from soma_common.layout import BATCH_FORMAT, LaneLayout
from soma_common.nats import subjects
from soma_common.nats.connection import connect_nats
from soma_common.nats.lanes import ensure_lanes, stream_name
from soma_common.testing.embedded import FaultyNats
from tests.unit.router.builders import PARTITIONS, a_partition, inbound
from tests.unit.router.engine import Directory

LAYOUT = LaneLayout(PARTITIONS, 1)


class Mailbox:
    """Stands where the group commit is: `got` has the contents by partition in the order written, retries included.

    While `stalled`, nothing is committed, as when PostgreSQL does not answer.
    """

    def __init__(self) -> None:
        self.got: defaultdict[int, list[bytes]] = defaultdict(list)
        self.dead: list[DeadItem] = []
        self.waiting: list[CommitItem] = []
        self.stalled = False
        self.ingest: Ingest

    def put(self, item: CommitItem) -> None:
        self.waiting.append(item)
        if not self.stalled:
            self.commit()

    def commit(self) -> None:
        """Commits what waits."""
        items, self.waiting = self.waiting, []
        for item in items:
            if item.partition.lost:
                item.abandoned()
            elif isinstance(item, IngestItem):
                self.got[item.partition.id] += [entry.inbound.content for entry in item.entries]
                assert item.cursor is not None
                item.partition.cursor = item.cursor
                self.ingest.backlog -= 1
            elif isinstance(item, CursorItem):
                item.partition.cursor = item.cursor
            elif isinstance(item, DeadItem):
                self.dead.append(item)

    def all(self) -> list[bytes]:
        """Every content of every partition."""
        return [content for contents in self.got.values() for content in contents]


@dataclass(slots=True)
class Lane:
    """The lane, its reader, and who publishes to it."""

    server: FaultyNats
    client: Client
    js: JetStreamContext
    state: RouterState
    mailbox: Mailbox
    ingest: Ingest
    reader: LaneReader
    sent: list[bytes] = field(default_factory=list)

    def own(self, number: int, cursor: Cursor | None = None) -> Partition:
        """Takes a partition as ownership does: it is there first, and then attached."""
        partition = a_partition(number)
        partition.known_seq = None
        if cursor is not None:
            partition.cursor, partition.read_seq = cursor, cursor.seq
        self.state.partitions[number] = partition
        return partition

    def attach(self, partition: Partition) -> None:
        """Has the lane read for it."""
        self.reader.attach(partition)

    async def send(self, *items: Inbound, tenant: str = "demo") -> Cursor:
        """Publishes a batch as a gateway does; returns its place."""
        batch_id = uuid4().hex
        batch = InBatch(format=BATCH_FORMAT, tenant=tenant, items=items)
        ack = await self.js.publish(
            subjects.inbound(tenant, 0), batch.SerializeToString(), headers={"Nats-Msg-Id": batch_id}
        )
        self.sent += [item.content for item in items]
        info = await self.js.stream_info(stream_name(0))
        return Cursor(str(info.created), ack.seq, batch_id)

    async def send_many(self, session: str, first: int, count: int) -> list[Cursor]:
        """Publishes `count` messages of a session, each in a batch of its own, with the content of their number."""
        return [await self.send(inbound(session, f"k{n}", str(n).encode())) for n in range(first, first + count)]

    async def stream(self) -> StreamState:
        """What the stream holds."""
        return (await self.js.stream_info(stream_name(0))).state


def partition_of(session: str, tenant: str = "demo") -> int:
    """The partition of a session of these tests."""
    return ids.partition_of(inbound(session, tenant=tenant).session_id, PARTITIONS)


@asynccontextmanager
async def running_lane(server: FaultyNats, backlog: int = 512) -> AsyncIterator[Lane]:
    """A lane and its reader, which runs until the end."""
    client = await connect_nats(server.url, server.token_file, "router-0")
    js = client.jetstream(timeout=2.0)
    await ensure_lanes(js, LAYOUT, 100_000)
    mailbox = Mailbox()
    state = RouterState(LAYOUT, cast(Any, Directory()), 10, 10)
    ingest = Ingest(state, cast(Any, SimpleNamespace(starter=None, arrivals=None, controls=None)))
    reader = LaneReader(client, js, state, ingest, 0, backlog, LaneWindow(0.0, 1000, 1024**3), 100_000)
    mailbox.ingest = ingest
    ingest.committer = reader.committer = cast(Any, mailbox)
    running = asyncio.create_task(reader.run())
    try:
        yield Lane(server, client, js, state, mailbox, ingest, reader)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()
