"""A turn that kills the router which runs it, among turns that do not, as a model for `search.py`.

Modelled: one partition whose turns wait, run, and end or are parked as dead letters; an owner that runs several at
once; a poison turn that kills the owner sooner or later whenever it runs; a few crashes with other causes. The brain's
death is the same story: the owner then raises the count itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.guards import PoisonGuards
from tests.model.search import Step
from tests.model.world import put

POISON = 0  # the turn that kills
MOST_STRIKES = 3
PARKED_INNOCENT = "I1 a turn was parked for what another one did"


class Turn(NamedTuple):
    """A turn in the database."""

    started: bool = False  # journaled
    strikes: int = 0  # how often its owner died while it ran
    ended: bool = False
    parked: bool = False


class Partition(NamedTuple):
    """The turns of a partition and what its owner does."""

    turns: tuple[Turn, ...]
    running: frozenset[int] | None  # None: the owner is dead
    crashes_left: int


@dataclass(frozen=True, slots=True)
class PoisonedPartition:
    """Some turns, one of them poison, with some of the guards."""

    guards: PoisonGuards
    turns: int
    crashes: int

    def initial(self) -> Partition:
        """Return the start: all turns wait."""
        return Partition((Turn(),) * self.turns, frozenset(), self.crashes)

    def steps(self, partition: Partition) -> Iterator[Step[Partition]]:
        """Yield what the owner, its death and its successor may do next."""
        if partition.running is None:
            yield self._take_over(partition)
            return
        for number, turn in enumerate(partition.turns):
            if number in partition.running:
                if number != POISON:
                    ended = put(partition.turns, number, turn._replace(ended=True))
                    after = partition._replace(turns=ended, running=partition.running - {number})
                    yield Step(f"turn {number} ends", after)
            elif not turn.ended and not turn.parked and self._may_start(partition.turns, partition.running, number):
                journaled = turn._replace(started=True) if self.guards.start_journaled else turn
                turns = put(partition.turns, number, journaled)
                running = partition.running | {number}
                yield Step(f"turn {number} starts", partition._replace(turns=turns, running=running))
        if POISON in partition.running:
            yield Step("the poison kills the owner", partition._replace(running=None))
        if partition.crashes_left:
            crashed = partition._replace(running=None, crashes_left=partition.crashes_left - 1)
            yield Step("the owner dies of something else", crashed, fault=True)

    def violations(self, partition: Partition, *, final: bool) -> Iterator[str]:
        """Yield the promises that `partition` breaks."""
        if any(turn.parked for number, turn in enumerate(partition.turns) if number != POISON):
            yield PARKED_INNOCENT

    def fulfilled(self, partition: Partition) -> bool:
        """Tell whether every turn has an outcome."""
        return all(turn.ended or turn.parked for turn in partition.turns)

    def _may_start(self, turns: tuple[Turn, ...], running: frozenset[int], number: int) -> bool:
        """A suspect waits until no other suspect runs; what is no suspect may run beside it."""
        if not self.guards.suspects_alone or not turns[number].strikes:
            return True
        return not any(turns[other].strikes for other in running)

    def _take_over(self, partition: Partition) -> Step[Partition]:
        turns = tuple(self._after_takeover(turn) for turn in partition.turns)
        return Step("a new owner takes over", partition._replace(turns=turns, running=frozenset()))

    def _after_takeover(self, turn: Turn) -> Turn:
        if not turn.started or turn.ended or turn.parked or not self.guards.strikes_durable:
            return turn._replace(started=False)
        strikes = turn.strikes + 1
        return turn._replace(started=False, strikes=strikes, parked=strikes == MOST_STRIKES)
