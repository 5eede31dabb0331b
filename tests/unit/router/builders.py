"""Small pieces of the turn engine, as tests need them: an accepted message, a partition, a session, a turn."""

from __future__ import annotations

from itertools import count
from uuid import uuid4

from soma.router.v1.inbound_pb2 import Inbound, InboundKind

from services.router.application.group import CommitItem, Group, GroupResult
from services.router.application.items import Entry, IngestItem
from services.router.domain.partition import Cursor, Partition
from services.router.domain.session import QueuedMessage, Session, SessionKey, Turn
from soma_common import ids

TENANT = "demo"
AGENT = "echo"
CHANNEL = "line"
PARTITIONS = 8
STREAM = "2026-01-01 00:00:00"
"""Incarnation of the lane's stream."""


def inbound(session: str = "s", key: str = "k", content: bytes = b"hi", *, tenant: str = TENANT) -> Inbound:
    """An accepted message with the ids that a gateway derives."""
    return Inbound(
        session_id=ids.session_id(tenant, AGENT, CHANNEL, session),
        message_id=ids.message_id(tenant, AGENT, CHANNEL, session, key),
        content_hash=ids.content_hash(content),
        accept_time_ms=1,
        agent=AGENT,
        channel=CHANNEL,
        session=session,
        content=content,
        deliver=True,
        kind=InboundKind.INBOUND_KIND_MESSAGE,
    )


def cancel(session: str = "s", key: str = "cancel", target: bytes = b"", *, tenant: str = TENANT) -> Inbound:
    """An accepted cancel of `target`, or of whatever runs."""
    item = inbound(session, key, b"", tenant=tenant)
    item.kind = InboundKind.INBOUND_KIND_CANCEL
    item.cancel_turn_id = target
    return item


def names_in(partition: int, how_many: int, *, tenant: str = TENANT, partitions: int = PARTITIONS) -> list[str]:
    """Names of sessions that belong to a partition."""
    found: list[str] = []
    for number in count():
        name = f"s{number}"
        if ids.partition_of(ids.session_id(tenant, AGENT, CHANNEL, name), partitions) == partition:
            found.append(name)
        if len(found) == how_many:
            return found
    raise AssertionError


def a_partition(number: int = 0) -> Partition:
    """A partition just taken, with nothing in it, whose lane was empty."""
    return Partition(id=number, term=uuid4(), epoch=1, head=0, mail_head=0, cursor=Cursor(), read_seq=0, known_seq=0)


def entry(item: Inbound, tenant: str = TENANT) -> Entry:
    """An item on its way into the mailbox."""
    message = QueuedMessage(0, item.message_id, item.deliver, 0, item.traceparent, item.content)
    return Entry(item, message, tenant, item.kind == InboundKind.INBOUND_KIND_CANCEL)


def ingest(partition: Partition, seq: int, *items: Inbound, tenant: str = TENANT, stream: str = STREAM) -> IngestItem:
    """What one lane message holds for a partition."""
    return IngestItem(
        partition, Cursor(stream, seq, f"batch-{seq}"), [entry(item, tenant) for item in items], lambda *_: None
    )


def a_session(partition: Partition, name: str = "s", *, tenant: str = TENANT, agent: str = AGENT) -> Session:
    """A session without a past."""
    key = SessionKey(tenant, agent, CHANNEL, name)
    session = Session(ids.session_id(tenant, agent, CHANNEL, name), key, partition, 0, 0)
    partition.sessions[session.id] = session
    return session


def a_turn(session: Session, message: QueuedMessage, revision: str = "r1") -> Turn:
    """The session's next turn."""
    turn_id = ids.turn_id(session.id, message.message_id)
    turn = Turn(turn_id, session, session.turn_count + 1, [message], revision, message.deliver)
    session.turn = turn
    return turn


def group_of(*items: CommitItem) -> Group:
    """The group of these items, as the committer makes it."""
    group = Group()
    for item in items:
        item.write(group)
    return group


NOTHING = GroupResult(frozenset(), frozenset(), {}, frozenset())
"""What a group did that held no messages and no starts."""
