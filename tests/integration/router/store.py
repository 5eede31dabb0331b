"""The router's real tables, written as the router writes them and looked at from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from soma.common.v1.turn_pb2 import Delivery
from soma.router.v1.inbound_pb2 import Inbound

from services.router.adapters.history_postgres import PostgresHistory
from services.router.adapters.store_postgres import PostgresGroupWriter, PostgresLeases
from services.router.application.group import CommitItem, GroupResult
from services.router.application.items import ControlItem, StartItem, StepItem
from services.router.application.outcomes import EndItem
from services.router.application.ports import PendingRow
from services.router.domain.partition import Cursor, Partition
from services.router.domain.session import Session, Turn
from services.router.domain.turn import Outcome, StepKind
from services.router.main import MIGRATIONS
from soma_common.layout import LaneLayout
from soma_common.postgres.connect import Connection, connect
from soma_common.postgres.migrations import apply_migrations
from soma_common.testing.embedded import Database
from tests.unit.router.builders import PARTITIONS, a_session, a_turn, group_of, ingest

LAYOUT = LaneLayout(PARTITIONS, 1)


@dataclass(slots=True)
class Store:
    """One router's hands (`writer`, `leases`, `history`), and eyes that no policy binds (`eye`)."""

    database: Database
    writer: PostgresGroupWriter
    leases: PostgresLeases
    history: PostgresHistory
    eye: Connection

    async def take(self, number: int, router: str = "router-0", seen: UUID | None = None) -> Partition:
        """Takes a partition as `router`, which has to be possible."""
        leases = PostgresLeases(self.database.dsn("router"), router)
        term = uuid4()
        row = await leases.acquire(number, term, seen)
        await leases.close()
        assert row is not None, f"partition {number} cannot be taken"
        cursor = Cursor(row.cursor_stream, row.cursor_seq, row.cursor_batch)
        return Partition(number, term, row.epoch, row.head, row.mail_head, cursor, row.cursor_seq)

    async def commit(self, *items: CommitItem, writer: PostgresGroupWriter | None = None) -> GroupResult:
        """Writes a group, then takes the new places over and notes what is without an outcome, as the router does."""
        group = group_of(*items)
        result = await (writer or self.writer).commit(group)
        group.settle()
        for number, position in sorted(result.inserted):
            group.moves[number].partition.pending.add(position)
        for item in items:
            ended = [message.position for message in item.turn.inputs] if isinstance(item, EndItem) else []
            for position in item.positions if isinstance(item, ControlItem) else ended:
                item.partition.pending.discard(position)
        return result

    async def started(
        self, partition: Partition, item: Inbound, seq: int, tenant: str = "demo"
    ) -> tuple[Session, Turn]:
        """A session whose first message is in the mailbox and whose turn has started."""
        session = a_session(partition, item.session, tenant=tenant)
        mail = ingest(partition, seq, item, tenant=tenant)
        turn = a_turn(session, mail.entries[0].message)
        result = await self.commit(mail, start(turn))
        assert result.started == {turn.id}
        return session, turn

    async def load(self, partition: Partition, strike: bool = False) -> list[PendingRow]:
        """What a new owner of the partition gets to know."""
        rows: list[PendingRow] = []
        await self.leases.load(partition.id, partition.term, strike, rows.extend)
        return rows

    async def rows(self, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
        """All rows of a table, whoever they belong to."""
        return [tuple(row) for row in await self.eye.fetch(f"SELECT {columns} FROM router.{table} ORDER BY 1, 2")]

    async def partition_row(self, number: int) -> tuple[int, int, str, int, str]:
        """(head, mail_head, cursor_stream, cursor_seq, cursor_batch) of a partition."""
        row = await self.eye.fetchrow(
            "SELECT head, mail_head, cursor_stream, cursor_seq, cursor_batch FROM router.partitions WHERE id = $1",
            number,
        )
        assert row is not None
        return tuple(row)


def start(turn: Turn, fresh: bool = True) -> StartItem:
    """The start of a turn; `fresh`: in the group of its message."""
    return StartItem(turn.session.partition, turn, b"spec", fresh, lambda *_: None)


def step(turn: Turn, kind: StepKind = StepKind.MODEL_REPLY, body: bytes = b"body") -> StepItem:
    """The next step of a turn."""
    return StepItem(turn.session.partition, turn, kind, body, lambda *_: None)


def end(turn: Turn, outcome: Outcome = Outcome.FINAL, body: bytes = b"") -> EndItem:
    """The end of a turn with its last step."""
    return EndItem(turn.session.partition, turn, outcome, [(StepKind.FINAL, body)], Delivery(), lambda *_: None)


@asynccontextmanager
async def open_store(database: Database, router: str = "router-0") -> AsyncIterator[Store]:
    """Migrates as the owner of the schema, then works as the service's role."""
    await apply_migrations(database.owner_dsn("router"), "router", MIGRATIONS)
    leases = PostgresLeases(database.dsn("router"), router)
    assert await leases.ensure_layout(LAYOUT) == LAYOUT.metadata()
    writer = PostgresGroupWriter(database.dsn("router"), router)
    history = await PostgresHistory.open(database.dsn("router"), router)
    eye = await connect(database.superuser_dsn)
    try:
        yield Store(database, writer, leases, history, eye)
    finally:
        for closing in (writer.close(), leases.close(), history.close(), eye.close()):
            await closing
