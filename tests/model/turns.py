"""The turn protocol from the accept to the committed outcome, and the relay of events, as a model for `search.py`.

Modelled: clients that retry; one inbound stream with purge; one partition row; mailbox, turns (one tool call, its
result, the final), history and events; relay to an unsynced out stream and its consumer; a tool gateway; routers that
hold a copy of the database; brains bound to a dispatch. A lease may expire at any moment, which covers any clock; a
pause is "is not scheduled", so any router or brain may be a zombie for any time; a crash forgets local state; what a
model says is not determined. Publish and its ack are one step (no ack is a retry), so are a commit and its confirmation
(a lost confirmation is a brain that crashes right after it, a late one a brain that is paused). Here a brain is given a
turn when its start is committed; `starts_ahead.py` has it given while the start is on its way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.model.guards import TurnGuards
from tests.model.search import Step
from tests.model.transactions import (
    CALL_STEP,
    QUEUED,
    RESULT,
    RESULT_STEP,
    CancelTurn,
    EndTurn,
    Event,
    Ingest,
    Journal,
    JournalEntry,
    Partition,
    Published,
    Rules,
    Transaction,
)
from tests.model.turn_promises import broken_promises
from tests.model.world import Brain, Confirmation, Effect, Faults, Pending, Router, World, give_up_term, put

Steps = Iterator[Step[World]]


@dataclass(frozen=True, slots=True)
class TurnProtocol:
    """The protocol with some of its guards, for some messages and some faults."""

    guards: TurnGuards
    sessions: tuple[int, ...]  # per message: its session
    faults: Faults
    retries: int = 1  # how often the client repeats its first message
    relay: bool = False
    steer: bool = False
    tool: bool = True
    purge: bool = False

    def initial(self) -> World:
        """Return the start: router 0 owns the partition, nothing is sent."""
        rows = Partition(1, (0, 1), 0, 0, (), (), (), (), 0)
        standby = rows if self.faults.failover else None
        routers = (Router(1, 1, rows), Router(0, None, rows))
        unsent = (0,) * len(self.sessions)
        return World(
            (), 0, unsent, rows, standby, routers, frozenset(), (), frozenset(), (), 0, (), self.faults, 0, 1, ""
        )

    def steps(self, world: World) -> Steps:
        """Yield what clients, routers, brains, the consumer and bad luck may do next."""
        yield from self._clients(world)
        for number, router in enumerate(world.routers):
            yield from self._router(world, number, router)
        for brain in world.brains:
            yield from self._brain(world, brain)
        yield from self._consumer(world)
        yield from self._bad_luck(world)

    def violations(self, world: World, *, final: bool) -> Iterator[str]:
        """Yield the promises that `world` breaks."""
        return broken_promises(world, self.sessions, self.faults, self.guards, relay=self.relay, final=final)

    def fulfilled(self, world: World) -> bool:
        """Tell whether every message has been answered."""
        return len(world.database.history) == len(self.sessions)

    # -- clients and consumer

    def _clients(self, world: World) -> Steps:
        """A client sends the next message of a session after the former was acknowledged, and may repeat message 0."""
        for message, session in enumerate(self.sessions):
            most_repeats = self.retries if message == 0 else 0
            before = (world.sent[m] for m in range(message) if self.sessions[m] == session)
            if world.sent[message] <= most_repeats and all(before):
                batch_id = world.last_batch_id + 1
                yield Step(
                    f"client sends m{message}",
                    world._replace(
                        inbound=(*world.inbound, Published(batch_id, message)),
                        last_batch_id=batch_id,
                        sent=put(world.sent, message, world.sent[message] + 1),
                    ),
                )

    def _consumer(self, world: World) -> Steps:
        if world.read < len(world.out):
            event, received = world.out[world.read], world.received
            if self.guards.event_ids:
                seen = event in received
            else:
                seen = bool(received) and event.position <= received[-1].position
            if not (self.guards.consumer_dedupe and seen):
                received = (*received, event)
            yield Step(f"consumer reads e{event.position}", world._replace(read=world.read + 1, received=received))

    # -- routers

    def _router(self, world: World, number: int, router: Router) -> Steps:
        yield from self._lease(world, number, router)
        if router.term is None:
            return
        if router.pending:
            name = type(router.pending.transaction).__name__
            yield Step(f"r{number} COMMITS {name}", self._apply(world, number, router.pending))
            return
        yield from self._ingest(world, number, router)
        yield from self._dispatch(world, number, router)
        yield from self._journal(world, number, router)
        if self.relay:
            yield from self._relay(world, number, router)
        if world.left.crash:
            left = world.left._replace(crash=world.left.crash - 1)
            yield Step(f"r{number} crashes", give_up_term(world, number)._replace(left=left), fault=True)

    def _lease(self, world: World, number: int, router: Router) -> Steps:
        """A router takes a lease that nobody holds or, as often as the faults allow, one that somebody does."""
        rows, (owner, owners_term) = world.database, world.database.owner
        dead = (world.routers[owner].epoch, world.routers[owner].term) != (rows.epoch, owners_term)
        if not dead and (owner == number or not world.left.takeover):
            return
        if not self.guards.load_after and not router.loaded:
            loaded = Router(0, None, rows, loaded=True)
            yield Step(f"r{number} loads", world._replace(routers=put(world.routers, number, loaded)))
            return
        left = world.left if dead else world.left._replace(takeover=world.left.takeover - 1)
        term = world.last_term + 1
        taken = self._taken_over(rows)._replace(epoch=rows.epoch + 1, owner=(number, term))
        view = taken if self.guards.load_after else router.view._replace(epoch=taken.epoch, owner=taken.owner)
        if self.guards.relay_from_stream:
            view = view._replace(relayed=self._held(world, view.events))
        owner_now = put(world.routers, number, Router(taken.epoch, term, view, withdrawn=router.withdrawn))
        yield Step(
            f"r{number} takes the lease, epoch {taken.epoch}",
            world._replace(database=taken, left=left, last_term=term, routers=owner_now),
        )

    def _taken_over(self, rows: Partition) -> Partition:
        """Return what a takeover makes of the rows, beside who owns them."""
        return rows

    def _ingest(self, world: World, number: int, router: Router) -> Steps:
        """The owner reads on from its cursor, one message or all, and purges what it needs no more."""
        view, end = router.view, len(world.inbound)
        position = (view.cursor, view.anchor)
        if self.guards.anchor and view.cursor > world.purged:
            there = world.inbound[view.cursor - 1].batch_id if view.cursor <= end else 0
            if there != view.anchor:  # the stream went back: read again all that it holds
                again = Ingest(position, world.purged, (), 0)
                yield Step(f"r{number} resets the cursor", self._commit(world, number, again))
                return
        start = max(view.cursor, world.purged)  # a reader is given what is still there
        for to in {start + 1, end}:
            if start < to <= end:
                batch = world.inbound[start:to]
                ingest = Ingest(position, to, batch, batch[-1].batch_id)
                yield from self._take_in(world, number, ingest)
        if self.purge or not self.guards.purge_committed:
            top = self._purgeable(world, view.cursor)
            if world.purged < top <= end:
                yield Step(f"r{number} purges to {top}", world._replace(purged=top))

    def _take_in(self, world: World, number: int, ingest: Ingest) -> Steps:
        names = [message for _, message in ingest.batch]
        yield Step(f"r{number} ingests {names}", self._commit(world, number, ingest))

    def _purgeable(self, world: World, cursor: int) -> int:
        top = cursor if self.guards.purge_committed else len(world.inbound)
        if self.guards.purge_committed and self.guards.purge_replicated and world.standby:
            top = min(cursor, world.standby.cursor)
        return top - 1 if self.guards.anchor else top

    def _dispatch(self, world: World, number: int, router: Router) -> Steps:
        """The owner dispatches or cancels the first open turn of each session; one that looks stuck a second time."""
        view, mine = router.view, _brains_of(world, number, router)
        for position in self._first_open(view).values():
            busy = any(brain.turn == position for brain in mine)
            if not busy or world.left.redispatch:
                yield self._start(world, number, router, position, busy=busy)
            if world.left.cancel and self.tool:
                yield self._cancel(world, number, view, position)

    def _first_open(self, view: Partition) -> dict[int, int]:
        """Return each session's first open turn."""
        return {
            self.sessions[message]: position
            for position, message in reversed(list(enumerate(view.mailbox)))
            if view.turns[position].status == QUEUED
        }

    def _start(self, world: World, number: int, router: Router, position: int, *, busy: bool) -> Step[World]:
        view = router.view
        journal = view.turns[position].steps if self.guards.replay else ()
        new = unused_brain(world)
        call = journal[0].content if journal else new  # a replay asks for the journaled call
        brain = Brain(
            new,
            number,
            router.term,
            position,
            len(journal),
            False,
            call,
            len(view.further_inputs(position)),
            view.turns[position].dispatch,
        )
        mine = _brains_of(world, number, router)
        older = frozenset(
            b._replace(term=-1) if self.guards.dispatch_id and b in mine and b.turn == position else b
            for b in world.brains
        )
        left = world.left._replace(redispatch=world.left.redispatch - 1) if busy else world.left
        label = f"r{number} dispatches turn {position} to b{new}, journal {len(journal)}"
        return Step(label, world._replace(brains=older | {brain}, left=left))

    def _cancel(self, world: World, number: int, view: Partition, position: int) -> Step[World]:
        key = (position, CALL_STEP)
        call_open = self.guards.tombstone and len(view.turns[position].steps) == 1
        has_run = call_open and any(effect.key == key for effect in world.effects)
        tombstones = world.tombstones | {key} if call_open and not has_run else world.tombstones
        left = world.left._replace(cancel=world.left.cancel - 1)
        cancelled = self._commit(
            world._replace(left=left, tombstones=tombstones), number, CancelTurn(position, has_run)
        )
        return Step(f"r{number} cancels turn {position}", cancelled)

    def _journal(self, world: World, number: int, router: Router) -> Steps:
        """The owner commits what its brains propose."""
        for brain, told in self._speakers(world, number, router):
            if brain.journaled == 0 and self.tool:
                call = Journal(brain.turn, JournalEntry(CALL_STEP, brain.call))
                after = self._commit(world, number, call, Confirmation(told, CALL_STEP))
                yield Step(f"r{number} journals the call of b{brain.number}", after)
            elif brain.journaled == CALL_STEP and brain.acted:
                result = Journal(brain.turn, JournalEntry(RESULT_STEP, RESULT))
                after = self._commit(world, number, result, Confirmation(told, RESULT_STEP))
                yield Step(f"r{number} journals the result of b{brain.number}", after)
            elif brain.journaled == RESULT_STEP or not self.tool:
                end = EndTurn(brain.turn, brain.inputs_read, brain.number)
                after = self._commit(world, number, end, Confirmation(told, None))
                yield Step(f"r{number} commits the final of b{brain.number}", after)

    def _speakers(self, world: World, number: int, router: Router) -> list[tuple[Brain, int]]:
        """Return the brains that the owner listens to, and with each who is told that a step is journaled."""
        return [(brain, brain.number) for brain in _brains_of(world, number, router)]

    # -- commits

    def _commit(
        self, world: World, number: int, transaction: Transaction, confirmation: Confirmation | None = None
    ) -> World:
        """A router submits a transaction. Without the lock its fence is read now and the commit comes later."""
        router, rows = world.routers[number], world.database
        pending = Pending(transaction, confirmation)
        if self.guards.fence:
            lost = router.epoch != rows.epoch or (self.guards.unique_term and (number, router.term) != rows.owner)
            if lost:
                return give_up_term(world, number)
            if not self.guards.fence_lock:
                return world._replace(routers=put(world.routers, number, router._replace(pending=pending)))
        return self._apply(world, number, pending)

    def _apply(self, world: World, number: int, pending: Pending) -> World:
        router, (transaction, confirmation) = world.routers[number], pending
        rules = Rules(self.guards, self.sessions, self.steer, self.tool)
        rows = transaction.apply(world.database, rules)
        if rows is None:
            return self._refused(world, number, transaction)
        current = (number, router.term) == world.database.owner
        stale = world.stale or ("" if current else f"I2 stale commit: {type(transaction).__name__}")
        view = transaction.apply(router.view, rules) or router.view
        brains = _told(world.brains, confirmation) if confirmation else world.brains
        routers = put(world.routers, number, router._replace(view=view, pending=None))
        return world._replace(database=rows, stale=stale, brains=brains, routers=routers)

    def _refused(self, world: World, number: int, transaction: Transaction) -> World:
        """A final that missed inputs goes back to its brain with them; any other refusal ends the term."""
        rows, router = world.database, world.routers[number]
        if isinstance(transaction, EndTurn):
            turn = rows.turn(transaction.position)
            inputs = len(rows.further_inputs(transaction.position)) if turn and turn.status == QUEUED else 0
            if inputs > transaction.inputs_read:
                brains = frozenset(
                    brain._replace(inputs_read=inputs) if brain.number == transaction.brain else brain
                    for brain in world.brains
                )
                routers = put(world.routers, number, router._replace(view=rows, pending=None))
                return world._replace(brains=brains, routers=routers)
        return give_up_term(world, number)

    # -- relay of events to the outside

    def _relay(self, world: World, number: int, router: Router) -> Steps:
        view, held = router.view, self._held(world, router.view.events)
        look = self.guards.relay_cas and view.relayed != held
        if look or view.relayed < len(view.events):
            relayed = held if look else view.relayed + 1
            routers = put(world.routers, number, router._replace(view=view._replace(relayed=relayed)))
            out = world.out if look else (*world.out, view.events[view.relayed])
            label = "looks at the out stream" if look else f"relays e{view.relayed}"
            yield Step(f"r{number} {label}", world._replace(out=out, routers=routers))
        if view.relayed > world.database.relayed and (number, router.term) == world.database.owner:
            noted = world.database._replace(relayed=view.relayed)
            yield Step(f"r{number} notes relayed {view.relayed}", world._replace(database=noted))

    def _held(self, world: World, events: tuple[Event, ...]) -> int:
        """Return how many leading events the out stream holds."""
        if self.guards.event_ids:
            ids = set(world.out)
            return next((n for n, event in enumerate(events) if event not in ids), len(events))
        positions = {event.position for event in world.out}
        return next((n for n, event in enumerate(events) if event.position not in positions), len(events))

    # -- brains and bad luck

    def _brain(self, world: World, brain: Brain) -> Steps:
        """A brain calls its tool once it may, which executes unless its key has run or is tombstoned."""
        allowed = brain.journaled == CALL_STEP or (brain.journaled == 0 and not self.guards.confirm)
        if self.tool and not brain.acted and allowed:
            key = (brain.turn, CALL_STEP)
            dead = key in world.tombstones
            ran = dead or (self.guards.tool_key and any(effect.key == key for effect in world.effects))
            after = frozenset() if dead else {brain._replace(acted=True)}
            effects = world.effects if ran else (*world.effects, Effect(key, brain.call))
            called = world._replace(effects=effects, brains=world.brains - {brain} | after)
            yield Step(f"b{brain.number} calls the tool", called)
        if world.left.brain_crash:
            left = world.left._replace(brain_crash=world.left.brain_crash - 1)
            crashed = world._replace(brains=world.brains - {brain}, left=left)
            yield Step(f"b{brain.number} crashes", crashed, fault=True)

    def _bad_luck(self, world: World) -> Steps:
        left = world.left
        if left.failover and world.standby is not None and world.standby != world.database:
            yield Step("standby catches up", world._replace(standby=world.database), fault=True)
            routers = world.routers
            if self.guards.term_ends:
                routers = tuple(Router(0, None, router.view) for router in routers)
            after = world._replace(
                database=world.standby, routers=routers, left=left._replace(failover=left.failover - 1)
            )
            yield Step("failover to the standby", after, fault=True)
        if left.event_loss and world.out:
            out = world.out[:-1]
            after = world._replace(
                out=out, read=min(world.read, len(out)), left=left._replace(event_loss=left.event_loss - 1)
            )
            yield Step("out stream loses its tail", after, fault=True)
        if left.inbound_loss and world.inbound and len(world.inbound) <= world.database.cursor:
            after = world._replace(
                inbound=world.inbound[:-1], left=left._replace(inbound_loss=left.inbound_loss - 1)
            )  # only what was ingested is lost
            yield Step("inbound stream loses its tail", after, fault=True)


def _brains_of(world: World, number: int, router: Router) -> list[Brain]:
    return [brain for brain in world.brains if (brain.router, brain.term) == (number, router.term)]


def _told(brains: frozenset[Brain], confirmation: Confirmation) -> frozenset[Brain]:
    number, steps = confirmation
    told = frozenset(brain._replace(journaled=steps) for brain in brains if brain.number == number and steps)
    return frozenset(brain for brain in brains if brain.number != number) | told


def unused_brain(world: World) -> int:
    """Return the smallest number above all that are still named anywhere: fewer states than counting on for ever."""
    calls = [turn.steps[0].content for turn in world.database.turns if turn.steps]
    calls += [effect.call for effect in world.effects]
    named = [call for call in calls if isinstance(call, int)]
    named += [brain.number for brain in world.brains]
    named += [event.brain for event in world.database.events]
    named += [text.brain for text in world.shown]
    for transaction in (flight.transaction for flight in world.flights):
        named += [end.brain for end in transaction.ends] if isinstance(transaction, Ingest) else []
    return 1 + max(named, default=0)
