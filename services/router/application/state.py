"""What this router holds in memory: its partitions, their sessions, the turns it runs. All of it can be lost at any
time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final

from services.router.domain.mailbox import Mailbox
from services.router.domain.scheduler import Scheduler
from services.router.domain.session import Session, SessionKey, WaitingContexts

if TYPE_CHECKING:
    from services.router.application.ports import Directory
    from services.router.domain.partition import Partition
    from services.router.domain.session import QueuedMessage, Turn
    from soma_common.layout import LaneLayout

DEFAULT_TENANT_RUNNING: Final = 4096
DEFAULT_WEIGHT: Final = 100
CROWD: Final = 16
"""Most turns of a tenant that one group starts while other tenants are there."""
DEFAULT_SESSION_QUEUE: Final = 1000
DEFAULT_TENANT_QUEUE: Final = 100_000
QUEUED_CONTENT_BYTES: Final = 4 * 1024 * 1024
"""Most content of waiting messages kept in memory; beyond it content is read from the store when its turn comes."""
CONTENT_SHARES: Final = 64
"""A tenant with less than one in so many of it keeps its own although others have filled it."""
WAITING_CONTEXT_BYTES: Final = 16 * 1024 * 1024
"""Most bytes of what was said before that sessions with waiting messages keep in memory, shared out like content;
beyond it a context is read from the store when the session's next turn begins.
"""


class RouterState:
    """Partitions by number, running turns by id, the scheduler, and idle sessions in order of last use.

    `max_idle` bounds the idle sessions kept, so that a session between two messages costs no memory in the long run.
    """

    def __init__(
        self,
        layout: LaneLayout,
        directory: Directory,
        max_running: int,
        max_idle: int,
        max_queued_per_session: int = DEFAULT_SESSION_QUEUE,
        max_queued_per_tenant: int = DEFAULT_TENANT_QUEUE,
    ) -> None:
        self.layout = layout
        self.directory = directory
        self.partitions: dict[int, Partition] = {}
        self.running: dict[bytes, Turn] = {}
        self.scheduler = Scheduler(max_running, self._limits, self._agent_limit, CROWD)
        self.mailbox = Mailbox(max_queued_per_session, max_queued_per_tenant)
        self._idle: OrderedDict[bytes, Session] = OrderedDict()
        self._max_idle = max_idle
        self._queued_bytes = 0
        self._tenant_bytes: Counter[str] = Counter()
        """Content of waiting messages in memory, of all and by tenant."""
        self.contexts = WaitingContexts(WAITING_CONTEXT_BYTES, CONTENT_SHARES)

    def session(self, partition: Partition, session_id: bytes) -> Session | None:
        """A session that is in memory."""
        return partition.sessions.get(session_id)

    def add_session(
        self, partition: Partition, id_: bytes, key: SessionKey, turn_count: int, delivery_count: int
    ) -> Session:
        """Takes a session into memory."""
        session = Session(id_, key, partition, turn_count, delivery_count, self.contexts)
        if turn_count == 0:
            session.remember([], 0)
        partition.sessions[id_] = session
        return session

    def busy(self, session: Session) -> None:
        """The session has something to do: it stays in memory."""
        self._idle.pop(session.id, None)

    def idle(self, session: Session) -> None:
        """The session has nothing to do: it may be forgotten once enough others are idle too."""
        self._idle[session.id] = session
        self._idle.move_to_end(session.id)
        while len(self._idle) > self._max_idle:
            id_, old = self._idle.popitem(last=False)
            if old.partition.sessions.get(id_) is old:
                del old.partition.sessions[id_]

    def enqueue(self, session: Session, message: QueuedMessage) -> None:
        """Has a message wait for its turn; its content stays in memory only while there is room for it."""
        content = message.content
        if content is not None:
            if self._has_room(session.key.tenant, len(content)):
                self._hold(session, len(content))
            else:
                message.content = None
        session.queue.append(message)
        self.mailbox.added(session)
        if session.context and len(session.queue) == 1:
            session.bound_context()

    def dequeue(self, session: Session) -> QueuedMessage:
        """Takes the session's first waiting message."""
        message = session.queue.popleft()
        self.mailbox.taken(session)
        if session.context_held and not session.queue:
            self.contexts.let_go(session)
        self._hold(session, -len(message.content or b""))
        return message

    def requeue(self, session: Session, message: QueuedMessage) -> None:
        """Puts a message back that was taken and cannot be answered yet."""
        self._hold(session, len(message.content or b""))
        session.queue.appendleft(message)
        self.mailbox.added(session)
        if session.context and len(session.queue) == 1:
            session.bound_context()

    def _has_room(self, tenant: str, size: int) -> bool:
        """A tenant that has little in memory keeps it there although others have filled it: what they wait for is not
        read from the store.
        """
        if self._queued_bytes + size <= QUEUED_CONTENT_BYTES:
            return True
        return self._tenant_bytes[tenant] + size <= QUEUED_CONTENT_BYTES // CONTENT_SHARES

    def _hold(self, session: Session, size: int) -> None:
        tenant = session.key.tenant
        self._queued_bytes += size
        self._tenant_bytes[tenant] += size
        if not self._tenant_bytes[tenant]:
            del self._tenant_bytes[tenant]

    def runs(self, turn: Turn) -> bool:
        """Whether a turn is this router's to go on with."""
        return self.running.get(turn.id) is turn and not turn.session.partition.lost

    def forget_partition(self, partition: Partition) -> list[Turn]:
        """Drops a partition whose term has ended; returns the turns that were running in it."""
        partition.lost = True
        if self.partitions.get(partition.id) is partition:
            del self.partitions[partition.id]
        turns = []
        for session in partition.sessions.values():
            self._idle.pop(session.id, None)
            if session.timer is not None:
                session.timer.cancel()
            self._hold(session, -sum(len(message.content or b"") for message in session.queue))
            self.mailbox.forget(session)
            self.contexts.let_go(session)
            session.contexts = None  # one that is being read for a turn may still come, and is nobody's
            if session.turn is not None:
                turns.append(session.turn)
                self.running.pop(session.turn.id, None)
                self.scheduler.ended(session.key)
        self.scheduler.drop(lambda session: session.partition is partition)
        partition.sessions.clear()
        return turns

    def _limits(self, tenant: str) -> tuple[int, int]:
        found = self.directory.tenant(tenant)
        if found is None:
            return DEFAULT_WEIGHT, DEFAULT_TENANT_RUNNING
        limit = 0 if found.paused else found.max_running_turns or DEFAULT_TENANT_RUNNING
        return found.weight or DEFAULT_WEIGHT, limit

    def _agent_limit(self, tenant: str, agent: str) -> int:
        found = self.directory.agent(tenant, agent)
        if found is None:
            return DEFAULT_TENANT_RUNNING  # its messages are to be refused, not kept
        return 0 if found.paused else found.spec.max_running_turns or DEFAULT_TENANT_RUNNING
