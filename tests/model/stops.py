"""A turn that is stopped, and what follows it, as a model for `search.py`: interrupt, rollback, cancel, reject.

Modelled: the messages of one session in order, each with its policy; turns with at most one tool call; a stop that is
decided in memory, stored, and carried out; the tool gateway, which keeps a result or a tombstone under a call's key and
may be asked to take a turn's call back; a cancel that comes through the lane; takeovers at any moment, after which the
brains of the former owner may still ask for the calls that they were confirmed. A new owner has nothing but what is
stored. The tool gateway is one step here; its own crash window is in `tool_calls.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.model.guards import StopGuards
from tests.model.search import Step
from tests.model.world import put

REJECT: Final = "j"
CANCELLED: Final = "cancelled"
INTERRUPTED: Final = "interrupted"
ABSORBED: Final = "absorbed"
REJECTED: Final = "rejected"
FINAL: Final = "final"
STOPS: Final = {"i": INTERRUPTED, "r": ABSORBED}  # by the letter of a message's policy
UNSAID: Final = "stopped"  # a row that does not say how its turn is to end

NOTHING: Final = 0
TOMBSTONE: Final = -1

ANSWERED_TWICE: Final = "I1 answered twice"
CANCEL_LOST: Final = "I1 a turn went on that was told to be cancelled"
NOBODY_ASKED: Final = "I1 an outcome that nobody asked for"
ORDER: Final = "I3 order"
OTHER_INPUTS: Final = "I4 two sets of inputs under one turn id"
OTHER_TRY: Final = "I4 a call was answered with what another try left"
STAYS: Final = "I4 an effect of a turn that was told to have left none"
RAN_CANCELLED: Final = "I4 an effect of a call the transcript calls cancelled"


class Row(NamedTuple):
    """A turn in the database."""

    id: tuple[int, int]  # first message, generation: part of its calls' keys
    inputs: tuple[int, ...]
    known: int  # how many messages were stored when it began
    call: int = NOTHING  # the journaled call: the brain that asked for it; every brain asks for something else
    result: int = NOTHING  # the journaled result: the call that ran, or TOMBSTONE
    stop: str = ""
    outcome: str = ""


class Owner(NamedTuple):
    """What the session's owner has in memory."""

    waiting: tuple[int, ...] = ()
    refusing: tuple[int, ...] = ()  # messages that it refuses, not stored yet
    stop: str = ""  # how the running turn is to end
    storing: bool = False  # the stop is not stored yet
    converges: bool = True  # it carries out stops
    result: int = NOTHING  # what the call in flight converged to
    left: str = ""  # what the tool gateway said is left of the turn: nothing, something
    rolled_back: frozenset[int] = frozenset()  # messages of a turn that was rolled back


class Brain(NamedTuple):
    """A brain that runs a turn."""

    number: int
    row: int
    live: bool = True  # its owner is still the owner
    call: int = NOTHING
    result: int = NOTHING  # what the tool gateway answered


class Kept(NamedTuple):
    """What the tool gateway keeps under a key."""

    key: tuple[int, int]  # a turn has one call, so its id is enough
    call: int  # the call that ran, or TOMBSTONE
    undone: bool = False


class World(NamedTuple):
    """Everything there is."""

    takeovers_left: int
    cancels_left: int
    owner: Owner = Owner()
    stored: int = 0  # messages
    rows: tuple[Row, ...] = ()
    done: int = 0  # messages below it are over
    refused: frozenset[int] = frozenset()  # messages above it that are over: they have a row of their own
    answers: tuple[tuple[int, str], ...] = ()
    brains: tuple[Brain, ...] = ()
    last_brain: int = 0
    kept: tuple[Kept, ...] = ()
    cancel_of: int | None = None  # the row that a cancel in the lane names
    told: frozenset[int] = frozenset()  # rows of turns that were told to be cancelled
    regrouped: bool = False  # a new owner found other inputs in a turn than it began with

    @property
    def open(self) -> int | None:
        """The row of the turn that is not over."""
        return len(self.rows) - 1 if self.rows and not self.rows[-1].outcome else None

    def under(self, key: tuple[int, int]) -> Kept | None:
        """What the tool gateway keeps under a key."""
        return next((kept for kept in self.kept if kept.key == key), None)


@dataclass(frozen=True, slots=True)
class StoppedTurns:
    """Messages with these policies, a letter each, with some of the guards; `undoable`: the tool has a compensation."""

    guards: StopGuards
    policies: str
    takeovers: int
    cancels: int = 0
    undoable: bool = False

    def initial(self) -> World:
        """Return the start: nothing was sent."""
        return World(self.takeovers, self.cancels)

    def steps(self, world: World) -> Iterator[Step[World]]:
        """Yield what clients, the owner, brains and the owner's successor may do next."""
        if world.stored < len(self.policies):
            arrived = self._arrive(world._replace(stored=world.stored + 1), world.stored, stops=True)
            yield Step(f"m{world.stored} is stored", arrived)
        yield from self._cancel_steps(world)
        yield from self._owner_steps(world)
        if world.open is not None and world.owner.stop:
            yield from self._converge_steps(world, world.open)
        for brain in world.brains:
            yield from self._brain_steps(world, brain)
        if world.takeovers_left:
            yield Step("a new owner takes over", self._taken_over(world), fault=True)

    def violations(self, world: World, *, final: bool) -> Iterator[str]:
        """Yield the promises that `world` breaks."""
        answered = [message for message, _ in world.answers]
        in_turn = [message for message, outcome in world.answers if outcome != REJECTED]
        if len(answered) != len(set(answered)):
            yield ANSWERED_TWICE
        if in_turn != sorted(in_turn):
            yield ORDER
        if world.regrouped:
            yield OTHER_INPUTS
        for number, row in enumerate(world.rows):
            has_effect = Kept(row.id, row.call) in world.kept
            if number in world.told and row.outcome in (FINAL, ABSORBED):
                yield CANCEL_LOST
            if number not in world.told and row.outcome == CANCELLED:
                yield NOBODY_ASKED
            if row.result not in (NOTHING, TOMBSTONE, row.call) or (row.result == TOMBSTONE and row.outcome == FINAL):
                yield OTHER_TRY
            if row.outcome == ABSORBED and has_effect:
                yield STAYS
            if row.result == TOMBSTONE and has_effect:
                yield RAN_CANCELLED

    def fulfilled(self, world: World) -> bool:
        """Tell whether every message has its outcome."""
        return len({message for message, _ in world.answers}) == len(self.policies)

    # -- messages and stops

    def _arrive(self, world: World, message: int, *, stops: bool) -> World:
        """The owner's decision on a message, in memory."""
        owner, policy = world.owner, self.policies[message]
        if policy == REJECT and (world.open is not None or owner.waiting):
            return world._replace(owner=owner._replace(refusing=(*owner.refusing, message)))
        waits = owner._replace(waiting=(*owner.waiting, message))
        if policy in STOPS and world.open is not None and stops and (not owner.stop or not self.guards.first_stop):
            waits = waits._replace(stop=STOPS[policy], storing=True)
        return world._replace(owner=waits)

    def _cancel_steps(self, world: World) -> Iterator[Step[World]]:
        if world.cancel_of is None:
            if world.cancels_left and world.open is not None:
                asked = world._replace(cancels_left=world.cancels_left - 1, cancel_of=world.open)
                yield Step(f"a cancel of turn {world.open} is stored in the lane", asked)
            return
        applied, owner = world._replace(cancel_of=None), world.owner
        if world.cancel_of != world.open:
            yield Step("the cancel comes too late", applied)
            return
        may_stop = not owner.stop or not self.guards.first_stop
        if may_stop or (owner.stop == ABSORBED and self.guards.cancel_beats):
            applied = self._stop_stored(applied._replace(owner=owner._replace(stop=CANCELLED)))
        yield Step(f"the cancel of turn {world.open} is applied", applied._replace(told=world.told | {world.cancel_of}))

    def _stop_stored(self, world: World) -> World:
        owner, at = world.owner, len(world.rows) - 1
        stop = (owner.stop if self.guards.stop_kind else UNSAID) if self.guards.stop_durable else ""
        rows = put(world.rows, at, world.rows[at]._replace(stop=stop))
        return world._replace(rows=rows, owner=owner._replace(storing=False))

    def _owner_steps(self, world: World) -> Iterator[Step[World]]:
        owner = world.owner
        if owner.storing and world.open is not None:
            yield Step(f"turn {world.open} is stopped, {owner.stop}", self._stop_stored(world))
        for message in owner.refusing:
            after = owner._replace(refusing=tuple(other for other in owner.refusing if other != message))
            refused = world.refused | {message} if self.guards.refusal_row else world.refused
            answers = (*world.answers, (message, REJECTED))
            yield Step(f"m{message} is refused", world._replace(owner=after, refused=refused, answers=answers))
        if world.open is None and owner.waiting and not (owner.refusing and self.guards.refusal_first):
            yield self._start(world)
        elif world.open is not None and not owner.stop and not any(b.live for b in world.brains):
            row, number = world.rows[world.open], world.last_brain + 1
            brain = Brain(number, world.open, call=row.call, result=row.result)
            yield Step(
                f"turn {world.open} is given to b{number}",
                world._replace(brains=(*world.brains, brain), last_brain=number),
            )

    def _start(self, world: World) -> Step[World]:
        """A turn with everything up to the last message that stops turns; without one, with the first."""
        waiting = world.owner.waiting
        last_stop = max((i for i, message in enumerate(waiting) if self.policies[message] in STOPS), default=0)
        inputs, number = waiting[: last_stop + 1], len(world.rows) + 1
        again = inputs[0] in world.owner.rolled_back and self.guards.new_turn_id
        row = Row((inputs[0], number if again else 0), inputs, world.stored)
        owner = world.owner._replace(waiting=waiting[last_stop + 1 :])
        label = f"turn {len(world.rows)} starts with {list(inputs)}, id {row.id}"
        return Step(label, world._replace(rows=(*world.rows, row), owner=owner))

    # -- the end of a stopped turn

    def _converge_steps(self, world: World, at: int) -> Iterator[Step[World]]:
        owner, row = world.owner, world.rows[at]
        if owner.storing or not owner.converges:
            return
        result = row.result or owner.result
        is_closed = not row.call or result != NOTHING
        if not is_closed:
            yield self._close(world, row)
        undoes = owner.stop == ABSORBED and row.call != NOTHING and self.guards.asks_tools
        if undoes and not owner.left and (is_closed or not self.guards.asked_after):
            yield self._ask(world, row)
        if is_closed and (owner.left or not undoes):
            outcome = INTERRUPTED if undoes and owner.left == "something" else owner.stop
            ended = put(world.rows, at, row._replace(result=result))
            yield Step(f"turn {at} ends {outcome}", self._ended(world._replace(rows=ended), at, outcome))

    def _close(self, world: World, row: Row) -> Step[World]:
        kept = world.under(row.id)
        if kept is not None:
            return Step("its call has run", world._replace(owner=world.owner._replace(result=kept.call)))
        tombstones = (*world.kept, Kept(row.id, TOMBSTONE))
        after = world._replace(kept=tombstones, owner=world.owner._replace(result=TOMBSTONE))
        return Step("its call will never run: tombstone", after)

    def _ask(self, world: World, row: Row) -> Step[World]:
        """The tool gateway is asked whether anything is left of the turn, and takes back what it can."""
        kept, owner = world.under(row.id), world.owner
        if kept is None or kept.call == TOMBSTONE:
            return Step("nothing is left of the turn", world._replace(owner=owner._replace(left="nothing")))
        if not self.undoable:
            return Step("an effect stays of the turn", world._replace(owner=owner._replace(left="something")))
        undone = put(world.kept, world.kept.index(kept), kept._replace(undone=True))
        return Step("the turn's call is undone", world._replace(kept=undone, owner=owner._replace(left="nothing")))

    def _ended(self, world: World, at: int, outcome: str) -> World:
        """The commit of an outcome; the messages of a turn that was rolled back wait again."""
        row, owner = world.rows[at], world.owner
        after = Owner(owner.waiting, owner.refusing)
        done, answers = row.inputs[-1] + 1, world.answers
        if outcome == ABSORBED:
            after = after._replace(waiting=row.inputs + owner.waiting, rolled_back=frozenset(row.inputs))
            done = world.done if self.guards.absorbed_waits else done
        else:
            answers += tuple((message, outcome) for message in row.inputs)
        rows = put(world.rows, at, row._replace(outcome=outcome))
        brains = _that_may_act(world.brains, rows)
        return world._replace(rows=rows, owner=after, done=done, answers=answers, brains=brains)

    # -- brains

    def _brain_steps(self, world: World, brain: Brain) -> Iterator[Step[World]]:
        name, row = f"b{brain.number}", world.rows[brain.row]
        runs = brain.live and brain.row == world.open and not world.owner.stop
        if runs and brain.call == NOTHING:
            journaled = put(world.rows, brain.row, row._replace(call=brain.number))
            confirmed = _changed(world._replace(rows=journaled), brain, brain._replace(call=brain.number))
            yield Step(f"{name}: its call is journaled", confirmed)
        if brain.call != NOTHING and brain.result == NOTHING:
            yield self._act(world, brain)
        if runs and brain.result != NOTHING and row.result == NOTHING:
            journaled = put(world.rows, brain.row, row._replace(result=brain.result))
            yield Step(f"{name}: the result is journaled", world._replace(rows=journaled))
        if runs and (row.call == NOTHING or row.result != NOTHING):
            yield Step(f"{name}: its final ends turn {brain.row}", self._ended(world, brain.row, FINAL))

    def _act(self, world: World, brain: Brain) -> Step[World]:
        key = world.rows[brain.row].id
        kept = world.under(key)
        runs = world if kept is not None else world._replace(kept=(*world.kept, Kept(key, brain.call)))
        answer = kept.call if kept is not None else brain.call
        label = f"b{brain.number}: the tool runs" if kept is None else f"b{brain.number}: is given what is kept"
        return Step(label, _changed(runs, brain, brain._replace(result=answer)))

    # -- takeover

    def _taken_over(self, world: World) -> World:
        """A new owner decides again, from what is stored, what the former one had not stored."""
        rows, at = world.rows, world.open
        ended = rows if at is None else rows[:-1]
        stop, known, regrouped = "", 0, world.regrouped
        in_turn: tuple[int, ...] = ()
        rolled_back: frozenset[int] = frozenset()
        if at is not None:
            first, last = rows[at].inputs[0], rows[at].inputs[-1]
            in_turn = tuple(m for m in range(first, last + 1) if m not in world.refused)
            regrouped = regrouped or in_turn != rows[at].inputs
            rows = put(rows, at, rows[at]._replace(inputs=in_turn))
            stop = CANCELLED if rows[at].stop == UNSAID else rows[at].stop
            known = rows[at].known
        if self.guards.try_remembered and ended and ended[-1].outcome == ABSORBED:
            rolled_back = frozenset(ended[-1].inputs)
        owner = Owner(stop=stop, converges=self.guards.stop_resumed, rolled_back=rolled_back)
        brains = _that_may_act(tuple(brain._replace(live=False) for brain in world.brains), rows)
        left = world.takeovers_left - 1
        after = world._replace(takeovers_left=left, rows=rows, owner=owner, brains=brains, regrouped=regrouped)
        for message in range(world.done, world.stored):
            if message not in world.refused and message not in in_turn:
                after = self._arrive(after, message, stops=message >= known)
        return after


def _changed(world: World, brain: Brain, after: Brain) -> World:
    """The world after a step of a brain, without the brains that nothing depends on any more."""
    brains = tuple(after if other == brain else other for other in world.brains)
    return world._replace(brains=_that_may_act(brains, world.rows))


def _that_may_act(brains: tuple[Brain, ...], rows: tuple[Row, ...]) -> tuple[Brain, ...]:
    """The brains of turns that run, and others only if they may still ask for their call."""

    def may(brain: Brain) -> bool:
        confirmed = brain.call != NOTHING and brain.result == NOTHING
        return confirmed or (brain.live and not rows[brain.row].outcome)

    return tuple(brain._replace(live=brain.live and not rows[brain.row].outcome) for brain in brains if may(brain))
