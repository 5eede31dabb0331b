"""Messages that gather for one turn, and the takeover of the session while they do, as a model for `search.py`.

Modelled: the messages of one session in order, each with its policy; the database's clock, which counts what each
message has waited; an owner that starts what is due before time goes on, joins what steers, gives the turn's inputs to
a brain and takes its final; takeovers at any moment. A new owner has nothing but what is stored. That an owner which
was replaced commits nothing is what the scenarios about turns are about; here it is so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.model.guards import GroupGuards
from tests.model.search import Step

ACCUMULATE: Final = "a"
STEER: Final = "s"
ENQUEUE: Final = "e"

DEBOUNCE: Final = 2  # what a group waits after its last message
DEBOUNCE_MAX: Final = 3  # and at most after its first; a longer wait is not told apart

ANSWERED_TWICE: Final = "I1 answered twice"
UNREAD: Final = "I1 answered without being read"
LATE: Final = "I1 a group waits longer than it may"
SPLIT: Final = "I1 a group in two turns"
ORDER: Final = "I3 order"
OTHER_INPUTS: Final = "I4 two sets of inputs under one turn id"


class Turn(NamedTuple):
    """A turn that is not over."""

    began: tuple[int, ...]  # the messages it started with
    joined: tuple[int, ...] = ()  # the messages steered into it

    @property
    def inputs(self) -> tuple[int, ...]:
        """Every message that it is to answer."""
        return self.began + self.joined


class Session(NamedTuple):
    """The rows of a session, what its owner makes of them, and what has been seen."""

    takeovers_left: int
    ages: tuple[int, ...] = ()  # per stored message, by the database's clock
    stored: Turn | None = None
    answered: tuple[int, ...] = ()
    # The owner's memory:
    reckoned: tuple[int, ...] = ()  # per stored message, how long it has waited as far as the owner knows
    forgotten: int = 0  # of so many messages the owner does not know the policy
    armed: bool = False  # the owner looks at what waits
    turn: Turn | None = None
    read: int | None = None  # how many inputs the brain has read; None: no brain has the turn
    # What happened:
    given: frozenset[tuple[int, ...]] = frozenset()  # what brains were told that the running turn started with
    last_start: tuple[int, ...] = ()
    late: bool = False
    split: bool = False
    unread: bool = False

    @property
    def waiting(self) -> tuple[int, ...]:
        """The stored messages, in order, that the owner has no turn for."""
        taken = {*self.answered, *(self.turn.inputs if self.turn else ())}
        return tuple(message for message in range(len(self.ages)) if message not in taken)


@dataclass(frozen=True, slots=True)
class Gathering:
    """Messages with these policies, a letter each, with some of the guards; one turn takes `most` of them."""

    guards: GroupGuards
    policies: str
    takeovers: int
    most: int = 64

    def initial(self) -> Session:
        """Return the start: nothing was sent."""
        return Session(self.takeovers)

    def steps(self, session: Session) -> Iterator[Step[Session]]:
        """Yield what clients, the clock, the owner, its brain and its successor may do next."""
        if len(session.ages) < len(self.policies):
            yield self._store(session)
        if session.turn is not None:
            yield from self._run_steps(session, session.turn)
        starts = session.turn is None and session.armed and self._is_due(session, session.reckoned, session.forgotten)
        if starts:
            yield self._start(session)
        elif any(age < DEBOUNCE_MAX for age in session.ages):
            yield self._tick(session)
        if session.takeovers_left:
            yield Step("a new owner takes over", self._taken_over(session), fault=True)

    def violations(self, session: Session, *, final: bool) -> Iterator[str]:
        """Yield the promises that `session` breaks."""
        if len(session.answered) != len(set(session.answered)):
            yield ANSWERED_TWICE
        if session.unread:
            yield UNREAD
        if session.late:
            yield LATE
        if session.split:
            yield SPLIT
        if list(session.answered) != sorted(session.answered):
            yield ORDER
        if len(session.given) > 1:
            yield OTHER_INPUTS

    def fulfilled(self, session: Session) -> bool:
        """Tell whether every message has been answered."""
        return len(session.answered) == len(self.policies)

    def _store(self, session: Session) -> Step[Session]:
        new = len(session.ages)
        before = new - 1
        too_early = (
            self.policies[new] == ACCUMULATE
            and before in session.last_start
            and before not in session.waiting
            and self.policies[before] == ACCUMULATE
            and len(session.last_start) < self.most
            and session.ages[before] < DEBOUNCE
            and session.ages[session.last_start[0]] < DEBOUNCE_MAX
        )
        after = session._replace(
            ages=(*session.ages, 0),
            reckoned=(*session.reckoned, 0),
            armed=True,
            split=session.split or too_early,
        )
        return Step(f"m{new} is stored", after)

    def _tick(self, session: Session) -> Step[Session]:
        due = session.turn is None and self._is_due(session, session.ages, forgotten=0)
        after = session._replace(
            ages=tuple(min(age + 1, DEBOUNCE_MAX) for age in session.ages),
            reckoned=tuple(min(age + 1, DEBOUNCE_MAX) for age in session.reckoned),
            late=session.late or due,
        )
        return Step("time goes on", after)

    def _start(self, session: Session) -> Step[Session]:
        inputs = self._next_inputs(session.waiting, session.forgotten)
        turn, following = Turn(inputs), inputs[-1] + 1
        left_behind = (
            following in session.waiting
            and self.policies[following] == self.policies[inputs[-1]] == ACCUMULATE
            and len(inputs) < self.most
        )
        after = session._replace(
            turn=turn,
            stored=turn if self.guards.group_journaled else None,
            last_start=inputs,
            split=session.split or left_behind,
        )
        return Step(f"a turn starts with {list(inputs)}", after)

    def _run_steps(self, session: Session, turn: Turn) -> Iterator[Step[Session]]:
        waiting = session.waiting
        if waiting and self._policy(waiting[0], session.forgotten) == STEER and len(turn.inputs) < self.most:
            more = turn._replace(joined=(*turn.joined, waiting[0]))
            stored = more if session.stored else None
            yield Step(f"m{waiting[0]} joins the turn", session._replace(turn=more, stored=stored))
        if session.read is None:
            given = session.given | {turn.began}
            label = f"a brain is given {list(turn.inputs)}"
            yield Step(label, session._replace(read=len(turn.inputs), given=given))
            return
        if session.read < len(turn.inputs):
            yield Step("the brain reads what has joined", session._replace(read=len(turn.inputs)))
        if session.read == len(turn.inputs) or not self.guards.group_seen:
            yield Step(f"its final ends the turn, {session.read} inputs read", self._ended(session, turn))

    def _ended(self, session: Session, turn: Turn) -> Session:
        return session._replace(
            answered=session.answered + turn.inputs,
            unread=session.read != len(turn.inputs),
            turn=None,
            stored=None,
            read=None,
            given=frozenset(),
            armed=True,
        )

    def _taken_over(self, session: Session) -> Session:
        return session._replace(
            takeovers_left=session.takeovers_left - 1,
            turn=session.stored,
            read=None,
            reckoned=session.ages if self.guards.due_durable else (0,) * len(session.ages),
            forgotten=0 if self.guards.policy_stored else len(session.ages),
            armed=self.guards.due_restored,
        )

    def _policy(self, message: int, forgotten: int) -> str:
        return ENQUEUE if message < forgotten else self.policies[message]

    def _next_inputs(self, waiting: tuple[int, ...], forgotten: int) -> tuple[int, ...]:
        """The messages that the next turn takes: the first, or the first group."""
        if self._policy(waiting[0], forgotten) != ACCUMULATE:
            return waiting[:1]
        group: list[int] = []
        for message in waiting:
            if self._policy(message, forgotten) == ACCUMULATE:
                group.append(message)
            elif self.guards.neighbours:
                break
        return tuple(group[: self.most])

    def _is_due(self, session: Session, ages: tuple[int, ...], forgotten: int) -> bool:
        """Whether what waits is not to wait for companions any more, if messages have waited as long as in `ages`."""
        waiting = session.waiting
        if not waiting or self._policy(waiting[0], forgotten) != ACCUMULATE:
            return bool(waiting)
        group = self._next_inputs(waiting, forgotten)
        closed = len(group) < len(waiting) or len(group) == self.most
        return closed or ages[group[-1]] >= DEBOUNCE or ages[group[0]] >= DEBOUNCE_MAX
