"""What the turn engine needs of the world, named by need. Adapters say with what technology."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from services.router.domain.session import BrainLink as SessionBrainLink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from soma.cognition.v1.cognition_service_pb2 import StartTurn
    from soma.common.v1.turn_pb2 import Delivery, LiveEvent
    from soma.controlplane.v1.agent_service_pb2 import Agent
    from soma.controlplane.v1.tenant_service_pb2 import Tenant

    from services.router.application.group import Group, GroupResult


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """A lease as last seen. `expired` is the database clock's opinion; `mark` changes with each renewal."""

    partition: int
    owner: str | None
    term: UUID | None
    expired: bool
    mark: object


@dataclass(frozen=True, slots=True)
class AcquiredRow:
    """A partition's row just after it was taken. `former` is who held it before."""

    epoch: int
    head: int
    mail_head: int
    mail_floor: int
    cursor_stream: str
    cursor_seq: int
    cursor_batch: str
    former: str | None


@dataclass(frozen=True, slots=True)
class PendingRow:
    """A message without outcome, its session, and the session's running turn if it has one."""

    position: int
    message_id: bytes
    kind: int
    deliver: bool
    fault: int
    target_turn: bytes | None
    traceparent: str
    session_id: bytes
    tenant: str
    agent: str
    channel: str
    session: str
    turn_count: int
    delivery_count: int
    turn_id: bytes | None
    status: int | None
    dispatch: int | None
    strikes: int | None
    first_position: int | None
    last_position: int | None
    agent_revision: str | None
    policy: int
    debounce_ms: int
    debounce_max_ms: int
    age_ms: int
    """For how long it has been stored, by the database's clock."""
    paused: bool
    stop: int | None
    """The outcome with which the running turn is to end, if it was stopped; 0: not, or by an older release."""
    stop_age_ms: int | None
    rolled_back: bool
    """It was in the session's last turn, which was rolled back."""
    came_later: bool
    """It was stored after the running turn began."""
    size: int = 0
    """Bytes of its content."""


@dataclass(frozen=True, slots=True)
class StoredDelivery:
    """An outcome that the channel has not acknowledged: its place in the partition and the serialized Delivery."""

    position: int
    session_id: bytes
    payload: bytes


class GroupWriter(Protocol):
    """The one connection that writes groups."""

    async def commit(self, group: Group) -> GroupResult:
        """Writes a group in one round trip. Raises FenceLost (nothing was written) or StoreLost (not known)."""


class LeaseStore(Protocol):
    """Leases, on a connection of their own so that a heartbeat waits for nothing else: neither for a commit nor for
    partitions that are being taken (`acquire`, `load`, `undelivered_channels`). All raise StoreLost.
    """

    async def beat(self, terms: Sequence[UUID]) -> frozenset[int]:
        """Renews this router's leases of these terms and its own presence; returns the partitions that are still
        held.
        """

    async def leases(self) -> tuple[list[LeaseRow], frozenset[str]]:
        """All leases in order, and the routers that were heard lately."""

    async def acquire(self, partition: int, term: UUID, seen: UUID | None) -> AcquiredRow | None:
        """Takes a partition under a new term; None if somebody else has it."""

    async def load(self, partition: int, term: UUID, strike: bool, found: Callable[[list[PendingRow]], None]) -> None:
        """Tells `found` page by page, in order of position, what is pending in a partition just taken. All of it is of
        one moment. When it returns, the dispatch of the running turns is raised, with a strike if asked; if it raises
        or is cancelled, nothing is. It may take very long: whoever waits keeps the lease meanwhile. Raises FenceLost.
        """

    async def undelivered_channels(self, partition: int) -> list[tuple[str, str]]:
        """(tenant, channel) pairs that have outcomes waiting in a partition."""

    async def release(self, terms: Sequence[UUID]) -> None:
        """Gives leases up and tells the other routers, so that they need not wait."""

    async def leave(self, terms: Sequence[UUID]) -> None:
        """The same, and this router is not counted any more."""


class HistoryStore(Protocol):
    """Reads what was committed, on pooled connections. All raise StoreLost."""

    async def contents(self, tenant: str, partition: int, positions: Sequence[int]) -> dict[int, bytes]:
        """Contents of messages by position."""

    async def journal(self, tenant: str, turn_id: bytes) -> list[tuple[int, bytes]]:
        """(kind, body) of a turn's steps in order."""

    async def context(self, tenant: str, session_id: bytes, limit: int) -> list[bytes]:
        """The newest `limit` messages of a session's ended turns, oldest first, inputs and answers, each a serialized
        Message.
        """

    async def agent_spec(self, tenant: str, agent: str, revision: str) -> bytes | None:
        """The agent of a revision that a turn was started with."""

    async def deliveries(
        self, tenant: str, partition: int, channel: str, after: int, limit: int
    ) -> list[StoredDelivery]:
        """Waiting outcomes of a channel in a partition beyond a position, in order."""

    async def turn_answering(self, tenant: str, message_id: bytes, content_hash: bytes) -> bytes | None:
        """The turn that takes the message with this content; None if there is none yet."""

    async def ended_turn(self, tenant: str, turn_id: bytes) -> tuple[Delivery, int, int] | None:
        """The outcome, the last dispatch and the number of steps of a turn that has ended; None if it has not."""


class BrainLink(SessionBrainLink, Protocol):
    """A live stream to one brain, as the use cases see it."""

    def start(self, start: StartTurn) -> None:
        """Runs a turn there; the caller has counted its credit down."""


class ToolCanceller(Protocol):
    """Makes sure that confirmed calls of a stopped turn have an end."""

    async def settle(
        self, tenant: str, turn_id: bytes, step: int, reply: bytes, key: tuple[str, str, str], wait_s: float
    ) -> bytes:
        """The ToolResults body (serialized StepBody) for the calls of a serialized ModelReply body: results of what
        ran, "cancelled" for what will never run, "outcome unknown" for what is not done `wait_s` after this was asked
        first. `key` is (agent, channel, session). Raises ConnectionError to be tried again.
        """

    def unknown(self, reply: bytes) -> bytes:
        """The ToolResults body that says of each call of a ModelReply body that its outcome is not known."""

    async def undo(self, tenant: str, turn_id: bytes, key: tuple[str, str, str]) -> bool:
        """Whether nothing is left of what the calls of a turn did: they did nothing, or all was compensated. Raises
        ConnectionError to be tried again.
        """


class Outbox(Protocol):
    """Hands things to gateways and watchers. Sending never waits and may be lost: the store has the truth."""

    @property
    def losses(self) -> int:
        """How often the connection was lost and made again; what was sent shortly before may not have arrived."""

    def hand_over(self, tenant: str, gateway: str, stream: int, delivery: Delivery) -> None:
        """Sends an outcome to an adapter stream."""

    def for_adapter(self, tenant: str, gateway: str, stream: int) -> LiveEvent:
        """A live event that goes to an adapter stream with the next batch: to be filled at once."""

    def for_watchers(self, tenant: str, session_id: bytes) -> LiveEvent:
        """A live event that goes to all watchers of a session with the next batch: to be filled at once."""


class Directory(Protocol):
    """Tenants and agents as the control plane says they are now."""

    def tenant(self, tenant: str) -> Tenant | None:
        """The tenant, if it exists."""

    def agent(self, tenant: str, agent: str) -> Agent | None:
        """The agent, if it exists."""
