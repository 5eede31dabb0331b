"""A group commit as rows: what many sessions want written, in one call.

An item writes itself into the rows (`CommitItem.write`), is told when the group is durable (`committed`), or that
its partition's term has ended (`abandoned`). Exactly one of the two is called, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from services.router.domain.partition import Cursor, Partition

if TYPE_CHECKING:
    from services.router.domain.session import Session


class FenceLost(Exception):
    """The caller does not hold these partitions any more. Nothing of the group was written."""

    def __init__(self, partitions: frozenset[int]) -> None:
        super().__init__(f"fenced off partitions {sorted(partitions)}")
        self.partitions = partitions


class TurnConflict(FenceLost):
    """A turn is not as the caller believes: as if its partition were somebody else's. Nothing was written."""


class GroupRejected(Exception):
    """The database refused the group for what is in it. Nothing was written."""


class StoreLost(Exception):
    """The database connection is gone; it is not known whether the last group was written."""


@dataclass(slots=True)
class PartitionMove:
    """Where a partition's row will be after the group."""

    partition: Partition
    head: int
    mail_head: int
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What the store knows of a session at its first new message."""

    turn_count: int
    delivery_count: int
    done_position: int
    paused: bool = False


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What the group did: new messages by (partition, position), those of them with a reused key, sessions, started
    turns.
    """

    inserted: frozenset[tuple[int, int]]
    reused: frozenset[tuple[int, int]]
    sessions: dict[bytes, SessionFacts]
    started: frozenset[bytes]


class CommitItem(Protocol):
    """Something to write under a partition's fence."""

    partition: Partition

    def write(self, group: Group) -> None:
        """Adds its rows to the group."""

    def committed(self, result: GroupResult) -> None:
        """The group is durable."""

    def abandoned(self) -> None:
        """The partition is not this router's any more; nothing was written."""


Rows: TypeAlias = list[tuple[Any, ...]]


@dataclass(slots=True)
class Group:
    """The rows of one call by part, in the order of the parameters of `router.commit_group` and of the fields of their
    types there.
    """

    tenants: set[str] = field(default_factory=set)
    hashes: dict[bytes, bytes] = field(default_factory=dict)
    """Content hash by message id of the messages in this group: the database does not see two of them differ."""
    moves: dict[int, PartitionMove] = field(default_factory=dict)
    delivered: dict[Session, int] = field(default_factory=dict)
    """Number of the last delivery of each session that has one in this group."""
    messages: Rows = field(default_factory=list)
    turns: Rows = field(default_factory=list)
    revisions: Rows = field(default_factory=list)
    dispatches: Rows = field(default_factory=list)
    controls: Rows = field(default_factory=list)
    inputs: Rows = field(default_factory=list)
    refusals: Rows = field(default_factory=list)
    steps: Rows = field(default_factory=list)
    journaled: Rows = field(default_factory=list)
    ends: Rows = field(default_factory=list)
    deliveries: Rows = field(default_factory=list)
    acks: Rows = field(default_factory=list)
    dead: Rows = field(default_factory=list)

    def move(self, partition: Partition) -> PartitionMove:
        """The partition's place in this group; whoever takes a position moves it on."""
        move = self.moves.get(partition.id)
        if move is None:
            move = PartitionMove(partition, partition.head, partition.mail_head, partition.cursor)
            self.moves[partition.id] = move
        return move

    def number_delivery(self, session: Session, deliver: bool) -> int:
        """Number of the session's last delivery, counted up if there is one more."""
        number = self.delivered.get(session, session.delivery_count) + deliver
        self.delivered[session] = number
        return number

    @staticmethod
    def add(rows: Rows, row: tuple[Any, ...]) -> None:
        """Appends a row to a part."""
        rows.append(row)

    def set_aside(
        self, tenant: str, kind: str, partition: int, ref: bytes, reason: int, message: str, payload: bytes
    ) -> None:
        """Adds a dead letter. `message` may be somebody's words, and a text in PostgreSQL holds no NUL."""
        self.dead.append(
            (tenant, kind, partition, ref, reason, message.replace("\0", "\N{REPLACEMENT CHARACTER}"), payload)
        )

    def fence(self) -> Rows:
        """The rows of the fence, in order of partition."""
        rows: Rows = []
        for id_ in sorted(self.moves):
            move = self.moves[id_]
            p = move.partition
            # The floor as it is before the group: it may lag, it may never lead.
            floor = min(p.floor, p.mail_head + 1)
            rows.append(
                (id_, p.term, p.head, move.head, p.mail_head, move.mail_head, floor)
                + (p.cursor.seq, move.cursor.stream, move.cursor.seq, move.cursor.batch),
            )
        return rows

    def settle(self) -> None:
        """Takes the new places over after the commit."""
        for move in self.moves.values():
            p = move.partition
            p.head, p.mail_head, p.cursor = move.head, move.mail_head, move.cursor
        for session, number in self.delivered.items():
            session.delivery_count = number
