"""What one group commit costs: the router's own groups, its schema and its writer, on a PostgreSQL of its own.

    python -m tests.bench commit [--items 1,8,20,60,256] [--rounds 60] [--json FILE]

A round is an echo turn of each of n sessions over 8 partitions, in as many calls as its kind says:

    turn     the messages and the starts of their turns (`start`), then their ends (`end`) with the deliveries of the
             round before acknowledged
    mixed    the same rows, but the ends of one half of the sessions go with the starts of the other half: the groups
             that a router under load makes

The server's CPU is that of the one backend, in nanoseconds from the scheduler, so a busy machine disturbs it little;
the client's is that of this process (parameters, asyncpg, reading the answer). WAL is counted by the server.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final
from uuid import uuid4

import uvloop
from soma.common.v1.turn_pb2 import Delivery
from soma.router.v1.inbound_pb2 import Inbound, InboundKind

from services.router.adapters.store_postgres import PostgresGroupWriter, PostgresLeases
from services.router.application.group import CommitItem, Group
from services.router.application.items import Entry, IngestItem, StartItem
from services.router.application.outcomes import AckItem, EndItem
from services.router.domain.partition import Cursor, Partition
from services.router.domain.session import QueuedMessage, Session, SessionKey, Turn
from services.router.domain.turn import Outcome, StepKind
from services.router.main import MIGRATIONS
from soma_common import ids
from soma_common.embedded.process import descendants
from soma_common.layout import LaneLayout
from soma_common.postgres.connect import Connection, connect
from soma_common.postgres.migrations import apply_migrations
from soma_common.testing.embedded import Database, fresh_database, running_postgres

LAYOUT: Final = LaneLayout(8, 1)
TENANT: Final = "bench"
_WARM: Final = 10
_BODY: Final = b"x" * 120
_CONTENT: Final = b"hello, this is a message of a usual size for a chat"


@dataclass(slots=True)
class Cost:
    """What the calls of one kind and size took: microseconds each, and bytes of WAL in all."""

    wall_us: list[float] = field(default_factory=list)
    server_us: float = 0.0
    client_us: float = 0.0
    wal_bytes: int = 0


class Rig:
    """A writer that holds all partitions, and eyes on what its calls cost."""

    def __init__(self, writer: PostgresGroupWriter, eye: Connection, partitions: list[Partition], backend: int) -> None:
        self._writer = writer
        self._eye = eye
        self.partitions = partitions
        self.backend = backend
        self._seq = 0
        self._named = 0

    @classmethod
    async def open(cls, database: Database) -> Rig:
        """Migrates, takes all partitions, and finds the writer's backend by a first empty group."""
        await apply_migrations(database.owner_dsn("router"), "router", MIGRATIONS)
        leases = PostgresLeases(database.dsn("router"), "bench")
        await leases.ensure_layout(LAYOUT)
        partitions = []
        for number in range(LAYOUT.partitions):
            term = uuid4()
            await leases.acquire(number, term, None)
            partitions.append(Partition(number, term, 1, 0, 0, Cursor(), 0))
        await leases.close()
        writer = PostgresGroupWriter(database.dsn("router"), "bench")
        await writer.commit(Group())
        eye = await connect(database.superuser_dsn)
        backend = await eye.fetchval("SELECT pid FROM pg_stat_activity WHERE application_name = 'bench writer'")
        return cls(writer, eye, partitions, backend)

    async def close(self) -> None:
        """Closes both connections."""
        await self._writer.close()
        await self._eye.close()

    def sessions(self, count: int) -> list[Session]:
        """New sessions, each in the partition of its key."""
        made = []
        for _ in range(count):
            self._named += 1
            key = SessionKey(TENANT, "echo", "load", f"session-{self._named}")
            id_ = ids.session_id(key.tenant, key.agent, key.channel, key.session)
            made.append(Session(id_, key, self.partitions[ids.partition_of(id_, LAYOUT.partitions)], 0, 0))
        return made

    async def wal(self) -> int:
        """Bytes of WAL so far."""
        written = await self._eye.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint")
        return int(written)

    def starts(self, sessions: list[Session]) -> tuple[list[CommitItem], list[Turn]]:
        """The next message of each session, one lane message for all, and the starts of their turns."""
        self._seq += 1
        entries: dict[int, list[Entry]] = {}
        starts: list[CommitItem] = []
        for session in sessions:
            key = session.key
            item = Inbound(
                session_id=session.id,
                message_id=ids.message_id(key.tenant, key.agent, key.channel, key.session, f"key-{self._seq}"),
                content_hash=ids.content_hash(_CONTENT),
                accept_time_ms=self._seq,
                agent=key.agent,
                channel=key.channel,
                session=key.session,
                content=_CONTENT,
                deliver=True,
                kind=InboundKind.INBOUND_KIND_MESSAGE,
            )
            message = QueuedMessage(0, item.message_id, True, 0, "", item.content)
            entries.setdefault(session.partition.id, []).append(Entry(item, message, key.tenant, False))
            turn_id = ids.turn_id(session.id, item.message_id)
            session.turn = Turn(turn_id, session, session.turn_count + 1, [message], "r1", True)
            starts.append(StartItem(session.partition, session.turn, None, True, lambda *_: None))
        mail: list[CommitItem] = [
            IngestItem(self.partitions[number], Cursor("lane", self._seq, f"batch-{self._seq}"), held, lambda *_: None)
            for number, held in entries.items()
        ]
        return mail + starts, [session.turn for session in sessions if session.turn is not None]

    async def call(self, items: Iterable[CommitItem], cost: Cost | None) -> None:
        """Writes one group; adds what it took."""
        group = Group()
        for item in items:
            item.write(group)
        before, used, began = _on_cpu_ns(self.backend), time.process_time_ns(), time.perf_counter_ns()
        await self._writer.commit(group)
        took, used_after = time.perf_counter_ns() - began, time.process_time_ns()
        if cost is not None:
            cost.wall_us.append(took / 1000)
            cost.server_us += (_on_cpu_ns(self.backend) - before) / 1000
            cost.client_us += (used_after - used) / 1000
        group.settle()


def _on_cpu_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def _ends(turns: list[Turn]) -> list[EndItem]:
    steps = [(StepKind.FINAL, _BODY)]
    return [EndItem(turn.session.partition, turn, Outcome.FINAL, steps, Delivery(), lambda *_: None) for turn in turns]


def _settle(ends: list[EndItem]) -> list[CommitItem]:
    """What follows ends in memory; returns the acknowledgements of their deliveries."""
    for end in ends:
        end.turn.session.turn_count += 1
    return [AckItem(end.partition, end.position, TENANT) for end in ends]


async def _turns(rig: Rig, n: int, rounds: int) -> dict[str, Cost]:
    sessions = rig.sessions(n)
    costs = {"start": Cost(), "end": Cost()}
    acks: list[CommitItem] = []
    before = 0
    for number in range(-_WARM, rounds):
        if number == 0:
            before = await rig.wal()
        items, turns = rig.starts(sessions)
        await rig.call(items, costs["start"] if number >= 0 else None)
        ends = _ends(turns)
        await rig.call([*ends, *acks], costs["end"] if number >= 0 else None)
        acks = _settle(ends)
    costs["end"].wal_bytes = await rig.wal() - before
    return costs


async def _mixed(rig: Rig, n: int, rounds: int) -> dict[str, Cost]:
    half = max(1, n // 2)
    sides = [rig.sessions(half), rig.sessions(half)]
    cost, acks, running = Cost(), [], []  # type: tuple[Cost, list[CommitItem], list[Turn]]
    before = 0
    for number in range(-_WARM, rounds):
        if number == 0:
            before = await rig.wal()
        items, turns = rig.starts(sides[number % 2])
        ends = _ends(running)
        await rig.call([*items, *ends, *acks], cost if number >= 0 else None)
        acks, running = _settle(ends), turns
    cost.wal_bytes = await rig.wal() - before
    return {"mixed": cost}


async def measure(items: list[int], rounds: int, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of the table: kind, n, and what a call costs; `per_turn` values are for one turn of one session."""
    rows: list[dict[str, Any]] = []
    show("kind      n  wall p50 us  server us  client us  server us/turn  WAL B/turn")
    with tempfile.TemporaryDirectory(prefix="soma-commit-") as directory:
        async with running_postgres(Path(directory), durable=True) as server, fresh_database(server) as database:
            rig = await Rig.open(database)
            assert rig.backend in [process.pid for process in descendants(server.process.pid)]
            for n in items:
                found = await _turns(rig, n, rounds)
                turns = n * rounds
                per_turn = sum(cost.server_us for cost in found.values()) / turns
                found |= await _mixed(rig, n, rounds)
                for kind, cost in found.items():
                    calls = len(cost.wall_us)
                    each = max(1, n // 2) * rounds if kind == "mixed" else turns
                    row: dict[str, Any] = {
                        "kind": kind,
                        "n": n,
                        "wall_p50_us": median(cost.wall_us),
                        "server_us": cost.server_us / calls,
                        "client_us": cost.client_us / calls,
                        "server_us_per_turn": cost.server_us / each if kind == "mixed" else per_turn,
                        "wal_bytes_per_turn": cost.wal_bytes / each,
                    }
                    rows.append(row)
                    show("{kind:<6} {n:>4} {wall_p50_us:>12.0f} {server_us:>10.0f} {client_us:>10.0f}"
                         " {server_us_per_turn:>15.1f} {wal_bytes_per_turn:>11.0f}".format(**row))  # fmt: skip
            await rig.close()
    return rows


def main(arguments: list[str], show: Callable[[str], None]) -> bool:
    """Measures and shows; returns True."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench commit", description=__doc__)
    parser.add_argument("--items", default="1,8,20,60,256", help="sizes of groups, in sessions")
    parser.add_argument("--rounds", type=int, default=60, help="calls of each kind and size")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    chosen = parser.parse_args(arguments)
    rows = uvloop.run(measure([int(n) for n in chosen.items.split(",")], chosen.rounds, show))
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")
    return True


if __name__ == "__main__":
    main([], print)
