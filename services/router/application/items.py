"""What can be in a group commit. Each item knows its rows and what changes in memory once they are durable.

The rows go to tables in a fixed order, so an item may rely on rows of another item of the same group: a turn may
start with the message it answers, and end with its last step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from soma.common.v1.turn_pb2 import Delivery

from services.router.domain.partition import Cursor, Partition
from services.router.domain.turn import Outcome, StepKind
from soma_common.clock import now_ms

if TYPE_CHECKING:
    from collections.abc import Callable

    from soma.router.v1.inbound_pb2 import Inbound

    from services.router.application.group import Group, GroupResult
    from services.router.domain.session import QueuedMessage, Session, Turn

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
    """The start of a turn: its inputs and the revision of its agent, before any brain sees it."""

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
    """A further try of a running turn, raised durably before anybody runs it."""

    partition: Partition
    turn: Turn
    done: Callable[[Turn], None]
    on_trial: bool = False
    """A suspect that is about to run: should its router die now, it is the one to blame."""

    def write(self, group: Group) -> None:
        """Stores the dispatch number and the strikes."""
        group.move(self.partition)
        group.tenants.add(self.turn.session.key.tenant)
        group.add(group.dispatches, (self.turn.id, self.turn.dispatch, self.turn.strikes, self.on_trial))

    def committed(self, result: GroupResult) -> None:
        """The turn may run again."""
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
class EndItem:
    """The end of a turn: its last step, its outcome, and the delivery, in one transaction."""

    partition: Partition
    turn: Turn
    outcome: Outcome
    steps: list[tuple[StepKind, bytes]]
    """Steps that end the turn; more than one when dangling calls are closed first."""
    answer: Delivery
    """Message or error of the outcome; completed here with everything that is known only when it is written."""
    done: Callable[[EndItem], None]
    is_new: bool = False
    """True for a turn that ends as it starts, because no brain may run it."""
    dead_letter: str = ""
    """Why the turn goes to the dead letters too; empty: it does not."""
    control: ControlItem | None = None
    """Controls that are done with by this end, stored with it."""
    position: int = 0
    """Place of the outcome in the partition, once written."""
    dispatch: int = field(init=False)
    """The one that proposed the last step."""

    def __post_init__(self) -> None:
        self.dispatch = self.turn.dispatch

    def write(self, group: Group) -> None:
        """Adds the last steps, the end and the delivery."""
        turn, session = self.turn, self.turn.session
        key = session.key
        move = group.move(self.partition)
        move.head += 1
        group.tenants.add(key.tenant)
        if self.is_new:
            write_turn(group, turn, fresh=False)
        for number, (kind, body) in enumerate(self.steps, turn.step_count + 1):
            group.add(group.steps, (turn.id, number, key.tenant, kind, self.dispatch, body))
        deliveries = group.number_delivery(session, self.delivers)
        # What a turn had taken that is rolled back waits again.
        done = turn.inputs[0].position - 1 if self.outcome is Outcome.ABSORBED else turn.inputs[-1].position
        group.add(
            group.ends,
            (turn.id, session.id, self.partition.id, self.outcome, turn.step_count, turn.step_count + len(self.steps))
            + (done, turn.number, deliveries),
        )
        complete_answer(self.answer, turn, self.outcome, deliveries if self.delivers else 0)
        if self.delivers:
            add_delivery(group, self.partition, move.head, session, self.answer)
        if self.dead_letter:
            group.add(
                group.dead,
                (key.tenant, "turn", self.partition.id, turn.id, self.answer.error.reason, self.dead_letter, b""),
            )
        if self.control is not None:
            self.control.write(group)
        self.position = move.head

    @property
    def delivers(self) -> bool:
        """Whether the outcome goes to the channel's adapters."""
        return self.turn.deliver and self.outcome is not Outcome.ABSORBED

    def committed(self, result: GroupResult) -> None:
        """The turn is over."""
        self.done(self)
        if self.control is not None:
            self.control.committed(result)

    def abandoned(self) -> None:
        """The new owner goes on from the journal."""


@dataclass(slots=True)
class RefusalItem:
    """A message ends as it arrives, before those that were there first, because its session is busy."""

    partition: Partition
    turn: Turn
    """The turn that it would have been: it never runs and has no number in its session."""
    body: bytes
    """The step that says why: a serialized StepBody."""
    answer: Delivery
    done: Callable[[RefusalItem], None]
    position: int = 0
    """Place of the outcome in the partition, once written."""

    def write(self, group: Group) -> None:
        """Adds the turn as it ends, and the delivery."""
        turn, session = self.turn, self.turn.session
        move = group.move(self.partition)
        move.head += 1
        self.position = move.head
        tenant = session.key.tenant
        group.tenants.add(tenant)
        deliveries = group.number_delivery(session, turn.deliver)
        group.add(
            group.refusals,
            (turn.id, session.id, self.partition.id, tenant, turn.inputs[0].position, deliveries, self.body),
        )
        complete_answer(self.answer, turn, Outcome.REJECTED, deliveries if turn.deliver else 0)
        if turn.deliver:
            add_delivery(group, self.partition, move.head, session, self.answer)

    def committed(self, result: GroupResult) -> None:
        """The message has its outcome."""
        self.done(self)

    def abandoned(self) -> None:
        """The new owner refuses it."""


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
class AckItem:
    """A delivery is acknowledged, or set aside as a dead letter: it is not delivered again."""

    partition: Partition
    position: int
    tenant: str
    dead: Delivery | None = None
    cause: str = ""

    def write(self, group: Group) -> None:
        """Removes the delivery; keeps it as a dead letter if asked."""
        group.move(self.partition)
        group.tenants.add(self.tenant)
        group.add(group.acks, (self.partition.id, self.position))
        if self.dead is not None:
            group.add(
                group.dead,
                (self.tenant, "delivery", self.partition.id, self.dead.delivery_id, 46, self.cause)
                + (self.dead.SerializeToString(),),
            )

    def committed(self, result: GroupResult) -> None:
        """Nothing follows: the next delivery did not wait for this."""

    def abandoned(self) -> None:
        """The new owner delivers again; the adapter drops what it has processed."""


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
        group.add(
            group.dead, (self.tenant, "inbound", self.partition.id, self.ref, self.reason, self.message, self.payload)
        )

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


def complete_answer(answer: Delivery, turn: Turn, outcome: Outcome, position: int) -> None:
    """Fills in what is known only when an outcome is written; `position` 0: it is not delivered."""
    session = turn.session
    answer.delivery_id = answer.turn_id = turn.id
    answer.agent, answer.session = session.key.agent, session.key.session
    answer.position = position
    answer.outcome = outcome.value  # type: ignore[assignment]
    del answer.message_ids[:]
    answer.message_ids.extend(message.message_id for message in turn.inputs)
    answer.create_time_ms = now_ms()
    answer.attempt = 1


def add_delivery(group: Group, partition: Partition, position: int, session: Session, answer: Delivery) -> None:
    """Adds an outcome to what the channel is to acknowledge."""
    key = session.key
    group.add(
        group.deliveries,
        (partition.id, position, session.id, key.tenant, key.channel, answer.SerializeToString()),
    )
