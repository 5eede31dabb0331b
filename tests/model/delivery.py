"""The way of a session's committed outcomes to the channel's adapters, as a model for `search.py`.

Modelled: one session; its outcomes, committed one by one; the floor of acknowledged deliveries in PostgreSQL; two
routers, of which one owns the partition and the other may be a zombie that still hands over and hears acknowledgements;
core NATS and the gateways as a set of messages in flight, delivered in any order, any of which may be lost; two adapter
instances that come and go. An adapter that has lost its stream may still process what it was handed before; its
acknowledgement is lost.

What the channel sees: outcomes appear in order and, while no adapter goes away, once. An adapter that took over from
one that went away may show an outcome again; the delivery says its position, so the channel can tell.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.guards import DeliveryGuards
from tests.model.search import Step
from tests.model.world import put

OVERTAKEN = "I3 a delivery overtook the one before it"
WENT_BACK = "I3 an adapter went back to an older delivery"
TWICE = "I1 shown twice"
NEVER = "I1 answer never delivered"


class Handover(NamedTuple):
    """A delivery on its way to an adapter."""

    router: int
    position: int  # from 1
    adapter: int


class Ack(NamedTuple):
    """An acknowledgement on its way to the router that handed over."""

    router: int
    position: int


class Owner(NamedTuple):
    """A router and what it remembers of the session."""

    term: int  # 0: none yet
    acknowledged: int  # its floor, in memory
    handed_over: frozenset[Handover]  # and not acknowledged


class Adapter(NamedTuple):
    """An adapter instance."""

    connected: bool
    processed: int  # highest position


class Left(NamedTuple):
    """How often each thing may still go wrong."""

    takeover: int = 0
    loss: int = 0
    disconnect: int = 0


class Way(NamedTuple):
    """Everything there is."""

    committed: int  # outcomes in the database, dense from 1
    floor: int  # acknowledged deliveries in the database
    term: int
    owner: int  # the router whose term it is
    routers: tuple[Owner, ...]
    adapters: tuple[Adapter, ...]
    handovers: frozenset[Handover]
    acks: frozenset[Ack]
    shown: int  # positions that the channel has seen
    broken: str
    left: Left


Steps = Iterator[Step[Way]]


@dataclass(frozen=True, slots=True)
class DeliveryProtocol:
    """The delivery of some outcomes with some of the guards, under some faults."""

    guards: DeliveryGuards
    outcomes: int
    faults: Left

    def initial(self) -> Way:
        """Return the start: router 0 owns the session, both adapters are connected, nothing is committed."""
        routers = (Owner(1, 0, frozenset()), Owner(0, 0, frozenset()))
        adapters = (Adapter(True, 0), Adapter(True, 0))
        return Way(0, 0, 1, 0, routers, adapters, frozenset(), frozenset(), 0, "", self.faults)

    def steps(self, way: Way) -> Steps:
        """Yield what routers, messages in flight and adapters may do next."""
        if way.committed < self.outcomes:
            yield Step(f"outcome {way.committed + 1} is committed", way._replace(committed=way.committed + 1))
        for number, router in enumerate(way.routers):
            if router.term:
                yield from self._hand_over(way, number, router)
                yield from self._note_floor(way, number, router)
            if way.left.takeover and number != way.owner:
                yield self._take_over(way, number)
        for handover in way.handovers:
            yield self._arrive(way, handover)
            if way.left.loss:
                left = way.left._replace(loss=way.left.loss - 1)
                lost = way._replace(handovers=way.handovers - {handover}, left=left)
                yield Step(f"{handover} is lost", lost, fault=True)
        for ack in way.acks:
            yield self._hear(way, ack)
            if way.left.loss:
                left = way.left._replace(loss=way.left.loss - 1)
                yield Step(f"{ack} is lost", way._replace(acks=way.acks - {ack}, left=left), fault=True)
        for number, adapter in enumerate(way.adapters):
            yield from self._come_and_go(way, number, adapter)

    def violations(self, way: Way, *, final: bool) -> Iterator[str]:
        """Yield the promises that `way` breaks."""
        if way.broken:
            yield way.broken
        if final and not self.fulfilled(way):
            yield NEVER

    def fulfilled(self, way: Way) -> bool:
        """Tell whether every outcome was shown and the database knows it."""
        return way.shown == way.floor == self.outcomes

    def _hand_over(self, way: Way, number: int, router: Owner) -> Steps:
        """Hand the next delivery over, or again: the timer of a redelivery may fire at any moment.

        A zombie goes on with what it knows; it learns of new outcomes no more, as its commits are refused.
        """
        known = way.committed if number == way.owner else max((h.position for h in router.handed_over), default=0)
        after = router.acknowledged
        last = min(known, after + 1) if self.guards.one_unacked else known
        present = [adapter for adapter in range(len(way.adapters)) if way.adapters[adapter].connected]
        for position in range(after + 1, last + 1):
            for adapter in present[:1] if self.guards.rendezvous else present:
                handover = Handover(number, position, adapter)
                remembered = router._replace(handed_over=router.handed_over | {handover})
                if not self.guards.floor_acked:
                    remembered = router._replace(acknowledged=position)
                after_it = way._replace(
                    handovers=way.handovers | {handover}, routers=put(way.routers, number, remembered)
                )
                yield Step(f"r{number} hands {position} over to adapter {adapter}", after_it)

    def _note_floor(self, way: Way, number: int, router: Owner) -> Steps:
        """The floor goes with the next group commit, which is fenced: a zombie's is refused and ends its term."""
        if number != way.owner:
            lost = put(way.routers, number, Owner(0, router.acknowledged, frozenset()))
            yield Step(f"r{number} learns that it lost its lease", way._replace(routers=lost))
        elif router.acknowledged > way.floor:
            yield Step(f"r{number} commits floor {router.acknowledged}", way._replace(floor=router.acknowledged))

    def _take_over(self, way: Way, number: int) -> Step[Way]:
        start = way.floor if self.guards.floor_durable else way.committed
        routers = put(way.routers, number, Owner(way.term + 1, start, frozenset()))
        left = way.left._replace(takeover=way.left.takeover - 1)
        taken = way._replace(term=way.term + 1, owner=number, routers=routers, left=left)
        return Step(f"r{number} takes the lease and starts at {start}", taken)

    def _arrive(self, way: Way, handover: Handover) -> Step[Way]:
        """An adapter is given a delivery: it processes it, or drops it because it has."""
        router, position, number = handover
        adapter = way.adapters[number]
        arrived = way._replace(handovers=way.handovers - {handover})
        ack = frozenset({Ack(router, position)}) if adapter.connected else frozenset()
        if self.guards.client_dedupe and position <= adapter.processed:
            acks = way.acks | ack if self.guards.ack_again else way.acks
            return Step(f"adapter {number} drops {position}", arrived._replace(acks=acks))
        broken = way.broken or self._what_breaks(way, adapter, position)
        adapters = put(way.adapters, number, adapter._replace(processed=max(position, adapter.processed)))
        shown = max(way.shown, position)
        processed = arrived._replace(adapters=adapters, acks=way.acks | ack, shown=shown, broken=broken)
        return Step(f"adapter {number} processes {position}", processed)

    def _what_breaks(self, way: Way, adapter: Adapter, position: int) -> str:
        if position > way.shown + 1:
            return OVERTAKEN
        if position < adapter.processed:
            return WENT_BACK
        went_away = way.left.disconnect != self.faults.disconnect
        return TWICE if position <= way.shown and (not went_away or position == adapter.processed) else ""

    def _hear(self, way: Way, ack: Ack) -> Step[Way]:
        number, position = ack
        router = way.routers[number]
        if router.term and position > router.acknowledged:
            rest = frozenset(handover for handover in router.handed_over if handover.position > position)
            router = router._replace(acknowledged=position, handed_over=rest)
        heard = way._replace(acks=way.acks - {ack}, routers=put(way.routers, number, router))
        return Step(f"r{number} hears that {position} is processed", heard)

    def _come_and_go(self, way: Way, number: int, adapter: Adapter) -> Steps:
        if adapter.connected and way.left.disconnect:
            gone = put(way.adapters, number, adapter._replace(connected=False))
            left = way.left._replace(disconnect=way.left.disconnect - 1)
            yield Step(f"adapter {number} goes away", way._replace(adapters=gone, left=left), fault=True)
        if not adapter.connected:
            back = put(way.adapters, number, adapter._replace(connected=True))
            acks = way.acks
            if self.guards.resume and adapter.processed:
                acks = acks | {Ack(router, adapter.processed) for router in range(len(way.routers))}
            yield Step(f"adapter {number} connects again", way._replace(adapters=back, acks=acks))
