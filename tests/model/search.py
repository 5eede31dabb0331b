"""Breadth-first search over every interleaving of a model: the shortest way to break a promise, or proof that none is.

A model is a start state and the steps that may come next; the search knows nothing else of it. States are compared by
value, so every field of a state is hashable and immutable.
"""

import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

State = TypeVar("State", bound=Hashable)
NO_WAY_ON = "no way on: what was promised cannot happen any more"


class Step(NamedTuple, Generic[State]):
    """One thing that may happen next."""

    label: str
    state: State
    fault: bool = False  # something that goes wrong; nothing may depend on its happening


class Model(Protocol[State]):
    """What the search needs of a model."""

    def initial(self) -> State:
        """Return the start state."""
        ...

    def steps(self, state: State) -> Iterator[Step[State]]:
        """Yield everything that may happen next in `state`."""
        ...

    def violations(self, state: State, *, final: bool) -> Iterator[str]:
        """Yield the promises that `state` breaks; `final` when nothing but a fault can happen any more."""
        ...

    def fulfilled(self, state: State) -> bool:
        """Tell whether everything promised has happened; asked only by a search with `progress`."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """How a search ended."""

    violation: str  # empty: none was found
    exhausted: bool  # every state was seen: without a violation this is a proof within the bounds
    states: int
    trace: tuple[str, ...]  # the steps to the violation; shortest possible
    seconds: float

    def __str__(self) -> str:
        """Say in a few words what was found."""
        return self.violation or ("holds" if self.exhausted else "none found, stopped")


def search(model: Model[State], *, most_states: int, ignoring: str = "\0", progress: bool = False) -> Finding:
    """Look at every state that can be reached, nearest first, until a promise is broken or `most_states` are seen.

    Violations whose text starts with `ignoring` are passed over. With `progress` an exhausted search also asks that
    from every state, without a fault, a state can be reached in which everything promised has happened: this finds
    livelocks, which have no final state. It keeps every transition in memory.
    """
    started, seen = time.monotonic(), 0
    first = model.initial()
    came_from: dict[State, tuple[State, str] | None] = {first: None}
    leads_here: dict[State, list[State]] = {}
    to_do = deque([first])

    def finding(violation: str, at: State | None, *, exhausted: bool) -> Finding:
        trace = _trace(came_from, at) if violation and at is not None else ()
        return Finding(violation, exhausted, seen, trace, time.monotonic() - started)

    while to_do:
        state, final = to_do.popleft(), True
        seen += 1
        for label, following, fault in model.steps(state):
            final = final and (fault or following == state)
            if progress and not fault:
                leads_here.setdefault(following, []).append(state)
            if following not in came_from:
                to_do.append(following)
                came_from[following] = (state, label)
        broken = (text for text in model.violations(state, final=final) if not text.startswith(ignoring))
        violation = next(broken, "")
        if violation or seen >= most_states:
            return finding(violation, state, exhausted=False)
    stuck = _first_stuck(model, came_from, leads_here) if progress else None
    return finding(NO_WAY_ON if stuck is not None else "", stuck, exhausted=True)


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    labels: list[str] = []
    while (before := came_from[state]) is not None:
        state, label = before
        labels.append(label)
    return tuple(reversed(labels))


def _first_stuck(
    model: Model[State], reached: dict[State, tuple[State, str] | None], leads_here: dict[State, list[State]]
) -> State | None:
    """Return the nearest state from which no fulfilled state can be reached, None if there is no such state."""
    to_do = [state for state in reached if model.fulfilled(state)]
    able = set(to_do)
    while to_do:
        for before in leads_here.get(to_do.pop(), ()):
            if before not in able:
                able.add(before)
                to_do.append(before)
    return next((state for state in reached if state not in able), None)
