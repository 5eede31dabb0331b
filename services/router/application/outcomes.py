"""Outcomes in a group commit: turns that end, messages that are refused, deliveries that are done with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from soma.common.v1.turn_pb2 import Delivery

from services.router.application.items import ControlItem, write_turn
from services.router.domain.partition import Partition
from services.router.domain.turn import Outcome, StepKind
from soma_common.clock import now_ms

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.router.application.group import Group, GroupResult
    from services.router.domain.session import Session, Turn


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
    with_start: bool = False
    """Made before the turn's start was sent to the store: there is no such end if the start is none."""
    void: bool = False
    """The start turned out to be none: this is never written."""
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
            reason = self.answer.error.reason
            group.set_aside(key.tenant, "turn", self.partition.id, turn.id, reason, self.dead_letter, b"")
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
            ref, payload = self.dead.delivery_id, self.dead.SerializeToString()
            group.set_aside(self.tenant, "delivery", self.partition.id, ref, 46, self.cause, payload)

    def committed(self, result: GroupResult) -> None:
        """Nothing follows: the next delivery did not wait for this."""

    def abandoned(self) -> None:
        """The new owner delivers again; the adapter drops what it has processed."""


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
