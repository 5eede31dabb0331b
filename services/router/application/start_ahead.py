"""Turns that brains are given ahead: while the group that starts them is on its way to the store.

A turn's first model call and its commit take about as long; one after the other they are most of a short turn. Ahead of
the commit a brain may think, and nothing else: what it says is held, and counts only when the start is known to be
durable. Then it is applied as if it had been said now. If the start turns out to be none (the message was a retry, the
partition is somebody else's), what was held is dropped and the brain is told to stop. No call of a tool runs meanwhile:
brains wait for the confirmation of a step before they act on it.

    group sent -> give ------------ StartTurn ----------> brain
                  hold <----------- texts, proposals -----
    durable    -> durable: what was held     or dropped -> withdraw: StopTurn
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from soma.cognition.v1.cognition_service_pb2 import Proposal, StopTurn, TurnText

from services.router.application.items import StartItem
from soma_common.failpoints import failpoint
from soma_common.telemetry.metrics import counter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.router.application.dispatch_turns import Dispatcher
    from services.router.application.group import CommitItem
    from services.router.domain.session import BrainLink, Turn

Said: TypeAlias = Proposal | TurnText | StopTurn
"""What a brain says of a turn: a step, live text, or that it does not run it."""

AHEAD = counter("soma_router_starts_ahead_total", "Turns given to a brain before their start was durable.")
WITHDRAWN = counter("soma_router_starts_withdrawn_total", "Of those, turns whose start turned out to be none.")


@dataclass(slots=True)
class _Given:
    turn: Turn
    said: list[Said] = field(default_factory=list)
    """In order. No more than a step with its text: a brain waits for the step's confirmation before it goes on."""


class StartsAhead:
    """The turns of one router that are ahead of their start, and what was said of them."""

    def __init__(self, dispatcher: Dispatcher, *, enabled: bool) -> None:
        self._dispatcher = dispatcher
        self._enabled = enabled
        self._given: dict[bytes, _Given] = {}

    def give(self, items: Iterable[CommitItem]) -> None:
        """A group is on its way: brains get the turns that it starts, as far as nothing has to be waited for. The
        others get theirs when they are durable.
        """
        if not self._enabled:
            return
        for item in items:
            if not isinstance(item, StartItem):
                continue
            turn = item.turn
            if turn.id in self._given or (item.fresh and turn.session.has_seen(turn.inputs[0].message_id)):
                continue  # the group is sent again; or it is a retry, for which no model is to be called
            if self._dispatcher.begin_ahead(turn):
                self._given[turn.id] = _Given(turn)
                AHEAD.inc()

    def hold(self, link: BrainLink, item: Said) -> bool:
        """Keeps what a brain says of a turn that is ahead; False if it is about no such turn."""
        given = self._given.get(item.turn_id)
        if given is None or given.turn.link is not link or given.turn.dispatch != item.dispatch:
            return False
        given.said.append(item)
        failpoint("router.after_answer_before_start")
        return True

    def durable(self, turn: Turn) -> list[Said] | None:
        """The start is durable: what was said of the turn since it was given, in order. None if it was not given
        ahead. If its brain is gone meanwhile the turn has no link.
        """
        given = self._given.pop(turn.id, None)
        return None if given is None else given.said

    def withdraw(self, turn: Turn) -> None:
        """The start is none, or not this router's any more: what was said of the turn counts for nothing."""
        if self._given.pop(turn.id, None) is not None:
            WITHDRAWN.inc()
            for message in turn.inputs:
                message.withdrawn = True

    def link_down(self, link: BrainLink) -> None:
        """A brain is gone: what it has said counts no more."""
        for given in self._given.values():
            if given.turn.link is link:
                given.turn.let_go()
                given.said.clear()
