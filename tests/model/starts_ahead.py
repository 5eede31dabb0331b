"""The turn protocol where brains are given turns ahead: before the transaction that starts them is committed.

To `turns.py` this adds: transactions that are on their way to the database, which may take them at any later moment,
even when the router that sent them has crashed, has lost its connection or does not own the partition any more; turns
that are started by a transaction, and dispatched under numbers that are durable but for the first one, which a brain
may see before; finals that are there when the start is sent, and share its transaction; live text. What a brain says
carries turn and dispatch, and comes by the link between this router and this brain: nothing else says which start it
belongs to. A router that owns a partition again after it lost its connection has its links still; one that has crashed
has not.

Whether a turn is given ahead is not determined, as a brain may have no room, or run the turn for another router and
decline it; both are a start that waits for its transaction, and counts as one more dispatch. Nor is it determined
when: from the moment that its message can be read, whatever else is being written. Text is shown as soon as it may be,
which is the worst that can happen.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

from tests.model.search import Step
from tests.model.transactions import QUEUED, Dispatch, EndTurn, Ingest, Partition, Rules
from tests.model.turns import Steps, TurnProtocol, unused_brain
from tests.model.world import Brain, Flight, Pending, Router, Text, World, give_up_term, put

LINK_LOST: Final = -1  # a brain's term when nothing that it says arrives any more


@dataclass(frozen=True, slots=True)
class StartsAhead(TurnProtocol):
    """The protocol with turns that are given ahead of their start."""

    early: bool = False  # turns are also given before their start is sent

    def steps(self, world: World) -> Steps:
        """Yield what may happen next; the database may take what is on its way."""
        yield from TurnProtocol.steps(self, world)
        for flight in world.flights:
            if flight.taken is None:
                yield self._take(world, flight)

    # -- routers

    def _router(self, world: World, number: int, router: Router) -> Steps:
        """A router has one transaction on its way at a time, and while it has one commits nothing else."""
        yield from self._lease(world, number, router)
        if router.term is None:
            return
        flight = next((f for f in world.flights if (f.router, f.term) == (number, router.term)), None)
        if flight is not None:
            if flight.taken is not None:
                yield self._see(world, number, router, flight)
            if self.early and flight.taken is not False:
                yield from self._give_next(world, number, router, flight)
        elif router.pending:
            name = type(router.pending.transaction).__name__
            yield Step(f"r{number} COMMITS {name}", self._apply(world, number, router.pending))
        else:
            if self.early:
                yield from self._give_next(world, number, router, None)
            yield from self._ingest(world, number, router)
            yield from self._dispatch(world, number, router)
            yield from self._journal(world, number, router)
        left = world.left
        if left.crash:
            left = left._replace(crash=left.crash - 1)
            yield Step(f"r{number} crashes", self._crash(world, number)._replace(left=left), fault=True)
        if left.line_loss:
            left = left._replace(line_loss=left.line_loss - 1)
            yield Step(f"r{number} loses its connection", give_up_term(world, number)._replace(left=left), fault=True)

    def _lease(self, world: World, number: int, router: Router) -> Steps:
        """A router that takes a lease again has ended the term in which it lost it."""
        if router.term is not None and (number, router.term) != world.database.owner:
            world = give_up_term(world, number)
        yield from TurnProtocol._lease(self, world, number, world.routers[number])

    def _taken_over(self, rows: Partition) -> Partition:
        """A takeover raises the dispatch of every turn that it finds started."""
        turns = (
            turn._replace(dispatch=turn.dispatch + 1) if turn.dispatch and turn.status == QUEUED else turn
            for turn in rows.turns
        )
        return rows._replace(turns=tuple(turns))

    def _crash(self, world: World, number: int) -> World:
        """A crash ends the links too. Brains end what came by them; who was confirmed may still act."""
        after = give_up_term(world, number)
        idle = after.routers[number]._replace(withdrawn=frozenset())
        brains = frozenset(
            brain if brain.router != number else brain._replace(term=LINK_LOST)
            for brain in after.brains
            if brain.router != number or brain.journaled or not self.guards.confirm
        )
        return after._replace(brains=brains, routers=put(after.routers, number, idle))

    def _take_in(self, world: World, number: int, ingest: Ingest) -> Steps:
        """Messages that find their session idle are stored with the start of their turn."""
        view = world.routers[number].view
        following = ingest.apply(view, self._rules())
        if following is None:
            return
        starts = self._starts(view, following, ingest, set(self._first_open(view)))
        names = [message for _, message in ingest.batch]
        for ends in self._finals(world, number, starts):
            what = f"ingest of {names}" + "".join(f" and the end of turn {end.position}" for end in ends)
            yield from self._send(world, number, replace(ingest, starts=starts, ends=ends), what)

    def _starts(self, view: Partition, following: Partition, ingest: Ingest, busy: set[int]) -> tuple[int, ...]:
        """Return the turns that start with what is ingested: of sessions that are not busy, also for retries."""
        starts = []
        for _, message in ingest.batch:
            if self.sessions[message] not in busy:
                busy.add(self.sessions[message])
                known = self.guards.dedupe and message in view.mailbox
                mailbox = view.mailbox if known else following.mailbox
                starts.append(mailbox.index(message, 0 if known else len(view.mailbox)))
        return tuple(starts)

    def _dispatch(self, world: World, number: int, router: Router) -> Steps:
        """The owner starts, dispatches or cancels the first open turn of each session."""
        view = router.view
        current = self._current(world, number, router)
        for position in self._first_open(view).values():
            if not view.turns[position].dispatch:
                yield from self._send(world, number, Dispatch(position), f"start of turn {position}")
                continue
            busy = any(brain.turn == position for brain in current)
            if not busy or world.left.redispatch:
                yield self._dispatch_again(world, number, position, busy=busy)
            if world.left.cancel and self.tool:
                yield self._cancel(world, number, view, position)

    def _dispatch_again(self, world: World, number: int, position: int, *, busy: bool) -> Step[World]:
        """Raise the dispatch durably, then give the turn to a brain.

        A number that this router has not given is not raised: to raise it changes nothing, and a turn that is
        dispatched for ever, as its call is tombstoned and it is not cancelled, would count for ever.
        """
        if self._fenced(world, number):
            return Step(f"r{number} finds its lease lost", give_up_term(world, number))
        given = {text[:2] for text in world.shown} | {
            (brain.turn, brain.dispatch)
            for brain in world.brains
            if brain.router == number and brain.term != LINK_LOST and (self.guards.withdrawn or not brain.stopped)
        }
        present = (position, world.routers[number].view.turns[position].dispatch)
        raised = self._apply(world, number, Pending(Dispatch(position), None)) if present in given else world
        router = raised.routers[number]
        if router.term is None:
            return Step(f"r{number} is refused a dispatch of turn {position}", raised)
        label, after, _ = self._start(raised, number, router, position, busy=busy)
        return Step(label, self._show(after, number))

    def _fenced(self, world: World, number: int) -> bool:
        router, rows = world.routers[number], world.database
        other_term = self.guards.unique_term and (number, router.term) != rows.owner
        return self.guards.fence and (router.epoch != rows.epoch or other_term)

    # -- ahead of the start

    def _give_next(self, world: World, number: int, router: Router, flight: Flight | None) -> Steps:
        """A turn is given to a brain before the transaction with its start is sent."""
        view, sent = router.view, flight.transaction if flight else None
        if sent is not None:
            starting = replace(sent, ends=()) if isinstance(sent, Ingest) else sent  # no end counts before it is seen
            view = starting.apply(view, self._rules()) or view
        start, end = max(view.cursor, world.purged), len(world.inbound)
        if start >= end:
            return
        batch = world.inbound[start:end]
        following = Ingest((view.cursor, view.anchor), end, batch, batch[-1].batch_id)
        after = following.apply(view, self._rules())
        if after is None:
            return
        busy = set(self._first_open(view))
        if sent is not None:
            busy |= {self.sessions[view.mailbox[turn]] for turn in sent.starts}
        for turn in self._to_give(world, number, self._starts(view, after, following, busy)):
            yield Step(f"r{number} gives turn {turn} before it sends the start", self._give(world, number, turn))

    def _to_give(self, world: World, number: int, turns: Iterable[int]) -> list[int]:
        """Return those of the turns that may be given ahead and were not."""
        spent = world.routers[number].withdrawn if self.guards.withdrawn else frozenset()
        given = {brain.turn for brain in world.brains if brain.router == number and brain.ahead}
        return [turn for turn in turns if turn not in spent | given]

    def _give(self, world: World, number: int, turn: int) -> World:
        router, new = world.routers[number], unused_brain(world)
        assert router.term is not None, "only owners give turns"
        brain = Brain(new, number, router.term, turn, 0, False, new, 0, 1, ahead=True)
        given = world._replace(brains=world.brains | {brain})
        return given if self.guards.held else given._replace(shown=given.shown | {Text(turn, 1, new)})

    def _send(self, world: World, number: int, transaction: Ingest | Dispatch, what: str) -> Steps:
        """A transaction goes on its way; the turns that it starts may be given to brains at the same time."""
        router = world.routers[number]
        assert router.term is not None, "only owners send"
        if not self.guards.fence_lock and self._fenced(world, number):  # read now, and not again
            yield Step(f"r{number} finds its lease lost", give_up_term(world, number))
            return
        sent = world._replace(flights=world.flights | {Flight(number, router.epoch, router.term, transaction)})
        yield Step(f"r{number} sends the {what}", sent)
        free = self._to_give(world, number, transaction.starts)
        for turn in free:
            sent = self._give(sent, number, turn)
        if free:
            yield Step(f"r{number} sends the {what}, gives {free} ahead", sent)

    def _finals(self, world: World, number: int, starts: tuple[int, ...]) -> Iterator[tuple[EndTurn, ...]]:
        """Yield which finals may be there when the starts are sent: none, or some of turns that were given before. What
        was said before a stop is taken for the word of who runs the turn by the same link and number now.
        """
        if self.tool:
            yield ()
            return
        mine = sorted(brain for brain in world.brains if brain.router == number and brain.term != LINK_LOST)
        given = {brain.turn for brain in mine if brain.ahead and brain.turn in starts}
        ends = [
            EndTurn(brain.turn, brain.inputs_read, brain.number)
            for brain in mine
            if brain.turn in given and brain.dispatch == 1 and (brain.ahead or brain.stopped)
        ]
        for count in range(len(given) + 1):
            yield from (some for some in combinations(ends, count) if len({end.position for end in some}) == count)

    def _take(self, world: World, flight: Flight) -> Step[World]:
        """The database takes a transaction or refuses it. Who sent it may not be there any more to see that."""
        rows, router = world.database, world.routers[flight.router]
        current = (flight.router, flight.term) == rows.owner
        same = flight.epoch == rows.epoch and (current or not self.guards.unique_term)
        passes = same or not self.guards.fence or not self.guards.fence_lock
        after = flight.transaction.apply(rows, self._rules()) if passes else None
        stale = world.stale
        if after is not None and not current and not stale:
            stale = f"I2 stale commit: {type(flight.transaction).__name__}"
        flights = world.flights - {flight}
        label = f"the database {'takes' if after else 'refuses'} what r{flight.router} sent"
        if (router.epoch, router.term) == (flight.epoch, flight.term):
            sent = flight.transaction
            if passes and self.guards.whole and isinstance(sent, Ingest) and sent.is_torn(rows, self._rules()):
                flights |= {flight._replace(transaction=replace(sent, ends=()))}
                label += ", which goes again without the ends"
            else:
                flights |= {flight._replace(taken=after is not None)}
        return Step(label, world._replace(database=after or rows, flights=flights, stale=stale))

    def _see(self, world: World, number: int, router: Router, flight: Flight) -> Step[World]:
        """The router learns what became of its transaction: what was said of a turn counts from now on, or never."""
        landed = world._replace(flights=world.flights - {flight})
        if not flight.taken:
            return Step(f"r{number} sees itself refused", give_up_term(landed, number))
        before, view = router.view, flight.transaction.apply(router.view, self._rules()) or router.view
        brains, withdrawn, shown = set(), set(router.withdrawn), set(world.shown)
        ended = {end.position for end in _ends(flight.transaction)}
        for brain in world.brains:
            if brain.router != number or not brain.ahead or brain.turn not in flight.transaction.starts:
                brains.add(brain)
                continue
            former, turn = before.turn(brain.turn), view.turn(brain.turn)
            started = turn is not None and turn.dispatch == 1 and (former is None or former.dispatch == 0)
            if started and brain.turn in ended:  # the start is seen, then what was held, then the end
                shown.add(Text(brain.turn, 1, brain.number))
            elif started or not self.guards.held:
                brains.add(brain._replace(ahead=False))
            else:
                withdrawn.add(brain.turn)
                brains.add(brain._replace(ahead=False, stopped=True))
        knows = router._replace(view=view, withdrawn=frozenset(withdrawn))
        seen = landed._replace(
            brains=frozenset(brains), shown=frozenset(shown), routers=put(world.routers, number, knows)
        )
        return Step(f"r{number} sees its transaction committed", self._show(seen, number))

    # -- what brains say

    def _current(self, world: World, number: int, router: Router) -> list[Brain]:
        """Return the brains that run a turn for the owner, as far as it knows."""
        turns = router.view.turns
        return [
            brain
            for brain in world.brains
            if (brain.router, brain.term) == (number, router.term)
            and not (brain.ahead or brain.stopped)
            and not (self.guards.dispatch_id and brain.dispatch != turns[brain.turn].dispatch)
        ]

    def _speakers(self, world: World, number: int, router: Router) -> list[tuple[Brain, int]]:
        """What was said before a stop is taken for the word of who runs the turn by the same link and number now."""
        current = self._current(world, number, router)
        running = {(brain.turn, brain.dispatch): brain for brain in current}
        speakers = [(brain, brain.number) for brain in current]
        for brain in world.brains:
            if brain.router == number and brain.stopped and brain.term != LINK_LOST:
                now = running.get((brain.turn, brain.dispatch))
                if now is not None and now.journaled == 0:
                    speakers.append((brain, now.number))
        return speakers

    def _show(self, world: World, number: int) -> World:
        """Show what is said of first steps."""
        speakers = self._speakers(world, number, world.routers[number])
        texts = {Text(brain.turn, brain.dispatch, brain.number) for brain, _ in speakers if brain.journaled == 0}
        return world._replace(shown=world.shown | texts)

    def _rules(self) -> Rules:
        return Rules(self.guards, self.sessions, self.steer, self.tool)


def _ends(transaction: Ingest | Dispatch) -> tuple[EndTurn, ...]:
    return transaction.ends if isinstance(transaction, Ingest) else ()
