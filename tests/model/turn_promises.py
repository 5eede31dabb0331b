"""What must hold in every state of the turn protocol, and what in its final states."""

from collections.abc import Iterator

from tests.model.guards import TurnGuards
from tests.model.transactions import ANSWERED, CANCELLED, Turn
from tests.model.world import Faults, World

ONE_WRITER = "I2"
LOST = "I1 an acknowledged message is lost"
ANSWERED_TWICE = "I1 answered twice"
UNREAD = "I1 answered without being read"
NEVER_ANSWERED = "I1 never answered"
DELIVERED_TWICE = "I1 delivered twice"
NEVER_DELIVERED = "I1 answer never delivered"
STALE = "I2 stale commit"
ORDER = "I3 order"
EFFECT_TWICE = "I4 side effect twice"
OTHER_CALL = "I4 effect of a call that is not the journaled one"
CANCELLED_CALL = "I4 effect of a call the transcript calls cancelled"
STEP_TWICE = "I4 step journaled twice"
TWO_TEXTS = "I2 two brains' live text at one place of a turn"
OTHER_TEXT = "I2 answer of another brain than the live text"
REFUSED = "I1 an only writer is refused what it sends"  # its term ends, and it reads the same again


def broken_promises(
    world: World, sessions: tuple[int, ...], faults: Faults, guards: TurnGuards, *, relay: bool, final: bool
) -> Iterator[str]:
    """Yield the promises that `world` breaks, the gravest first.

    After a failover to an asynchronous standby two promises are not checked, as none can keep them: that an event comes
    once, and that the effect of a call has its journaled step.
    """
    calm = faults.failover == world.left.failover
    yield from _broken_answers(world, sessions, guards)
    yield from _broken_effects(world, calm=calm)
    if world.stale:
        yield world.stale
    if len({(turn, dispatch) for turn, dispatch, _ in world.shown}) != len(world.shown):
        yield TWO_TEXTS
    if _other_texts(world):
        yield OTHER_TEXT
    if not world.stale and any(
        flight.taken is False and (flight.router, flight.term) == world.database.owner for flight in world.flights
    ):
        yield REFUSED
    if relay and calm and len({event.message for event in world.received}) != len(world.received):
        yield DELIVERED_TWICE
    if final and len(world.database.history) != len(sessions):
        yield NEVER_ANSWERED
    if final and relay and not set(world.database.events) <= set(world.received):
        yield NEVER_DELIVERED


def _broken_answers(world: World, sessions: tuple[int, ...], guards: TurnGuards) -> Iterator[str]:
    history = world.database.history
    answered = [entry.message for entry in history]
    if _lost(world, guards):
        yield LOST
    if len(answered) != len(set(answered)):
        yield ANSWERED_TWICE
    if not all(entry.was_read for entry in history):
        yield UNREAD
    for session in set(sessions):
        order = [message for message in answered if sessions[message] == session]
        if order != sorted(order):
            yield ORDER


def _broken_effects(world: World, *, calm: bool) -> Iterator[str]:
    rows = world.database
    keys = [effect.key for effect in world.effects]
    calls = [(rows.turn(effect.key[0]) or Turn((), ""), effect.call) for effect in world.effects]
    if len(keys) != len(set(keys)):
        yield EFFECT_TWICE
    if calm and any(not turn.steps or turn.steps[0].content != call for turn, call in calls):
        yield OTHER_CALL
    if any(turn.status == CANCELLED and len(turn.steps) == 1 for turn, _ in calls):
        yield CANCELLED_CALL
    if any(len({step.number for step in turn.steps}) != len(turn.steps) for turn in rows.turns):
        yield STEP_TWICE


def _other_texts(world: World) -> bool:
    """Tell whether an answer without steps is not by who spoke under the dispatch that the turn has ended with."""
    rows = world.database
    answered_by = {event.message: event.brain for event in rows.events}
    ended = {
        (position, turn.dispatch): answered_by[message]
        for position, (message, turn) in enumerate(zip(rows.mailbox, rows.turns, strict=True))
        if turn.status == ANSWERED and not turn.steps and message in answered_by
    }
    return any(brain != ended.get((turn, dispatch), brain) for turn, dispatch, brain in world.shown)


def _lost(world: World, guards: TurnGuards) -> bool:
    """Tell whether an acknowledged message is neither in the mailbox nor where its owner will still read it."""
    rows = world.database
    unread = world.inbound[world.purged if guards.anchor else max(rows.cursor, world.purged) :]
    there = {message for _, message in unread} | set(rows.mailbox)
    return any(count and message not in there for message, count in enumerate(world.sent))
