"""What can be in a group commit. Each item knows its rows and what changes in memory once they are durable.

The rows go to tables in a fixed order, so an item may rely on rows of another item of the same group: a turn may
start with the message it answers, and end with its last step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from services.router.domain.partition import Cursor, Partition
from services.router.domain.turn import Outcome, StepKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from soma.router.v1.inbound_pb2 import Inbound

    from services.router.application.group import Group, GroupResult
    from services.router.domain.session import QueuedMessage, Turn

KEY_REUSED: Final = 12
"""ERROR_REASON_IDEMPOTENCY_KEY_REUSED, as router.commit_group writes it."""


@dataclass(slots=True)
class Entry:
    """One accepted item on its way into the mailbox."""

    inbound: Inbound
    message: QueuedMessage
    tenant: str
    is_control: bool


@dataclass(slots=True)
class IngestItem:
    """What one lane message holds for one partition: items into the mailbox, the cursor past it. Both or neither."""

    partition: Partition
    cursor: Cursor | None
    """None in a part that another part follows: a cursor passes what is all in the mailbox."""
    entries: list[Entry]
    done: Callable[[IngestItem, GroupResult | None], None]
    """Called once, with None if nothing came of it."""

    def write(self, group: Group) -> None:
        """Gives the entries their positions."""
        move = group.move(self.partition)
        if self.cursor is not None:
            move.cursor = self.cursor
        for entry in self.entries:
            move.mail_head += 1
            message, inbound = entry.message, entry.inbound
            message.position = move.mail_head
            fault = message.fault
            if group.hashes.setdefault(inbound.message_id, inbound.content_hash) != inbound.content_hash:
                fault = message.fault = KEY_REUSED
            group.tenants.add(entry.tenant)
            group.add(
                group.messages,
                (self.partition.id, message.position, inbound.session_id, inbound.message_id, inbound.content_hash)
                + (entry.tenant, inbound.kind, message.policy, inbound.deliver, fault, inbound.accept_time_ms)
                + (inbound.cancel_turn_id or None, inbound.traceparent, inbound.content)
                + (inbound.agent, inbound.channel, inbound.session)
                + (round(message.debounce_s * 1000), round(message.debounce_max_s * 1000)),
            )

    def committed(self, result: GroupResult) -> None:
        """Hands the new messages to their sessions."""
        self.done(self, result)

    def abandoned(self) -> None:
        """The new owner reads the lane from the committed cursor."""
        self.done(self, None)

    def parts(self) -> list[IngestItem]:
        """One for each entry, and the cursor last: to find the entry that the database refuses."""
        alone = [IngestItem(self.partition, None, [entry], self.done) for entry in self.entries]
        return alone if self.cursor is None else [*alone, IngestItem(self.partition, self.cursor, [], self.done)]


@dataclass(slots=True)
class CursorItem:
    """Moves the cursor of a partition for which a lane held nothing, so that the lane can be purged."""

    partition: Partition
    cursor: Cursor

    def write(self, group: Group) -> None:
        """Never moves a cursor back: an ingest of the same group may be further."""
        move = group.move(self.partition)
        if move.cursor.stream != self.cursor.stream or move.cursor.seq < self.cursor.seq:
            move.cursor = self.cursor

    def committed(self, result: GroupResult) -> None:
        """Nothing follows."""

    def abandoned(self) -> None:
        """Nothing follows."""


@dataclass(slots=True)
class StartItem:
    """The start of a turn: its inputs and the revision of its agent, before anything that a brain says of it counts."""

    partition: Partition
    turn: Turn
    spec: bytes | None
    """The agent's spec if this router has not stored that revision yet."""
    fresh: bool
    """True if the message it answers is ingested in the same group: the turn starts only if that message is new."""
    done: Callable[[StartItem, GroupResult], None]

    def write(self, group: Group) -> None:
        """Adds the turn and its agent's revision."""
        group.move(self.partition)
        write_turn(group, self.turn, self.fresh)
        if self.spec is not None:
            key = self.turn.session.key
            group.add(group.revisions, (key.tenant, key.agent, self.turn.revision, self.spec))

    def committed(self, result: GroupResult) -> None:
        """The turn may run."""
        self.done(self, result)

    def abandoned(self) -> None:
        """The end of the term has taken care of the turn."""


@dataclass(slots=True)
class DispatchItem:
    """A further try of a running turn, raised durably before anybody runs it.

    The turn itself gets the number when it is durable: until then steps of the try before may be on their way, and
    whoever watches is told of them under the number that the journal has.
    """

    partition: Partition
    turn: Turn
    done: Callable[[Turn], None]
    dispatch: int
    """The number of that try, counted from 1; the present one if only `on_trial` is new."""
    on_trial: bool = False
    """A suspect that is about to run: should its router die now, it is the one to blame."""

    def write(self, group: Group) -> None:
        """Stores the dispatch number and the strikes."""
        group.move(self.partition)
        group.tenants.add(self.turn.session.key.tenant)
        group.add(group.dispatches, (self.turn.id, self.dispatch, self.turn.strikes, self.on_trial))

    def committed(self, result: GroupResult) -> None:
        """The turn may run again."""
        self.turn.dispatch = self.dispatch
        self.done(self.turn)

    def abandoned(self) -> None:
        """The new owner raises the number itself."""


@dataclass(slots=True)
class StepItem:
    """A step into the journal."""

    partition: Partition
    turn: Turn
    kind: StepKind
    body: bytes
    done: Callable[[StepItem], None]
    dispatch: int = field(init=False)
    """The one that proposed it: the turn may have a newer one by the time that it is written."""

    def __post_init__(self) -> None:
        self.dispatch = self.turn.dispatch

    def write(self, group: Group) -> None:
        """Adds the step under the next number; a number that is there already fails the group."""
        group.move(self.partition)
        tenant = self.turn.session.key.tenant
        group.tenants.add(tenant)
        group.add(group.steps, (self.turn.id, self.turn.step_count + 1, tenant, self.kind, self.dispatch, self.body))
        group.add(group.journaled, (self.turn.id, self.turn.step_count + 1, self.partition.id))

    def committed(self, result: GroupResult) -> None:
        """The brain may act on it."""
        self.done(self)

    def abandoned(self) -> None:
        """The new owner goes on from the journal."""


@dataclass(slots=True)
class InputItem:
    """A running turn takes a further input."""

    partition: Partition
    turn: Turn
    position: int
    done: Callable[[Turn], None]

    def write(self, group: Group) -> None:
        """Moves the turn's last position."""
        group.move(self.partition)
        group.tenants.add(self.turn.session.key.tenant)
        group.add(group.inputs, (self.turn.id, self.position))

    def committed(self, result: GroupResult) -> None:
        """Whoever runs the turn may read it."""
        self.done(self.turn)

    def abandoned(self) -> None:
        """The new owner gives it to the turn."""


@dataclass(slots=True)
class ControlItem:
    """Controls reach their session: what they say holds from now on, durably."""

    partition: Partition
    session_id: bytes
    tenant: str
    positions: list[int]
    """Controls of the session that are done with by this, in order."""
    done: Callable[[ControlItem], None]
    turn: Turn | None = None
    """The turn that is to converge; None: none."""
    stop_as: Outcome = Outcome.CANCELLED
    """How that turn is to end."""
    paused: bool | None = None
    """Whether the session is to start turns; None: as before."""

    def write(self, group: Group) -> None:
        """Stores that the controls were applied and what they do."""
        group.move(self.partition)
        group.tenants.add(self.tenant)
        last = self.positions[-1] if self.positions else 0
        turn = (self.turn.id, self.stop_as) if self.turn is not None else (None, None)
        group.add(group.controls, (self.session_id, last, *turn, self.paused))

    def committed(self, result: GroupResult) -> None:
        """The turn is to be stopped."""
        self.done(self)

    def abandoned(self) -> None:
        """The new owner applies them."""


@dataclass(slots=True)
class DeadItem:
    """An inbound item that cannot be read: set aside with its bytes, so that the partition goes on."""

    partition: Partition
    tenant: str
    ref: bytes
    reason: int
    message: str
    payload: bytes

    def write(self, group: Group) -> None:
        """Adds the dead letter."""
        group.move(self.partition)
        group.tenants.add(self.tenant)
        group.set_aside(self.tenant, "inbound", self.partition.id, self.ref, self.reason, self.message, self.payload)

    def committed(self, result: GroupResult) -> None:
        """Nothing follows."""

    def abandoned(self) -> None:
        """The new owner reads the item again."""


def write_turn(group: Group, turn: Turn, fresh: bool) -> None:
    """Adds the row of a turn that starts."""
    session = turn.session
    group.tenants.add(session.key.tenant)
    group.add(
        group.turns,
        (turn.id, session.id, session.partition.id, session.key.tenant, turn.number)
        + (turn.inputs[0].position, turn.inputs[-1].position, turn.revision, fresh),
    )
