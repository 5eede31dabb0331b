"""A tool call under its key, its cancel, and its compensation, as a model for `search.py`: the tool gateway's own crash
window.

Modelled: one call of a turn that changes the world, asked for again and again; processes of the gateway that die or are
held dead while they live, between the row and the run and between the run and its end; a tool that never answers; a
cancel that is asked for again; and, when the call has an end, the undoing of the turn by two instances, of which one
does not know the compensation. No step takes time: whatever may be late may come at any moment.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.model.guards import ToolGuards
from tests.model.search import Step
from tests.model.world import put

CALL: Final = 0
UNDO: Final = 1
NAMES: Final = ("call", "compensation")
FINAL: Final = frozenset({"done", "failed", "cancelled", "unknown"})

RAN_TWICE: Final = "I4 an effect twice"
UNDONE_TWICE: Final = "I4 a compensation twice"
RAN_CANCELLED: Final = "I4 an effect of a call that was told to be cancelled"
CHANGED: Final = "I4 two answers for one key"
REVERT_CHANGED: Final = "I4 two answers about one turn"
STAYS: Final = "I4 an effect of a turn that was told to be reverted"
UNDONE: Final = "I4 a call was taken back, and its turn told to have kept it"


class Row(NamedTuple):
    """A call in the database."""

    state: str  # running, or one of FINAL
    claim: int = 0  # of the attempt that runs it


class Run(NamedTuple):
    """One attempt of a process to own a call and run it."""

    key: int
    phase: str  # asked; found: it has seen that there is no row; owns; ran
    claim: int = 0


class Reverter(NamedTuple):
    """An instance that is asked to undo the turn; the second one does not know the compensation."""

    phase: str = "idle"  # idle, undoing, told
    began: bool = False  # it has begun the compensation


class Left(NamedTuple):
    """How often each thing may still happen."""

    asks: int
    cancels: int
    deaths: int
    hangs: int = 0


class Calls(NamedTuple):
    """The two keys of a turn, and who works on them."""

    left: Left
    rows: tuple[Row | None, Row | None] = (None, None)
    effects: tuple[int, int] = (0, 0)
    told: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    runs: tuple[Run, ...] = ()  # sorted
    claims: int = 0
    cancel: str = "idle"  # idle, waits, decides: it is about to give up without looking again
    reverters: tuple[Reverter, Reverter] = (Reverter(), Reverter())
    decided: str = ""  # what is stored about the turn: undoing, reverted or kept
    reverted: frozenset[str] = frozenset()  # what was told about the turn


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """One call and its compensation, with some of the guards; `repeatable`: the tools may see a key twice."""

    guards: ToolGuards
    left: Left
    repeatable: bool = False

    def initial(self) -> Calls:
        """Return the start: nobody has asked for anything."""
        return Calls(self.left)

    def steps(self, calls: Calls) -> Iterator[Step[Calls]]:
        """Yield what callers, processes, their deaths, cancels and reverts may do next."""
        if calls.left.asks:
            asked = _begin(calls, Run(CALL, "asked"))
            yield Step("the call is asked for", asked._replace(left=calls.left._replace(asks=calls.left.asks - 1)))
        for run in dict.fromkeys(calls.runs):
            yield from self._run_steps(calls, run)
        for key in (CALL, UNDO):
            yield from self._held_dead(calls, key)
        yield from self._cancel_steps(calls)
        for number in (0, 1):
            yield from self._revert_steps(calls, number)

    def violations(self, calls: Calls, *, final: bool) -> Iterator[str]:
        """Yield the promises that `calls` breaks."""
        if calls.effects[CALL] > 1:
            yield RAN_TWICE
        if calls.effects[UNDO] > 1:
            yield UNDONE_TWICE
        if "cancelled" in calls.told[CALL] and calls.effects[CALL]:
            yield RAN_CANCELLED
        if any(len(told) > 1 for told in calls.told):
            yield CHANGED
        if len(calls.reverted) > 1:
            yield REVERT_CHANGED
        if "reverted" in calls.reverted and calls.effects[CALL] and not calls.effects[UNDO]:
            yield STAYS
        if "kept" in calls.reverted and _state(calls, UNDO) == "done":
            yield UNDONE

    def fulfilled(self, calls: Calls) -> bool:
        """Tell whether the turn was told what became of it."""
        return bool(calls.reverted)

    def _run_steps(self, calls: Calls, run: Run) -> Iterator[Step[Calls]]:
        name, row = NAMES[run.key], calls.rows[run.key]
        match run.phase:
            case "asked" if row is not None and row.state in FINAL:
                yield Step(f"{name}: who asked is told", _tell(_end(calls, run), run.key, row.state))
            case "asked" if row is None and not self.guards.claim_first:
                yield Step(f"{name}: is begun without a row", self._claimed(calls, run, row_too=False))
            case "asked" if row is None and self.guards.unique_key:
                yield Step(f"{name}: is claimed", self._claimed(calls, run))
            case "asked" if row is None:
                yield Step(f"{name}: nobody has it", _change(calls, run, run._replace(phase="found")))
            case "found":
                yield Step(f"{name}: is claimed by who found nobody", self._claimed(calls, run))
            case "owns":
                yield Step(f"{name}: the tool runs", self._ran(calls, run))
                if run.key == UNDO:
                    yield Step(f"{name}: the tool refuses", self._stored(calls, run, "failed"))
                elif calls.left.hangs:
                    silent = calls._replace(left=calls.left._replace(hangs=calls.left.hangs - 1))
                    hangs = _change(self._ran(silent, run), run._replace(phase="ran"), run._replace(phase="hangs"))
                    yield Step(f"{name}: the tool runs and never answers", hangs, fault=True)
            case "ran":
                yield Step(f"{name}: its result is stored", self._stored(calls, run, "done"))
            case _:
                pass
        if calls.left.deaths:
            died = _end(calls, run)._replace(left=calls.left._replace(deaths=calls.left.deaths - 1))
            yield Step(f"{name}: its process dies, {run.phase}", died, fault=True)

    def _claimed(self, calls: Calls, run: Run, *, row_too: bool = True) -> Calls:
        claim = calls.claims + 1
        owned = _change(calls, run, run._replace(phase="owns", claim=claim))._replace(claims=claim)
        return _store(owned, run.key, Row("running", claim)) if row_too else owned

    def _ran(self, calls: Calls, run: Run) -> Calls:
        same_again = self.repeatable and (run.key == CALL or self.guards.undo_key)
        times = 1 if same_again else calls.effects[run.key] + 1
        effects = put(calls.effects, run.key, min(times, 2))
        return _change(calls, run, run._replace(phase="ran"))._replace(effects=(effects[0], effects[1]))

    def _stored(self, calls: Calls, run: Run, state: str) -> Calls:
        """The end of a run: of its row if that is still the one it claimed."""
        row = calls.rows[run.key]
        if row is None or row == Row("running", run.claim) or not self.guards.one_end:
            return _tell(_store(_end(calls, run), run.key, Row(state, run.claim)), run.key, state)
        return _change(calls, run, Run(run.key, "asked"))  # Late: whoever still waits for it looks what is stored.

    def _held_dead(self, calls: Calls, key: int) -> Iterator[Step[Calls]]:
        """Somebody who waits for a call holds its runner dead, which may be wrong."""
        row = calls.rows[key]
        if row is None or row.state != "running":
            return
        is_dead = not any(run.key == key and run.claim == row.claim for run in calls.runs)
        if not is_dead and not calls.left.deaths:
            return
        left = calls.left if is_dead else calls.left._replace(deaths=calls.left.deaths - 1)
        after, name = calls._replace(left=left), NAMES[key]
        if self.repeatable or not self.guards.never_again:
            again = Run(key, "asked")
            yield Step(f"{name}: is run again", self._claimed(_begin(after, again), again), fault=not is_dead)
        if not self.repeatable or calls.cancel == "waits":
            settled = _store(after, key, row._replace(state="unknown"))
            yield Step(f"{name}: its runner is held dead", settled, fault=not is_dead)

    def _cancel_steps(self, calls: Calls) -> Iterator[Step[Calls]]:
        row, left = calls.rows[CALL], calls.left
        if calls.cancel == "decides":
            given_up = _store(calls, CALL, Row("unknown", row.claim if row is not None else 0))
            yield Step("cancel: gives up", given_up._replace(cancel="waits"))
        elif calls.cancel == "waits" and row is not None and row.state in FINAL:
            yield Step("cancel: tells the end", _tell(calls, CALL, row.state)._replace(cancel="idle"))
        elif calls.cancel == "waits" and row is not None and self.guards.give_up:
            if self.guards.one_end:
                yield Step("cancel: gives up", _store(calls, CALL, row._replace(state="unknown")))
            else:
                yield Step("cancel: is going to give up", calls._replace(cancel="decides"))
        elif calls.cancel == "idle" and left.cancels:
            asked = calls._replace(left=left._replace(cancels=left.cancels - 1), cancel="waits")
            if row is not None:
                yield Step("cancel: waits for the end", asked)
            elif self.guards.call_tombstone:
                yield Step("cancel: stores a tombstone", _store(asked, CALL, Row("cancelled")))
            else:
                yield Step("cancel: nothing to cancel", _tell(asked, CALL, "cancelled")._replace(cancel="idle"))

    def _revert_steps(self, calls: Calls, number: int) -> Iterator[Step[Calls]]:
        reverter, has_tool = calls.reverters[number], number == 0
        name = f"revert {number}"
        match reverter.phase:
            case "idle" if calls.decided in ("reverted", "kept"):
                yield Step(f"{name}: told what was decided", _revert_told(calls, number, calls.decided))
            case "idle" if calls.told[CALL]:  # Every call of the turn has an end.
                look = calls.decided or self._first_look(calls, has_tool)
                if look != "undoing":
                    yield Step(f"{name}: {look}, nothing is undone", self._decided(calls, number, look))
                else:
                    stored = calls._replace(decided=look) if self.guards.first_look else calls
                    yield Step(f"{name}: is to undo", _revert_goes_on(stored, number, Reverter("undoing")))
            case "undoing":
                yield from self._undo_steps(calls, number, has_tool)
                if calls.left.deaths:
                    died = calls._replace(left=calls.left._replace(deaths=calls.left.deaths - 1))
                    yield Step(f"{name}: its process dies", _revert_goes_on(died, number, Reverter()), fault=True)
            case _:
                pass

    def _first_look(self, calls: Calls, has_tool: bool) -> str:
        state = _state(calls, CALL)
        if state == "cancelled" or (state == "unknown" and not self.guards.doubt_stays):
            return "reverted"
        return "undoing" if state == "done" and has_tool else "kept"

    def _undo_steps(self, calls: Calls, number: int, has_tool: bool) -> Iterator[Step[Calls]]:
        """The compensation as a call of its own; who does not know its tool sees to it that it has an end."""
        name, reverter, row = f"revert {number}", calls.reverters[number], calls.rows[UNDO]
        if has_tool and not reverter.began and not (self.guards.undo_key and row is not None):
            run = Run(UNDO, "asked")
            begun = _revert_goes_on(_begin(calls, run), number, reverter._replace(began=True))
            if self.guards.undo_key:
                yield Step(f"{name}: asks for the compensation", begun)
            else:
                yield Step(f"{name}: runs a compensation", self._claimed(begun, run))
        elif row is not None and row.state in FINAL:
            result = "reverted" if row.state == "done" else "kept"
            yield Step(f"{name}: {result}", self._decided(calls, number, result))
        elif not has_tool and not self.guards.gone_settles:
            yield Step(f"{name}: has no such tool", self._decided(calls, number, "kept"))
        elif not has_tool and row is None:
            yield Step(f"{name}: has no such tool, tombstone", _store(calls, UNDO, Row("cancelled")))

    def _decided(self, calls: Calls, number: int, result: str) -> Calls:
        """The end of the undoing; the first that is stored counts."""
        if calls.decided in ("reverted", "kept"):
            result = calls.decided
        return _revert_told(calls._replace(decided=result), number, result)


def _state(calls: Calls, key: int) -> str:
    row = calls.rows[key]
    return row.state if row is not None else ""


def _store(calls: Calls, key: int, row: Row) -> Calls:
    call, undo = put(calls.rows, key, row)
    return calls._replace(rows=(call, undo))


def _tell(calls: Calls, key: int, state: str) -> Calls:
    call, undo = put(calls.told, key, calls.told[key] | {state})
    return calls._replace(told=(call, undo))


def _begin(calls: Calls, run: Run) -> Calls:
    return calls._replace(runs=tuple(sorted((*calls.runs, run))))


def _end(calls: Calls, run: Run) -> Calls:
    at = calls.runs.index(run)
    return calls._replace(runs=calls.runs[:at] + calls.runs[at + 1 :])


def _change(calls: Calls, run: Run, after: Run) -> Calls:
    return _begin(_end(calls, run), after)


def _revert_goes_on(calls: Calls, number: int, reverter: Reverter) -> Calls:
    first, second = put(calls.reverters, number, reverter)
    return calls._replace(reverters=(first, second))


def _revert_told(calls: Calls, number: int, result: str) -> Calls:
    return _revert_goes_on(calls, number, Reverter("told"))._replace(reverted=calls.reverted | {result})
