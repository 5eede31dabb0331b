"""What the model is run on: scenarios with all their guards, and for each the guards that are taken away in turn.

What a guard's removal must lead to is part of the scenario: a guard that is needed and is not found to be is as much
of a failure as a broken promise. "quick" bounds are for every test run, "full" ones for a change of the protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.model import gathering, stops
from tests.model.delivery import NEVER, OVERTAKEN, TWICE, DeliveryProtocol, Left
from tests.model.gathering import Gathering
from tests.model.guards import (
    DeliveryGuards,
    GroupGuards,
    PoisonGuards,
    StopGuards,
    ToolGuards,
    TurnGuards,
    only,
    without,
)
from tests.model.poison import PARKED_INNOCENT, PoisonedPartition
from tests.model.search import NO_WAY_ON, Model
from tests.model.starts_ahead import StartsAhead
from tests.model.stops import StoppedTurns
from tests.model.tool_calls import CHANGED, RAN_CANCELLED, RAN_TWICE, STAYS, UNDONE, UNDONE_TWICE, ToolCalls
from tests.model.tool_calls import Left as LeftOfCalls
from tests.model.turn_promises import (
    ANSWERED_TWICE,
    CANCELLED_CALL,
    DELIVERED_TWICE,
    EFFECT_TWICE,
    LOST,
    NEVER_ANSWERED,
    NEVER_DELIVERED,
    OTHER_CALL,
    OTHER_TEXT,
    REFUSED,
    STALE,
    STEP_TWICE,
    TWO_TEXTS,
    UNREAD,
)
from tests.model.turns import TurnProtocol
from tests.model.world import Faults

CORE = "fence fence_lock load_after cursor_cas dedupe purge_committed step_cas dispatch_id confirm tool_key replay"
RELAY = f"{CORE} consumer_dedupe relay_from_stream relay_cas"
AHEAD = f"{CORE} held whole withdrawn"
FAILOVER = f"{RELAY} unique_term term_ends purge_replicated event_ids"
DELIVERY = "floor_durable floor_acked one_unacked rendezvous client_dedupe ack_again resume"
POISON = "start_journaled strikes_durable suspects_alone"
TOOLS = "unique_key claim_first never_again one_end call_tombstone give_up doubt_stays first_look undo_key gone_settles"
GROUPS = "due_durable policy_stored due_restored neighbours group_journaled group_seen"
STOPS = (
    "stop_durable stop_kind stop_resumed first_stop cancel_beats asks_tools asked_after absorbed_waits new_turn_id"
    " try_remembered refusal_row refusal_first"
)


@dataclass(frozen=True, slots=True)
class Removal:
    """Guards that are taken away together, and what that must lead to."""

    guards: str  # separated by spaces
    breaks: str = ""  # the promise that breaks; empty: none is known to
    then: str = ""  # after a broken I2: what breaks beyond it
    found_in: str = "quick full"  # the bounds in which `breaks` is found


@dataclass(frozen=True, slots=True)
class Scenario:
    """A model with all its guards, and what to take away from it."""

    name: str
    model: TurnProtocol | DeliveryProtocol | PoisonedPartition | ToolCalls | Gathering | StoppedTurns
    removals: tuple[Removal, ...]
    progress: bool = False  # also look for livelocks

    def model_without(self, removal: Removal | None) -> Model[Any]:
        """Return the model, without the removal's guards if one is given."""
        if removal is None:
            return self.model
        names = removal.guards.split()
        match self.model:
            case TurnProtocol(guards=guards) as turns:
                return replace(turns, guards=without(guards, names))
            case DeliveryProtocol(guards=delivery) as way:
                return replace(way, guards=without(delivery, names))
            case PoisonedPartition(guards=poison) as partition:
                return replace(partition, guards=without(poison, names))
            case ToolCalls(guards=tools) as calls:
                return replace(calls, guards=without(tools, names))
            case Gathering(guards=of_groups) as groups:
                return replace(groups, guards=without(of_groups, names))
            case StoppedTurns(guards=of_stops) as stopped:
                return replace(stopped, guards=without(of_stops, names))


def scenarios(*, full: bool) -> Iterator[Scenario]:
    """Yield every scenario, in full or quick bounds."""
    yield from _turn_scenarios(1 if full else 0)
    yield from _ahead_scenarios(1 if full else 0)
    yield from _relay_and_failover_scenarios(1 if full else 0)
    yield from _policy_scenarios(1 if full else 0)
    yield from _delivery_scenarios(1 if full else 0)
    yield from _tool_scenarios(1 if full else 0)
    yield from _group_scenarios(1 if full else 0)
    yield from _stop_scenarios(1 if full else 0)


def _turns(guards: str) -> TurnGuards:
    return only(TurnGuards, guards)


def _turn_scenarios(more: int) -> Iterator[Scenario]:
    redundant_alone = (Removal("cursor_cas"), Removal("step_cas"), Removal("dispatch_id"))
    yield Scenario(
        "tool turns, two messages, retry",
        TurnProtocol(_turns(CORE), (0, 0), Faults(takeover=1, redispatch=more), retries=more),
        (
            Removal("fence", STALE),
            Removal("fence_lock", STALE),
            Removal("load_after"),
            Removal("dedupe", ANSWERED_TWICE, found_in="full"),
            Removal("purge_committed", LOST),
            Removal("confirm", OTHER_CALL),
            Removal("tool_key", EFFECT_TWICE),
            Removal("replay"),  # no end: refused, taken over, again
            *redundant_alone,
            Removal("fence cursor_cas", STALE),
            Removal("fence step_cas", STALE, then=STEP_TWICE),
            Removal("fence_lock step_cas", STALE, then=STEP_TWICE),
            Removal("dispatch_id step_cas", STEP_TWICE, found_in="full"),
            Removal("load_after cursor_cas"),
        ),
    )
    yield Scenario(
        "tool turn, one message, more faults",
        TurnProtocol(
            _turns(CORE),
            (0,),
            Faults(takeover=1 + more, crash=more, brain_crash=1, redispatch=1),
            retries=1 - more,
        ),
        (
            Removal("fence", STALE),
            Removal("fence_lock", STALE),
            Removal("load_after"),
            Removal("dedupe", ANSWERED_TWICE, found_in="quick"),
            Removal("purge_committed", LOST),
            Removal("confirm", OTHER_CALL),
            Removal("tool_key", EFFECT_TWICE),
            Removal("replay"),
            *redundant_alone,
            Removal("fence cursor_cas", STALE),
            Removal("fence step_cas", STALE, then=STEP_TWICE),
            Removal("fence_lock step_cas", STALE, then=STEP_TWICE),
            Removal("dispatch_id step_cas", STEP_TWICE),
            Removal("load_after cursor_cas"),
        ),
    )
    yield Scenario(
        "three messages, two sessions, purge",
        TurnProtocol(_turns(CORE), (0, 0, 1), Faults(takeover=1, crash=more), retries=0, tool=False, purge=True),
        (
            Removal("fence", STALE, then=NEVER_ANSWERED),
            Removal("fence_lock", STALE, then=NEVER_ANSWERED),
            Removal("load_after", NEVER_ANSWERED),
            Removal("cursor_cas"),
            Removal("dedupe"),
            Removal("purge_committed", LOST),
            Removal("step_cas"),
            Removal("fence cursor_cas", STALE, then=NEVER_ANSWERED),
            Removal("fence step_cas", STALE, then="I1"),
        ),
    )


def _ahead_scenarios(more: int) -> Iterator[Scenario]:
    yield Scenario(
        "starts ahead, a retry",
        StartsAhead(_turns(AHEAD), (0,), Faults(takeover=1, brain_crash=1, redispatch=more), retries=1, early=True),
        (
            Removal("held", TWO_TEXTS),
            Removal("held step_cas", TWO_TEXTS, then=STEP_TWICE),
            Removal("dedupe", ANSWERED_TWICE),
            Removal("confirm", OTHER_CALL),
            Removal("tool_key", EFFECT_TWICE),
        ),
    )
    yield Scenario(
        "starts ahead, a connection is lost",
        StartsAhead(
            _turns(AHEAD), (0,), Faults(takeover=1, crash=more, line_loss=1, redispatch=1), retries=0, early=True
        ),
        (
            Removal("held", TWO_TEXTS),
            Removal("withdrawn", TWO_TEXTS, then=OTHER_CALL),
            Removal("confirm", OTHER_CALL),
            Removal("tool_key", EFFECT_TWICE),
            Removal("dispatch_id"),
            Removal("dispatch_id step_cas", STEP_TWICE),
        ),
    )
    yield Scenario(
        "starts ahead, two messages",
        StartsAhead(_turns(AHEAD), (0, more), Faults(takeover=more, line_loss=1), retries=0, tool=False),
        (
            Removal("fence", STALE),
            Removal("fence_lock", STALE),
        ),
    )
    yield Scenario(
        "starts ahead, cancel",
        StartsAhead(
            _turns(f"{AHEAD} tombstone"), (0,) * (1 + more), Faults(takeover=1, line_loss=more, cancel=1), retries=0
        ),
        (Removal("tombstone", CANCELLED_CALL),),
    )
    yield Scenario(
        "starts ahead, ends with them, a retry",
        StartsAhead(
            _turns(AHEAD), (0,), Faults(takeover=1, brain_crash=1, line_loss=more), retries=1, tool=False, early=True
        ),
        (
            Removal("whole", REFUSED),
            Removal("whole step_cas", ANSWERED_TWICE),
            Removal("held", TWO_TEXTS),
            Removal("held step_cas", TWO_TEXTS, then=ANSWERED_TWICE),
            Removal("dedupe", ANSWERED_TWICE),
            Removal("fence", STALE),
            Removal("fence_lock", STALE),
        ),
    )
    yield Scenario(
        "starts ahead, ends with them, a connection is lost",
        StartsAhead(
            _turns(AHEAD), (0,), Faults(takeover=1, line_loss=1, redispatch=1), retries=more, tool=False, early=True
        ),
        (
            Removal("held", TWO_TEXTS),
            Removal("withdrawn", TWO_TEXTS),
            Removal("dispatch_id", OTHER_TEXT),
        ),
    )
    yield Scenario(
        "starts ahead, ends with them, two sessions",
        StartsAhead(_turns(AHEAD), (0, 1), Faults(line_loss=more), retries=1, tool=False, early=True),
        (Removal("whole", REFUSED), Removal("whole step_cas", ANSWERED_TWICE)),
    )
    yield Scenario(
        "starts ahead, ends with them, steer",
        StartsAhead(
            _turns(f"{AHEAD} inputs_seen"),
            (0, 0),
            Faults(takeover=1, line_loss=more),
            retries=0,
            tool=False,
            steer=True,
            early=True,
        ),
        (Removal("inputs_seen", UNREAD),),
    )


def _relay_and_failover_scenarios(more: int) -> Iterator[Scenario]:
    yield Scenario(
        "relay, out stream unsynced",
        TurnProtocol(
            _turns(RELAY),
            (0, 1),
            Faults(takeover=1, crash=more, event_loss=1),
            retries=0,
            relay=True,
            tool=False,
        ),
        (
            Removal("consumer_dedupe", DELIVERED_TWICE),
            Removal("relay_from_stream"),
            Removal("relay_cas", NEVER_DELIVERED),
            Removal("relay_from_stream relay_cas", NEVER_DELIVERED),
        ),
    )
    yield Scenario(
        "database failover, async standby",
        TurnProtocol(_turns(FAILOVER), (0, 0), Faults(takeover=1, failover=1), retries=0, tool=False, purge=True),
        (
            Removal("unique_term"),
            Removal("term_ends", NEVER_ANSWERED),
            Removal("purge_replicated", LOST),
            Removal("unique_term term_ends", STALE, then=NEVER_ANSWERED),
        ),
    )
    yield Scenario(
        "database failover, relay",
        TurnProtocol(_turns(FAILOVER), (0, 1), Faults(failover=1), retries=0, relay=True, tool=False),
        (Removal("event_ids", NEVER_DELIVERED),),
    )
    yield Scenario(
        "inbound stream loses its ingested tail",
        TurnProtocol(
            _turns(f"{CORE} anchor"),
            (0, 0),
            Faults(takeover=1, inbound_loss=1),
            retries=0,
            tool=False,
            purge=True,
        ),
        (Removal("anchor", LOST),),
    )


def _policy_scenarios(more: int) -> Iterator[Scenario]:
    yield Scenario(
        "steer",
        TurnProtocol(
            _turns(f"{CORE} inputs_seen"),
            (0, 0),
            Faults(takeover=1, crash=more, redispatch=more),
            retries=0,
            steer=True,
        ),
        (Removal("inputs_seen", UNREAD),),
    )
    yield Scenario(
        "cancel",
        TurnProtocol(_turns(f"{CORE} tombstone"), (0, 0), Faults(takeover=1, crash=more, cancel=1), retries=0),
        (Removal("tombstone", CANCELLED_CALL),),
    )


def _delivery_scenarios(more: int) -> Iterator[Scenario]:
    guards = only(DeliveryGuards, DELIVERY)
    yield Scenario(
        "delivery, adapters stay",
        DeliveryProtocol(guards, 2 + more, Left(takeover=2, loss=1 + more)),
        (
            Removal("floor_durable", OVERTAKEN),
            Removal("floor_acked", OVERTAKEN),
            Removal("one_unacked", OVERTAKEN),
            Removal("rendezvous", TWICE),
            Removal("client_dedupe", TWICE),
            Removal("ack_again", NO_WAY_ON),
            Removal("resume"),
        ),
        progress=True,
    )
    yield Scenario(
        "delivery, an adapter goes away",
        DeliveryProtocol(guards, 2, Left(takeover=more, loss=1 - more, disconnect=1)),
        (
            Removal("floor_durable", NEVER, found_in="full"),
            Removal("one_unacked", OVERTAKEN),
            Removal("client_dedupe", TWICE),
            Removal("resume"),  # saves redeliveries, and is not needed for the promises
        ),
        progress=True,
    )
    yield Scenario(
        "a turn that kills its router",
        PoisonedPartition(only(PoisonGuards, POISON), turns=3 + more, crashes=1),
        (
            Removal("start_journaled", NO_WAY_ON),
            Removal("strikes_durable", NO_WAY_ON),
            Removal("suspects_alone", PARKED_INNOCENT),
        ),
        progress=True,
    )


def _tool_scenarios(more: int) -> Iterator[Scenario]:
    guards = only(ToolGuards, TOOLS)
    of_both = (
        Removal("unique_key", RAN_CANCELLED),
        Removal("claim_first", RAN_CANCELLED),
        Removal("one_end", CHANGED),
        Removal("call_tombstone", RAN_CANCELLED),
        Removal("give_up", NO_WAY_ON),
        Removal("doubt_stays", STAYS),
        Removal("first_look", UNDONE),
        Removal("undo_key", UNDONE_TWICE),
        Removal("gone_settles", UNDONE),
    )
    yield Scenario(
        "a side-effectful call, cancelled and taken back",
        ToolCalls(guards, LeftOfCalls(asks=2, cancels=1 + more, deaths=1 + more, hangs=1)),
        (*of_both, Removal("never_again", RAN_TWICE)),
        progress=True,
    )
    yield Scenario(
        "an idempotent call, cancelled and taken back",
        ToolCalls(guards, LeftOfCalls(asks=2, cancels=1, deaths=1 + more, hangs=1), repeatable=True),
        of_both,
        progress=True,
    )


def _group_scenarios(more: int) -> Iterator[Scenario]:
    guards = only(GroupGuards, GROUPS)
    yield Scenario(
        "messages gather, one steers",
        Gathering(guards, "aas" + "a" * more, takeovers=2),
        (
            Removal("due_durable", gathering.LATE),
            Removal("policy_stored", gathering.SPLIT),
            Removal("due_restored", gathering.LATE),
            Removal("group_journaled", gathering.OTHER_INPUTS),
            Removal("group_seen", gathering.UNREAD),
        ),
        progress=True,
    )
    yield Scenario(
        "messages gather, one of another policy between",
        Gathering(guards, "aaea" + "s" * more, takeovers=2),
        (
            Removal("due_durable", gathering.LATE),
            Removal("policy_stored", gathering.SPLIT),
            Removal("due_restored", gathering.LATE),
            Removal("neighbours", gathering.ORDER),
            Removal("group_journaled", gathering.OTHER_INPUTS),
            Removal("group_seen", gathering.UNREAD, found_in="full"),  # in quick bounds nothing joins
        ),
        progress=True,
    )
    yield Scenario(
        "more messages gather than a turn takes",
        Gathering(guards, "aaa" + "a" * more, takeovers=2, most=2),
        (
            Removal("due_durable", gathering.LATE),
            Removal("policy_stored", gathering.SPLIT),
            Removal("group_journaled", gathering.OTHER_INPUTS),
        ),
        progress=True,
    )


def _stop_scenarios(more: int) -> Iterator[Scenario]:
    guards = only(StopGuards, STOPS)
    yield Scenario(
        "a rollback and a cancel",
        StoppedTurns(guards, "er" + "r" * more, takeovers=2, cancels=1),
        (
            Removal("stop_durable", stops.CANCEL_LOST),
            Removal("stop_kind", stops.NOBODY_ASKED),
            Removal("stop_resumed", NO_WAY_ON),
            Removal("first_stop", stops.CANCEL_LOST),
            Removal("cancel_beats", stops.CANCEL_LOST),
            Removal("asks_tools", stops.STAYS),
            Removal("asked_after", stops.STAYS),
            Removal("absorbed_waits", NO_WAY_ON, found_in="quick"),
            Removal("new_turn_id", stops.OTHER_TRY),
            Removal("try_remembered", stops.OTHER_TRY),
        ),
        progress=True,
    )
    yield Scenario(
        "a rollback that is undone, behind a refused message",
        StoppedTurns(guards, "ejr" + "i" * more, takeovers=2, undoable=True),
        (
            Removal("stop_kind", stops.NOBODY_ASKED),
            Removal("stop_resumed", NO_WAY_ON),
            Removal("asks_tools", stops.STAYS),
            Removal("asked_after", stops.STAYS),
            Removal("absorbed_waits", NO_WAY_ON),
            Removal("new_turn_id", stops.OTHER_TRY),
            Removal("try_remembered", stops.OTHER_TRY),
            Removal("refusal_row", stops.ANSWERED_TWICE),
            Removal("refusal_first", stops.OTHER_INPUTS),
        ),
        progress=True,
    )
    yield Scenario(
        "an interrupt and a refused message",
        StoppedTurns(guards, "eij", takeovers=2, cancels=more),
        (
            Removal("stop_durable", stops.CANCEL_LOST, found_in="full"),
            Removal("stop_kind", stops.NOBODY_ASKED),
            Removal("stop_resumed", NO_WAY_ON),
            Removal("refusal_row", stops.ANSWERED_TWICE),
        ),
        progress=True,
    )
