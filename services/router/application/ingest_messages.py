"""Takes accepted messages from the lanes into the mailbox: each exactly once, in the order accepted, whatever they
hold.

Ingest is total: nothing in an item may stop a partition. What cannot be read goes to the dead letters, what cannot be
answered ends with a typed error, and a retry changes nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog
from google.protobuf.message import DecodeError
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.router.v1.inbound_pb2 import InBatch, Inbound, InboundKind

from services.router.application.group import CommitItem, GroupResult
from services.router.application.items import KEY_REUSED, CursorItem, DeadItem, Entry, IngestItem, StartItem
from services.router.domain.arrival import Policy
from services.router.domain.partition import Cursor, Partition
from services.router.domain.session import QueuedMessage, Session, SessionKey
from soma_common import ids
from soma_common.clock import monotonic
from soma_common.layout import BATCH_FORMAT
from soma_common.telemetry import spans
from soma_common.telemetry.metrics import counter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from services.router.application.commit_group import GroupCommitter
    from services.router.application.run_turns import TurnRunner
    from services.router.application.state import RouterState

log = structlog.get_logger(__name__)

DEFAULT_DEBOUNCE_MS: Final = 300
DEFAULT_DEBOUNCE_MAX_MS: Final = 2000
_MESSAGE: Final = InboundKind.INBOUND_KIND_MESSAGE
_CONTROLS: Final = frozenset(
    {
        InboundKind.INBOUND_KIND_CANCEL,
        InboundKind.INBOUND_KIND_INTERRUPT,
        InboundKind.INBOUND_KIND_CANCEL_ALL,
        InboundKind.INBOUND_KIND_PAUSE,
        InboundKind.INBOUND_KIND_RESUME,
    }
)

INGESTED = counter("soma_router_messages_total", "Messages taken into the mailbox.")
DUPLICATES = counter("soma_router_duplicates_total", "Accepted items that were known already.")
UNREADABLE = counter("soma_router_unreadable_total", "Inbound items that could not be read.")


class Ingest:
    """Lane messages in, ingest items out."""

    def __init__(self, state: RouterState, runner: TurnRunner) -> None:
        self._state = state
        self._runner = runner
        self._starter = runner.starter
        self._arrivals = runner.arrivals
        self._controls = runner.controls
        self._passed_over: set[bytes] = set()
        """Sessions of which something in the group that is written, or in the next, has to wait: what comes after it
        there waits behind it.
        """
        self._group_is_open = False
        """Turns of the next group may have been started already."""
        self._has_spare_room = False
        """Nothing of the group that is being written waits for room: others may take what there is."""
        self.on_taken_in: Callable[[], None] = lambda: None
        """Called when something of a lane is in the mailbox."""
        self.backlog = 0
        """Lane messages that are read and not committed; the reader asks for more only below its bound."""
        self.committer: GroupCommitter

    def on_message(self, lane: int, subject_tenant: str, stream: str, seq: int, batch_id: str, data: bytes) -> None:
        """Takes one lane message, in order of `seq`; parts of it that were taken before are skipped."""
        owned = self._state.partitions
        cursor = Cursor(stream, seq, batch_id)
        batch = InBatch()
        try:
            batch.ParseFromString(data)
            problem = "" if batch.format == BATCH_FORMAT else f"batch format {batch.format} is not known"
            reason = ErrorReason.ERROR_REASON_SCHEMA_UNKNOWN
        except DecodeError as error:
            problem, reason = f"not an InBatch: {error}", ErrorReason.ERROR_REASON_ITEM_CORRUPT
            batch.Clear()
        if not ids.is_slug(subject_tenant):
            # No tenant can have such a name, and no row can be written for it: the subject is not one of ours.
            log.error("router.lane_message_without_tenant", tenant=subject_tenant, seq=seq)
            UNREADABLE.inc()
            return
        if problem:
            self._set_aside(lane, subject_tenant, cursor, reason, problem, data)
            return
        entries: dict[int, list[Entry]] = {}
        partitions = self._state.layout.partitions
        for inbound in batch.items:
            number = ids.partition_of(inbound.session_id, partitions)
            partition = owned.get(number)
            if partition is None or not partition.attached or seq <= partition.read_seq:
                continue
            if _is_addressed(inbound, subject_tenant, partition.sessions.get(inbound.session_id)):
                entries.setdefault(number, []).append(self._entry(inbound, subject_tenant))
            else:
                # Nobody to answer: no session can be named.
                UNREADABLE.inc()
                entries.setdefault(number, [])
                reason, problem = ErrorReason.ERROR_REASON_ITEM_CORRUPT, "the item names no valid session or message"
                ref = inbound.message_id or batch_id.encode()
                dead = DeadItem(partition, subject_tenant, ref, reason, problem, inbound.SerializeToString())
                self.committer.put(dead)
        for number, found in entries.items():
            partition = owned[number]
            partition.read_seq = seq
            self.backlog += 1
            self.committer.put(IngestItem(partition, cursor, found, self._ingested))

    def _set_aside(self, lane: int, tenant: str, cursor: Cursor, reason: int, problem: str, data: bytes) -> None:
        """A whole lane message cannot be read: it goes to the dead letters of one partition of the lane, once."""
        UNREADABLE.inc()
        log.error("router.lane_message_unreadable", tenant=tenant, seq=cursor.seq, problem=problem)
        for partition in sorted(self._state.partitions.values(), key=lambda p: p.id):
            if ids.lane_of(partition.id, self._state.layout.lanes) != lane:
                continue  # its cursor counts another lane's messages
            if partition.attached and partition.read_seq < cursor.seq:
                partition.read_seq = cursor.seq
                self.committer.put(DeadItem(partition, tenant, cursor.batch.encode(), reason, problem, data))
                self.committer.put(CursorItem(partition, cursor))
                return

    def _entry(self, inbound: Inbound, tenant: str) -> Entry:
        is_control = inbound.kind in _CONTROLS
        fault = 0
        if not is_control and inbound.kind != _MESSAGE:
            fault = ErrorReason.ERROR_REASON_SCHEMA_UNKNOWN
            inbound.kind = _MESSAGE
        if not 0 <= inbound.policy <= Policy.REJECT:
            fault = ErrorReason.ERROR_REASON_SCHEMA_UNKNOWN
            inbound.policy = ArrivalPolicy.ARRIVAL_POLICY_UNSPECIFIED
        message = QueuedMessage(
            0,
            inbound.message_id,
            inbound.deliver,
            int(fault),
            inbound.traceparent,
            inbound.content,
            size=len(inbound.content),
        )
        if message.traceparent:
            spans.follow_message(message.traceparent, inbound.session_id, message.message_id)
        if not is_control:
            self._set_policy(message, inbound, tenant)
        return Entry(inbound, message, tenant, is_control)

    def _set_policy(self, message: QueuedMessage, inbound: Inbound, tenant: str) -> None:
        """The message's own policy, or its agent's as it is now: it is stored with the message."""
        agent = self._state.directory.agent(tenant, inbound.agent)
        if agent is None:
            message.policy = inbound.policy or Policy.ENQUEUE
            return
        spec = agent.spec
        message.policy = inbound.policy or spec.arrival_policy or Policy.ENQUEUE
        if message.policy == Policy.ACCUMULATE:
            debounce_ms = spec.debounce_ms or DEFAULT_DEBOUNCE_MS
            message.debounce_s = debounce_ms / 1000
            message.debounce_max_s = max(spec.debounce_max_ms or DEFAULT_DEBOUNCE_MAX_MS, debounce_ms) / 1000

    def compose(self, items: list[CommitItem]) -> None:
        """Adds turn starts to a group: those of its own messages whose session is idle, then those of waiting
        sessions.
        """
        if self._group_is_open:
            self._starter.count_room()  # since the look ahead, places may have become free
        else:
            self._starter.open_group()
        self._group_is_open = False
        passed_over = self._passed_over = set()
        for item in list(items):
            if isinstance(item, IngestItem) and not item.partition.lost:
                for entry in item.entries:
                    session_id = entry.inbound.session_id
                    if entry.is_control or session_id in passed_over:
                        passed_over.add(session_id)
                        continue
                    session = self._state.session(item.partition, session_id)
                    if session is not None and session.answers(entry.message):
                        continue  # since `look_ahead`
                    start = self._starter.start_now(session, entry.message)
                    if start is not None:
                        items.append(start)
                    else:
                        passed_over.add(session_id)
        items.extend(self._starter.start_waiting())
        left_some = self._starter.left_some
        self._has_spare_room = self._starter.has_room and not left_some
        if left_some:
            self.committer.nudge()

    def look_ahead(self, items: Iterable[IngestItem]) -> list[StartItem]:
        """While a group is being written: starts turns of messages that have come meanwhile and go with the next one.
        Brains get them at once. What has to wait for anything in the present group is left to `compose`.
        """
        if not (self._has_spare_room and self._runner.starts_ahead):
            return []
        if not self._group_is_open:
            self._starter.open_group()
            self._group_is_open = True
        starts: list[StartItem] = []
        for item in items:
            waits = item.partition.lost or not _is_read_first_here(item)
            for entry in item.entries:
                session_id = entry.inbound.session_id
                start = None
                if not (waits or entry.is_control or session_id in self._passed_over):
                    session = self._state.session(item.partition, session_id)
                    start = self._starter.start_now(session, entry.message)
                if start is not None:
                    starts.append(start)
                else:
                    self._passed_over.add(session_id)
        asyncio.get_running_loop().call_soon(self._runner.give_next, starts)  # when they are sure of their group
        return starts

    def _ingested(self, item: IngestItem, result: GroupResult | None) -> None:
        partition = item.partition
        self.backlog -= item.cursor is not None
        if result is None:
            return
        self.on_taken_in()
        new = 0
        now = monotonic()
        for entry in item.entries:
            place = (partition.id, entry.message.position)
            if place not in result.inserted:
                DUPLICATES.inc()
                session = self._state.session(partition, entry.inbound.session_id)
                self._starter.was_known(session, entry.message)
                if session is not None:
                    session.saw(entry.message.message_id, is_new=False)
                continue
            new += 1
            if place in result.reused:
                entry.message.fault = KEY_REUSED
            partition.pending.add(entry.message.position)
            entry.message.ingested_at = now
            self._hand_over(partition, entry, result)
        INGESTED.inc(new)

    def _hand_over(self, partition: Partition, entry: Entry, result: GroupResult) -> None:
        inbound, message = entry.inbound, entry.message
        session = self._state.session(partition, inbound.session_id)
        if session is None:
            facts = result.sessions[inbound.session_id]
            key = SessionKey(entry.tenant, inbound.agent, inbound.channel, inbound.session)
            session = self._state.add_session(
                partition, inbound.session_id, key, facts.turn_count, facts.delivery_count
            )
            session.paused = facts.paused
        self._state.busy(session)
        if entry.is_control:
            self._controls.apply(session, inbound.kind, message.position, inbound.cancel_turn_id or None)
            return
        session.saw(message.message_id, is_new=True)
        if session.answers(message) and not message.fault:
            return  # its turn was started in this very group
        self._arrivals.arrive(session, message)


def _is_read_first_here(item: IngestItem) -> bool:
    """Whether nobody can have read it before. What killed a former owner is read again by the next, who has to count
    it: its turn is given to a brain only when its group was sent. So a message kills one router at most uncounted.
    """
    known = item.partition.known_seq
    return known is not None and item.cursor is not None and item.cursor.seq > known


def _is_addressed(inbound: Inbound, tenant: str, known: Session | None) -> bool:
    """Whether an item can be stored: names and ids of the right form, a session of its own tenant, nothing that a
    column or an index refuses. The names of a session in memory (`known`, by the item's id) were looked at before.
    """
    return (
        len(inbound.message_id) == ids.ID_BYTES
        and len(inbound.content_hash) == ids.ID_BYTES
        and "\0" not in inbound.traceparent
        and (_is_of(known.key, inbound, tenant) if known is not None else _is_well_named(inbound, tenant))
    )


def _is_of(key: SessionKey, inbound: Inbound, tenant: str) -> bool:
    return (
        key.session == inbound.session
        and key.agent == inbound.agent
        and key.channel == inbound.channel
        and key.tenant == tenant
    )


def _is_well_named(inbound: Inbound, tenant: str) -> bool:
    return (
        ids.is_slug(inbound.agent)
        and ids.is_slug(inbound.channel)
        and ids.is_session(inbound.session)
        and inbound.session_id == ids.session_id(tenant, inbound.agent, inbound.channel, inbound.session)
    )
