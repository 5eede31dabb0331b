"""Turns that brains are given ahead: while the group that starts them is on its way to the store.

A turn's first model call and its commit take about as long; one after the other they are most of a short turn. Ahead of
the commit a brain may think, and nothing else: what it says is held, and counts only when the start is known to be
durable. Then it is applied as if it had been said now. If the start turns out to be none (the message was a retry, the
partition is somebody else's), what was held is dropped and the brain is told to stop. No call of a tool runs meanwhile:
brains wait for the confirmation of a step before they act on it.

    group sent -> give ------------ StartTurn ----------> brain      (or sooner, see below)
                  hold <----------- texts, proposals -----
    durable    -> collect: what was held     or dropped -> withdraw: StopTurn

While a group is being written, turns of the next one are given already (`give_next`). If a turn's last step is there
before that group is sent, it goes with it (`end_next`): the message, its turn and the answer in one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from soma.cognition.v1.cognition_service_pb2 import Proposal, StopTurn, TurnText

from services.router.application.items import StartItem
from services.router.domain.turn import StepKind, TurnStatus
from soma_common.clock import monotonic
from soma_common.failpoints import failpoint
from soma_common.telemetry.metrics import counter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.router.application.dispatch_turns import Dispatcher
    from services.router.application.group import CommitItem
    from services.router.application.outcomes import EndItem
    from services.router.domain.session import BrainLink, Turn

Said: TypeAlias = Proposal | TurnText | StopTurn
"""What a brain says of a turn: a step, live text, or that it does not run it."""

_LAST: Final = (int(StepKind.FINAL), int(StepKind.FAILURE))
_APART_S: Final = 10.0
"""How long ends of a tenant wait for their starts after one of its starts was none: the group of such an end is written
three times, which costs everybody in it.
"""
_WITHDRAWN_KEPT: Final = 4096

AHEAD = counter("soma_router_starts_ahead_total", "Turns given to a brain before their start was durable.")
ENDED_AHEAD = counter(
    "soma_router_ends_with_start_total", "Turns whose last step was there before their start was sent to the store."
)
WITHDRAWN = counter(
    "soma_router_starts_withdrawn_total", "Of those, turns whose start turned out to be none or somebody else's."
)


@dataclass(slots=True)
class Ahead:
    """A turn that a brain was given before its start was durable."""

    turn: Turn
    sent: bool
    """Whether the group with its start is on its way to the store, or only gathers."""
    end: EndItem | None = None
    """The end that goes to the store with the start."""
    said: list[Said] = field(default_factory=list)
    """What the brain has said of it, in order. No more than a step with its text: a brain waits for the step's
    confirmation before it goes on."""


class StartsAhead:
    """The turns of one router that are ahead of their start, and what was said of them."""

    def __init__(self, dispatcher: Dispatcher, *, enabled: bool) -> None:
        self._dispatcher = dispatcher
        self._enabled = enabled
        self._given: dict[bytes, Ahead] = {}
        self._withdrawn: dict[bytes, None] = {}
        self._apart_until: dict[str, float] = {}
        """By tenant; monotonic seconds."""

    def give(self, items: Iterable[CommitItem]) -> None:
        """A group is on its way: brains get the turns that it starts, as far as nothing has to be waited for. The
        others get theirs when they are durable.
        """
        if not self._enabled:
            return
        for item in items:
            if not isinstance(item, StartItem):
                continue
            given = self._given.get(item.turn.id)
            if given is not None:
                given.sent = True  # since the group before; or its group is sent again
            else:
                self._give(item, sent=True)

    def give_next(self, starts: Iterable[StartItem]) -> None:
        """The same for starts that wait for the group that is being written, and go with the next."""
        for item in starts:
            self._give(item, sent=False)

    def _give(self, item: StartItem, *, sent: bool) -> None:
        turn = item.turn
        if turn.id in self._given or turn.id in self._withdrawn:
            return  # a brain has it; or may still run it under this dispatch, for nobody
        if item.fresh and turn.session.expects_retry(turn.inputs[0].message_id):
            return  # no model is to be called for one
        if self._dispatcher.begin_ahead(turn):
            self._given[turn.id] = Ahead(turn, sent)
            AHEAD.inc()

    def end_next(self, link: BrainLink, step: Proposal) -> Turn | None:
        """The turn that ends with this step, if the group with its start was not sent: then its end goes with it."""
        given = self._said_of(link, step)
        if given is None or given.sent or given.end is not None:
            return None
        turn = given.turn
        if int(step.kind) not in _LAST or step.step != 1 or turn.in_flight or turn.status is not TurnStatus.RUNNING:
            return None
        tenant = turn.session.key.tenant
        if self._apart_until and self._apart_until.get(tenant, 0.0) > monotonic():
            return None
        failpoint("router.after_answer_before_start")
        return turn

    def add_end(self, end: EndItem) -> None:
        """Notes how a turn ends: if it is ahead of its start, it ends only if it starts."""
        given = self._given.get(end.turn.id)
        if given is not None:
            given.end = end
            end.with_start = True
            ENDED_AHEAD.inc()

    def hold(self, link: BrainLink, item: Said) -> bool:
        """Keeps what a brain says of a turn that is ahead; False if it is about no such turn."""
        given = self._said_of(link, item)
        if given is None:
            return False
        if isinstance(item, TurnText):
            # As a part of its frame it would keep the whole frame in memory.
            text = TurnText()
            text.CopyFrom(item)
            item = text
        given.said.append(item)
        failpoint("router.after_answer_before_start")
        return True

    def _said_of(self, link: BrainLink, item: Said) -> Ahead | None:
        given = self._given.get(item.turn_id)
        if given is None or given.turn.link is not link or given.turn.dispatch != item.dispatch:
            return None
        return given

    def collect(self, turn: Turn) -> Ahead | None:
        """The start is durable: what was said of the turn since it was given. None if it was not given ahead. A turn
        whose brain is gone meanwhile has no link.
        """
        return self._given.pop(turn.id, None)

    def withdraw(self, turn: Turn) -> None:
        """The start is none, or not this router's any more: what was said of the turn counts for nothing."""
        given = self._given.pop(turn.id, None)
        if given is not None:
            WITHDRAWN.inc()
            if given.end is not None:
                given.end.void = True
                now = monotonic()
                self._apart_until = {tenant: until for tenant, until in self._apart_until.items() if until > now}
                self._apart_until[turn.session.key.tenant] = now + _APART_S
            self._withdrawn[turn.id] = None
            while len(self._withdrawn) > _WITHDRAWN_KEPT:
                del self._withdrawn[next(iter(self._withdrawn))]

    def is_spent(self, turn: Turn) -> bool:
        """Whether a brain was given the turn's first dispatch in vain. It was told to stop, and may not have heard yet:
        what it says under that number must never be taken for what another run says. So the turn needs the next one,
        whoever has let it go: another group, or a term of this router that has ended.
        """
        return turn.dispatch == 1 and turn.id in self._withdrawn

    def link_down(self, link: BrainLink) -> None:
        """A brain is gone: what it has said counts no more, but for the end of a turn."""
        for given in self._given.values():
            if given.turn.link is link:
                given.turn.let_go()
                given.said.clear()
