"""The guards of the turn protocol: each is a rule of the product, and a switch that the model can turn off.

What breaks without it is in `scenarios.py`; where the product keeps it is in `docs/invariants.md`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

AnyGuards = TypeVar(
    "AnyGuards", "TurnGuards", "DeliveryGuards", "PoisonGuards", "ToolGuards", "GroupGuards", "StopGuards"
)


@dataclass(frozen=True, slots=True)
class TurnGuards:
    """The rules from the accept to the committed outcome, and of the relay of events."""

    fence: bool = False  # a commit checks that the lease is still its owner's
    fence_lock: bool = False  # the check holds a row lock until the commit, so that no takeover comes between
    load_after: bool = False  # a new owner loads the partition after its lease is committed
    cursor_cas: bool = False  # an ingest names the cursor it starts from
    dedupe: bool = False  # a message id is inserted once
    purge_committed: bool = False  # the inbound stream is purged below the committed cursor only
    step_cas: bool = False  # step numbers are contiguous and unique in a turn
    dispatch_id: bool = False  # frames of an older dispatch are dropped
    confirm: bool = False  # the brain acts on confirmed steps only
    tool_key: bool = False  # a tool call's key executes once
    replay: bool = False  # a new brain goes on from the journal
    consumer_dedupe: bool = False  # a consumer of events drops what it has seen
    relay_from_stream: bool = False  # a new owner asks the out stream what it holds
    relay_cas: bool = False  # a relay names the last message it expects, and looks again when another is there
    unique_term: bool = False  # every acquisition has a term of its own, which the fence compares
    term_ends: bool = False  # losing the database connection ends the term
    purge_replicated: bool = False  # purge only below the cursor that the standby has
    event_ids: bool = False  # event ids are unique beyond their position
    anchor: bool = False  # the cursor knows the id of its message, which stays in the stream
    inputs_seen: bool = False  # a final names the inputs it has read; the commit refuses it when there are more
    tombstone: bool = False  # a cancel makes sure that an open call never runs before it closes the call
    held: bool = False  # what a brain says of a turn counts only when its router has seen the turn's start committed
    whole: bool = False  # an end is stored only with its start; if that is none, what came with both is sent without it
    withdrawn: bool = False  # a turn that was given ahead for nothing is given again under a higher dispatch only


@dataclass(frozen=True, slots=True)
class DeliveryGuards:
    """The rules from the committed outcome to the channel's adapter."""

    floor_durable: bool = False  # a new owner starts at the floor in the database
    floor_acked: bool = False  # the floor counts acknowledgements, not sends
    one_unacked: bool = False  # a session's next delivery waits for the acknowledgement of the one before
    rendezvous: bool = False  # all deliveries of a session go to one of the connected adapters, chosen by hash
    client_dedupe: bool = False  # an adapter drops positions that it has processed
    ack_again: bool = False  # what an adapter drops it acknowledges again
    resume: bool = False  # an adapter that reconnects names what it has processed


@dataclass(frozen=True, slots=True)
class PoisonGuards:
    """The rules against a turn that kills the process which runs it."""

    start_journaled: bool = False  # which turns run is durable before they run
    strikes_durable: bool = False  # a takeover raises the dispatch count of the turns it finds running
    suspects_alone: bool = False  # of the turns that were running when an owner died one runs at a time


@dataclass(frozen=True, slots=True)
class ToolGuards:
    """The rules of the tool gateway: a call, its cancel, its compensation."""

    unique_key: bool = False  # of two claims, or a claim and a tombstone, one is inserted
    claim_first: bool = False  # a tool runs only when the claim of its call is committed
    never_again: bool = False  # a side-effectful call whose runner is held dead is not run again
    one_end: bool = False  # a call leaves RUNNING once, by the claim that ends
    call_tombstone: bool = False  # a cancel of a call that has not come is stored
    give_up: bool = False  # a cancel does not wait for ever
    doubt_stays: bool = False  # an unknown outcome is an effect that cannot be undone
    first_look: bool = False  # what is to be undone is stored before a compensation runs
    undo_key: bool = False  # a compensation has one key, made of its call's
    gone_settles: bool = False  # who does not know a compensation makes sure that it has an end


@dataclass(frozen=True, slots=True)
class GroupGuards:
    """The rules of messages that gather for one turn."""

    due_durable: bool = False  # what a group waits for is reckoned from when its messages were stored
    policy_stored: bool = False  # what a message's policy is, and how long it waits, is in its row
    due_restored: bool = False  # a new owner looks at what waits, with no new message to remind it
    neighbours: bool = False  # a group ends at the first message of another policy, which makes it due
    group_journaled: bool = False  # which messages a turn starts with is durable before a brain is given them
    group_seen: bool = False  # a final is taken only if it has read every input: the group and what joined it


@dataclass(frozen=True, slots=True)
class StopGuards:
    """The rules of turns that are stopped, and of messages that end out of order."""

    stop_durable: bool = False  # a stop is stored before anybody is told of it
    stop_kind: bool = False  # it is stored with the outcome that the turn is to end with
    stop_resumed: bool = False  # a new owner goes on with it
    first_stop: bool = False  # of several stops the first counts
    cancel_beats: bool = False  # except that a cancel also ends what was to be rolled back
    asks_tools: bool = False  # work is dropped only if the tool gateway says that nothing is left of it
    asked_after: bool = False  # it is asked when the calls have converged
    absorbed_waits: bool = False  # the messages of a turn that was rolled back wait in the database too
    new_turn_id: bool = False  # the turn that replaces one has an id of its own
    try_remembered: bool = False  # a new owner knows which messages were in a turn that was rolled back
    refusal_row: bool = False  # a message that is refused has a row of its own in the transaction of its outcome
    refusal_first: bool = False  # a turn that starts after a message was refused is stored after the refusal


def without(guards: AnyGuards, names: Iterable[str]) -> AnyGuards:
    """Return the guards with the named ones turned off."""
    return replace(guards, **dict.fromkeys(names, False))


def only(kind: type[AnyGuards], names: str) -> AnyGuards:
    """Return guards of `kind` of which the named ones, separated by spaces, are on."""
    return kind(**dict.fromkeys(names.split(), True))
