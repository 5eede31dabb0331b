"""The state of the turn protocol's model: one inbound partition, its rows, two routers, their brains, the tool gateway.

Positions are indexes: a message is a number, a turn has the position of its message in the mailbox.
"""

from typing import NamedTuple, TypeVar

from tests.model.transactions import Dispatch, Event, Ingest, Partition, Published, Transaction

T = TypeVar("T")


class Confirmation(NamedTuple):
    """What a router tells a brain when its transaction has committed."""

    brain: int
    steps: int | None  # how many steps are journaled now; None: the turn has ended


class Pending(NamedTuple):
    """A transaction whose fence was read and which is not committed yet: possible only without the row lock."""

    transaction: Transaction
    confirmation: Confirmation | None


class Router(NamedTuple):
    """A router; `view` is its copy of the partition, which may be wrong once it has lost its lease."""

    epoch: int
    term: int | None  # None: it holds no lease, as far as it knows
    view: Partition
    pending: Pending | None = None
    loaded: bool = False  # it has read the partition and not taken the lease yet
    withdrawn: frozenset[int] = (
        frozenset()
    )  # turns that it gave to a brain ahead, and whose start turned out to be none


class Brain(NamedTuple):
    """One dispatch of a turn to a brain."""

    number: int
    router: int
    term: int | None  # -1: a newer dispatch has replaced this one
    turn: int
    journaled: int  # steps that it knows to be journaled
    acted: bool  # its tool call went out
    call: int | str  # what the model asked for: every dispatch may ask for something else
    inputs_read: int
    dispatch: int = 0  # its number, where turns may be given ahead of their start
    ahead: bool = False  # its router does not know yet whether the turn was started
    stopped: bool = False  # it was told to stop; what it has said may still be on its way


class Flight(NamedTuple):
    """A transaction on its way to the database, which may take it even when its router is dead."""

    router: int
    epoch: int
    term: int
    transaction: Ingest | Dispatch
    taken: bool | None = None  # None: the database has not answered


class Text(NamedTuple):
    """Live text of a turn's first step that was shown."""

    turn: int
    dispatch: int
    brain: int


class Faults(NamedTuple):
    """How often each thing may still go wrong."""

    takeover: int = 0
    crash: int = 0
    brain_crash: int = 0
    redispatch: int = 0
    failover: int = 0
    event_loss: int = 0
    inbound_loss: int = 0
    cancel: int = 0
    line_loss: int = 0


class Effect(NamedTuple):
    """A side effect of a tool."""

    key: tuple[int, int]  # (turn, step)
    call: int | str


class World(NamedTuple):
    """Everything there is."""

    inbound: tuple[Published, ...]
    purged: int  # how many leading messages of `inbound` are gone
    sent: tuple[int, ...]  # per message: how often it was sent and acknowledged
    database: Partition
    standby: Partition | None  # the database as an asynchronous standby knows it
    routers: tuple[Router, ...]
    brains: frozenset[Brain]
    effects: tuple[Effect, ...]
    tombstones: frozenset[tuple[int, int]]
    out: tuple[Event, ...]  # the out stream, not synced: it may lose its tail
    read: int  # how many messages of `out` the consumer was given
    received: tuple[Event, ...]
    left: Faults
    last_batch_id: int
    last_term: int
    stale: str  # the first commit under a lease that was not current
    flights: frozenset[Flight] = frozenset()
    shown: frozenset[Text] = frozenset()


def put(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    """Return `items` with one replaced."""
    return (*items[:index], item, *items[index + 1 :])


def give_up_term(world: World, router: int) -> World:
    """End a router's term. Of its brains only those that may still call their tool matter from here on, and of those
    that it gave a turn ahead what they have said.
    """
    brains = frozenset(b for b in world.brains if b.router != router or (not b.acted and b.journaled < 2))
    withdrawn = frozenset(b.turn for b in brains if b.router == router and b.ahead)
    if withdrawn:
        brains = frozenset(
            b._replace(ahead=False, stopped=True) if b.router == router and b.ahead else b for b in brains
        )
    idle = Router(0, None, world.routers[router].view, withdrawn=world.routers[router].withdrawn | withdrawn)
    return world._replace(brains=brains, routers=put(world.routers, router, idle))
