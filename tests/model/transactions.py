"""The partition's rows in PostgreSQL and the transactions on them.

The fence is not here: it is the committing router's part. Each transaction returns the rows after it, or None where a
constraint refuses it.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from tests.model.guards import TurnGuards

QUEUED: Final = "q"
ANSWERED: Final = "a"
CANCELLED: Final = "c"
RESULT: Final = "r"
CALL_STEP: Final = 1
RESULT_STEP: Final = 2


class Published(NamedTuple):
    """A message in the inbound stream."""

    batch_id: int
    message: int


class Event(NamedTuple):
    """A committed event on its way out."""

    position: int
    message: int
    brain: int  # makes the id unique; -1: a cancel


class JournalEntry(NamedTuple):
    """A journaled step."""

    number: int
    content: int | str  # the call that a brain asked for, or RESULT


class Turn(NamedTuple):
    """A turn, at the position of the message that it answers."""

    steps: tuple[JournalEntry, ...]
    status: (
        int | str
    )  # QUEUED, ANSWERED, CANCELLED, or the position of the turn that takes this message as further input
    dispatch: int = 0  # where turns may be given ahead of their start: 0 until it is started, then raised by each try


class Answered(NamedTuple):
    """An entry of the session's history."""

    message: int
    was_read: bool


class Partition(NamedTuple):
    """The rows of one partition."""

    epoch: int
    owner: tuple[int, int]  # (router, term)
    cursor: int
    anchor: int  # batch id of the message at the cursor
    mailbox: tuple[int, ...]
    turns: tuple[Turn, ...]
    history: tuple[Answered, ...]
    events: tuple[Event, ...]
    relayed: int

    def turn(self, position: int) -> Turn | None:
        """Return the turn at a position, None if there is none: a database that went back has lost it."""
        return self.turns[position] if position < len(self.turns) else None

    def further_inputs(self, position: int) -> list[int]:
        """Return the positions of the messages steered into a turn."""
        return [i for i, turn in enumerate(self.turns) if turn.status == position]

    def with_turn(self, position: int, turn: Turn) -> "Partition":
        """Return the rows with one turn replaced."""
        return self._replace(turns=(*self.turns[:position], turn, *self.turns[position + 1 :]))


@dataclass(frozen=True, slots=True)
class Rules:
    """What a transaction must know of the scenario."""

    guards: TurnGuards
    sessions: tuple[int, ...]  # per message: its session
    steer: bool  # a message that arrives during a turn joins it
    tool: bool  # a turn makes one tool call before its final

    def steps_before_final(self) -> int:
        """Return how many steps a turn has before its final."""
        return RESULT_STEP if self.tool else 0


class Transaction(Protocol):
    """A change of one partition."""

    def apply(self, rows: Partition, rules: Rules) -> Partition | None:
        """Return the rows after the transaction, None if a constraint refuses it."""
        ...


@dataclass(frozen=True, slots=True)
class Ingest:
    """Puts a batch into the mailbox and moves the cursor."""

    start: tuple[int, int]  # (cursor, anchor) that the owner believes in
    end: int
    batch: tuple[Published, ...]
    anchor: int
    starts: tuple[int, ...] = ()  # positions of new messages whose turns start with it
    ends: "tuple[EndTurn, ...]" = ()  # finals of turns that start with it

    def apply(self, rows: Partition, rules: Rules) -> Partition | None:
        """Insert unseen messages, start turns, end those whose final is there. All of it or nothing."""
        after = self._insert(rows, rules)
        if rules.guards.whole and self.is_torn(rows, rules):
            return None
        for end in self.ends:
            after = end.apply(after, rules) if after is not None else None
        return after

    def is_torn(self, rows: Partition, rules: Rules) -> bool:
        """Tell whether a turn is to end whose start is none: its message was there before."""
        after, before = self._insert(rows, rules), len(rows.turns)
        if after is None:
            return False
        return any(end.position < before or not after.turns[end.position].dispatch for end in self.ends)

    def _insert(self, rows: Partition, rules: Rules) -> Partition | None:
        """Each message gets a turn of its own or, if it steers, is an input of the running one."""
        if rules.guards.cursor_cas and self.start != (rows.cursor, rows.anchor):
            return None
        mailbox, turns = rows.mailbox, rows.turns
        for _, message in self.batch:
            if rules.guards.dedupe and message in mailbox:
                continue
            running = [
                position
                for position, other in enumerate(mailbox)
                if rules.sessions[other] == rules.sessions[message]
                and turns[position].status == QUEUED
                and (turns[position].steps or turns[position].dispatch)
                and all(end.position != position for end in self.ends)
            ]
            status = running[0] if running and rules.steer else QUEUED
            started = len(turns) in self.starts and status == QUEUED
            mailbox, turns = (*mailbox, message), (*turns, Turn((), status, int(started)))
        return rows._replace(cursor=self.end, anchor=self.anchor, mailbox=mailbox, turns=turns)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Starts a turn, or raises the number of its dispatch."""

    position: int

    @property
    def starts(self) -> tuple[int, ...]:
        """Return the turn that starts with it."""
        return (self.position,)

    def apply(self, rows: Partition, rules: Rules) -> Partition | None:
        """Count one more dispatch of an open turn."""
        turn = rows.turn(self.position)
        if turn is None or turn.status != QUEUED:
            return None
        return rows.with_turn(self.position, turn._replace(dispatch=turn.dispatch + 1))


@dataclass(frozen=True, slots=True)
class Journal:
    """Journals a step."""

    position: int
    step: JournalEntry

    def apply(self, rows: Partition, rules: Rules) -> Partition | None:
        """Append the step to an open turn, as its next number."""
        turn = rows.turn(self.position)
        if turn is None:
            return None
        if rules.guards.step_cas and (self.step.number != len(turn.steps) + 1 or turn.status != QUEUED):
            return None
        return rows.with_turn(self.position, turn._replace(steps=(*turn.steps, self.step)))


@dataclass(frozen=True, slots=True)
class EndTurn:
    """Commits a final: it answers the turn's message and every further input."""

    position: int
    inputs_read: int
    brain: int

    def apply(self, rows: Partition, rules: Rules) -> Partition | None:
        """End the turn, unless it has inputs that the brain has not read."""
        turn = rows.turn(self.position)
        if turn is None:
            return None
        further = rows.further_inputs(self.position)
        if rules.guards.step_cas and (turn.status != QUEUED or len(turn.steps) != rules.steps_before_final()):
            return None
        if rules.guards.inputs_seen and len(further) > self.inputs_read:
            return None
        history = rows.history
        for number, position in enumerate((self.position, *further)):
            rows = rows.with_turn(position, rows.turns[position]._replace(status=ANSWERED))
            history = (*history, Answered(rows.mailbox[position], number <= self.inputs_read))
        event = Event(len(rows.events), rows.mailbox[self.position], self.brain)
        return rows._replace(history=history, events=(*rows.events, event))


@dataclass(frozen=True, slots=True)
class CancelTurn:
    """Ends a turn as cancelled; a call that had run keeps its result in the transcript."""

    position: int
    call_has_run: bool

    def apply(self, rows: Partition, rules: Rules) -> Partition | None:
        """Close the turn if it is open."""
        turn = rows.turn(self.position)
        if turn is None or turn.status != QUEUED:
            return None
        result = (JournalEntry(RESULT_STEP, RESULT),) if self.call_has_run else ()
        rows = rows.with_turn(self.position, turn._replace(steps=(*turn.steps, *result), status=CANCELLED))
        message = rows.mailbox[self.position]
        return rows._replace(
            events=(*rows.events, Event(len(rows.events), message, -1)),
            history=(*rows.history, Answered(message, True)),
        )
