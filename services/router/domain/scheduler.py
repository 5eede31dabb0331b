"""Which session gets the next turn: deficit round robin over tenants by weight, round robin over the sessions of a
tenant.

A tenant that floods fills only its own ring; others keep their share (Shreedhar and Varghese, "Efficient Fair Queuing
using Deficit Round Robin", 1995, with a cost of one per turn).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final

from services.router.domain.session import Session

TURN_COST: Final = 100
"""The default weight: a tenant of weight 200 takes two turns in its round, one of 50 takes one in every two."""


class _Ring:
    """The ready sessions of one tenant."""

    __slots__ = ("deficit", "running", "sessions", "visited")

    def __init__(self) -> None:
        self.sessions: deque[Session] = deque()
        self.deficit = 0
        self.running = 0
        self.visited = False
        """Whether its weight was added in this round."""


class Scheduler:
    """Ready sessions and running counts of all tenants.

    `max_running` bounds turns in flight in this router; `limits(tenant)` gives a tenant's (weight, most turns at once).
    """

    def __init__(self, max_running: int, limits: Callable[[str], tuple[int, int]]) -> None:
        self._max_running = max_running
        self._limits = limits
        self._tenants: dict[str, _Ring] = {}
        self._active: OrderedDict[str, None] = OrderedDict()
        """Tenants with ready sessions, in ring order."""
        self.running = 0
        self.waiting = 0

    def add(self, session: Session) -> None:
        """Makes a session ready. Adding it twice changes nothing."""
        if session.ready:
            return
        session.ready = True
        tenant = session.key.tenant
        ring = self._ring(tenant)
        ring.sessions.append(session)
        self.waiting += 1
        self._active.setdefault(tenant)

    def started(self, tenant: str) -> None:
        """Counts a turn in."""
        self.running += 1
        self._ring(tenant).running += 1

    def ended(self, tenant: str) -> None:
        """Counts a turn out."""
        self.running -= 1
        ring = self._ring(tenant)
        ring.running -= 1
        self._forget(tenant, ring)

    def may_start(self, tenant: str) -> bool:
        """Whether a turn of the tenant can start at once without overtaking anybody."""
        return not self.waiting and self.running < self._max_running and self._has_room(tenant)

    def pick(self, room: int) -> Iterator[Session]:
        """Takes up to `room` sessions in fair order. The caller calls `started` for each before it takes the next."""
        passed = 0
        while room > 0 and self._active and self.running < self._max_running and passed < len(self._active):
            tenant = next(iter(self._active))
            ring = self._tenants[tenant]
            if not self._has_room(tenant):
                self._active.move_to_end(tenant)
                passed += 1
                continue
            if not ring.visited:
                ring.visited = True
                ring.deficit += self._limits(tenant)[0]
            if ring.deficit < TURN_COST:
                ring.visited = False
                self._active.move_to_end(tenant)
                passed = 0  # it may start, in a later round: those that may not do not end the search for it
                continue
            session = ring.sessions.popleft()
            session.ready = False
            self.waiting -= 1
            ring.deficit -= TURN_COST
            if not ring.sessions:
                ring.deficit, ring.visited = 0, False
                del self._active[tenant]
            passed = 0
            room -= 1
            yield session

    def drop(self, lost: Callable[[Session], bool]) -> None:
        """Forgets ready sessions for which `lost` is true."""
        for tenant, ring in list(self._tenants.items()):
            kept = deque(session for session in ring.sessions if not lost(session))
            self.waiting -= len(ring.sessions) - len(kept)
            ring.sessions = kept
            if not kept:
                self._active.pop(tenant, None)
                self._forget(tenant, ring)

    def _has_room(self, tenant: str) -> bool:
        return self._ring(tenant).running < self._limits(tenant)[1]

    def _ring(self, tenant: str) -> _Ring:
        ring = self._tenants.get(tenant)
        if ring is None:
            ring = self._tenants[tenant] = _Ring()
        return ring

    def _forget(self, tenant: str, ring: _Ring) -> None:
        if not ring.sessions and not ring.running:
            self._tenants.pop(tenant, None)
