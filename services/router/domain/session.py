"""A session as the owner of its partition holds it: the queue, the running turn, and where its deliveries are."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from services.router.domain.arrival import Policy
from services.router.domain.turn import Outcome, TurnState, TurnStatus

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from services.router.domain.partition import Partition


class BrainLink(Protocol):
    """A live stream to whoever runs turns. Sending never waits: what has gathered goes in the next frame."""

    brain: str
    credit: int
    """Turns it can still take; whoever starts one counts it down."""

    def confirm(self, turn_id: bytes, dispatch: int, step: int) -> None:
        """Says that a step is journaled."""

    def confirm_end(self, turn_id: bytes, dispatch: int, step: int) -> None:
        """Says that a turn's last step is journaled. Nobody waits to hear it: it may come a little later."""

    def stop(self, turn_id: bytes, dispatch: int) -> None:
        """Stops a turn there."""

    def add_inputs(self, turn_id: bytes, dispatch: int, first: int, inputs: list[bytes]) -> None:
        """Gives a turn there further inputs, behind the `first` that it was given before."""


CONTEXT_BYTES: Final = 64 * 1024
SAID_BYTES: Final = 64
"""What a message of a context takes in memory beside its bytes."""
RECENT_MESSAGES: Final = 16


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Who talks with whom, where: the unit of ordering."""

    tenant: str
    agent: str
    channel: str
    session: str


@dataclass(slots=True)
class QueuedMessage:
    """An accepted message that waits for its turn. `position` is given when it is written."""

    position: int
    message_id: bytes
    deliver: bool
    fault: int
    traceparent: str
    content: bytes | None
    """None once memory is short: then it is read from the store when its turn comes."""
    size: int = 0
    """Bytes of its content, wherever that is."""
    policy: int = Policy.ENQUEUE
    """What it does while a turn runs, its own or its agent's."""
    debounce_s: float = 0.0
    """Under accumulate: for how long a companion may still come after it, in seconds, and"""
    debounce_max_s: float = 0.0
    """for how long at most after the first of its group."""
    ingested_at: float = 0.0
    """Monotonic time at which it was stored, in seconds."""
    stops: bool = False
    """It came while a turn ran that it is to stop, and has not done so yet."""
    rolled_back: bool = False
    """The turn that had taken it was rolled back."""
    cancelled: bool = False
    """A cancel reached it before its turn began: it ends without one."""
    cancelled_by: PendingControl | None = None
    """The control that did that; it is not done with before this message has ended."""
    turn_id: bytes = b""
    """Id of the turn that a control would name it by; empty until one is looked for."""
    agent_missed_at: float = 0.0
    """Monotonic time at which its agent was first found missing, in seconds; 0: never."""

    @property
    def ends_alone(self) -> bool:
        """It ends without a brain, when it is first in line."""
        return self.cancelled or self.fault != 0


@dataclass(slots=True)
class PendingControl:
    """A control of the session that is not done with, and those behind it that are done with when it is."""

    position: int
    waits_for: QueuedMessage | None = None
    """The waiting message that it cancels, the last of them: it is applied when that message has ended."""
    last_position: int = 0
    """Position of the last control that is done with when it is; 0: there is no other."""
    count: int = 1
    """How many they are, with itself."""


@dataclass(slots=True)
class Turn:
    """A running turn. `link` is whoever runs it now; None while it waits to be dispatched."""

    id: bytes
    session: Session
    number: int
    inputs: list[QueuedMessage]
    revision: str
    deliver: bool
    """Whether the outcome goes to the channel's adapters."""
    dispatch: int = 1
    strikes: int = 0
    status: TurnStatus = TurnStatus.RUNNING
    state: TurnState = TurnState.THINKING
    journal: list[bytes] = field(default_factory=list)
    journal_loaded: bool = True
    in_flight: bool = False
    """A proposed step is on its way to the journal."""
    ending: bool = False
    """That step is its last one: it takes no further inputs."""
    stop_as: Outcome = Outcome.CANCELLED
    """How it is to end once it has converged, if it was stopped; as it does end, once `ending`."""
    stopped_at: float = 0.0
    """Monotonic time at which it was stopped, in seconds."""
    inputs_told: int = 0
    """How many of its inputs whoever runs it was given."""
    link: BrainLink | None = None
    text: list[str] = field(default_factory=list)
    """What the model has said in the running step, for watchers that come late."""
    text_length: int = 0
    """Code points in `text`."""
    started_at: float = 0.0
    """Monotonic time of its last dispatch, in seconds."""
    progress_at: float = 0.0
    """Monotonic time of the last frame of the turn, in seconds."""
    context_limit: int = 100
    """Messages of the session that its agent is given."""
    patience_s: float = 65.0
    """How long nothing may be heard of it before it is restarted."""

    def stop(self) -> None:
        """Tells whoever runs it to stop."""
        if self.link is not None:
            self.link.stop(self.id, self.dispatch)

    def let_go(self) -> None:
        """Nobody runs it any more; the brain that did can take another."""
        if self.link is not None:
            self.link.credit += 1
            self.link = None

    @property
    def step_count(self) -> int:
        """Journaled steps."""
        return len(self.journal)


class WaitingContexts:
    """Bytes that sessions with waiting messages hold of what was said before. All of them hold no more than `bound`; a
    tenant with less than one in `shares` of it keeps its own although others have filled it.
    """

    __slots__ = ("_bound", "_share", "_tenants", "held")

    def __init__(self, bound: int, shares: int) -> None:
        self._bound = bound
        self._share = bound // shares
        self.held = 0
        self._tenants: dict[str, int] = {}

    def of_tenant(self, tenant: str) -> int:
        """Bytes of one tenant's."""
        return self._tenants.get(tenant, 0)

    def hold(self, session: Session) -> bool:
        """Counts what a session holds by now, if there is room for it; False if there is none."""
        size = 0
        if session.context is not None:
            size = session.context_bytes + len(session.context) * SAID_BYTES
        more = size - session.context_held
        if more > 0 and self.held + more > self._bound and self.of_tenant(session.key.tenant) + more > self._share:
            return False
        if more:
            self._count(session, more)
        return True

    def let_go(self, session: Session) -> None:
        """What a session holds is not counted any more: nothing waits there, or it is not this router's."""
        if session.context_held:
            self._count(session, -session.context_held)

    def _count(self, session: Session, more: int) -> None:
        session.context_held += more
        self.held += more
        tenant = session.key.tenant
        left = self._tenants.get(tenant, 0) + more
        if left:
            self._tenants[tenant] = left
        else:
            self._tenants.pop(tenant, None)


class Session:
    """Everything the owner needs to know of a session between two messages. Idle ones may be dropped at any time."""

    __slots__ = (
        "context",
        "context_bytes",
        "context_held",
        "contexts",
        "controls",
        "delivery_count",
        "id",
        "key",
        "partition",
        "paused",
        "queue",
        "ready",
        "recent",
        "refusing",
        "repeating",
        "storing",
        "timer",
        "turn",
        "turn_count",
        "waiting_controls",
    )

    def __init__(
        self,
        id_: bytes,
        key: SessionKey,
        partition: Partition,
        turn_count: int,
        delivery_count: int,
        contexts: WaitingContexts | None = None,
    ) -> None:
        self.id = id_
        self.key = key
        self.partition = partition
        self.turn_count = turn_count
        self.delivery_count = delivery_count
        self.queue: deque[QueuedMessage] = deque()
        self.controls: deque[PendingControl] = deque()
        """Controls that are not done with, in order; the first waits for a message."""
        self.waiting_controls = 0
        """How many controls `controls` stands for."""
        self.paused = False
        """No turn of it starts."""
        self.refusing = 0
        """Messages that were refused and are not stored as such: nothing that came later starts before."""
        self.storing = 0
        """Controls on their way to the store: what memory knows of them is not to be had from there yet."""
        self.timer: TimerHandle | None = None
        """Looks at it again when its group of messages is due."""
        self.turn: Turn | None = None
        self.ready = False
        """True while the scheduler holds it."""
        self.context: deque[bytes] | None = None
        """What was said before, oldest first; None if it must be read from the store."""
        self.context_bytes = 0
        self.context_held = 0
        """Bytes that are counted for it in `contexts`."""
        self.contexts = contexts
        """Bounds the context while messages wait; None: nothing does."""
        self.recent: tuple[bytes, ...] = ()
        """Ids of its newest messages that came since it is in memory."""
        self.repeating = False
        """What came last was a retry."""

    def forget_context(self) -> None:
        """What was said before is to be read from the store."""
        self.context, self.context_bytes = None, 0
        if self.context_held and self.contexts is not None:
            self.contexts.let_go(self)

    def bound_context(self) -> None:
        """Forgets what was said before if messages wait and all contexts of such sessions leave no room for it: then
        the store is read when a turn needs it.
        """
        if self.contexts is None:
            return
        if not self.queue:
            self.contexts.let_go(self)
        elif not self.contexts.hold(self):
            self.forget_context()

    def saw(self, message_id: bytes, *, is_new: bool) -> None:
        """Notes a message that the store has, or had already."""
        self.repeating = not is_new
        if is_new:
            self.recent = (*self.recent[1 - RECENT_MESSAGES :], message_id)

    def expects_retry(self, message_id: bytes) -> bool:
        """Whether a message is likely a retry, before the store is asked. Retries come one after the other: an adapter
        that has lost its receipts sends all of them again.
        """
        return self.repeating or message_id in self.recent

    def answers(self, message: QueuedMessage) -> bool:
        """Whether the turn that runs began with this message."""
        return self.turn is not None and self.turn.inputs[0] is message

    def remember(self, said: list[bytes], keep: int) -> None:
        """Adds to what was said before and keeps the newest `keep` messages; forgets all of it if they are more bytes
        than the cache holds (then the store is read).
        """
        context = self.context
        if context is None:
            if self.turn_count:
                return
            context = self.context = deque()
        context.extend(said)
        self.context_bytes += sum(map(len, said))
        while len(context) > keep:
            self.context_bytes -= len(context.popleft())
        if self.context_bytes > CONTEXT_BYTES:
            self.forget_context()
        elif self.queue:
            self.bound_context()

    def recall(self, said: list[bytes]) -> None:
        """Takes over what the store knows was said before."""
        self.context, self.context_bytes = deque(), 0
        self.remember(said, len(said))

    @property
    def idle(self) -> bool:
        """Nothing runs, nothing waits, and nothing is on its way to the store."""
        waits = self.queue or self.controls
        return self.turn is None and not waits and not self.refusing and not self.storing
