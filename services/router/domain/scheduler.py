"""Which session gets the next turn: deficit round robin over tenants by weight, first come first served over the
sessions of a tenant.

A tenant that floods fills only its own ring; others keep their share (Shreedhar and Varghese, "Efficient Fair Queuing
using Deficit Round Robin", 1995, with a cost of one per turn).

Two gates stand before a turn: how many turns a tenant may run at once, and how many an agent; 0 means paused. A tenant
without room leaves the round until a turn of it ends. Sessions of an agent without room are set aside (*parked*) when
their turn comes, so that the sessions of other agents pass; they come back in their order, and before whatever became
ready after them, when a turn of the agent ends. `gates_changed` says that there may be more room than there was.

Every operation takes a bounded number of steps, amortized over the sessions that pass; only `drop` and
`gates_changed`, which are rare, look at everything.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final

from services.router.domain.session import Session, SessionKey

NO_CROWD: Final = 1_000_000
TURN_COST: Final = 100
"""The default weight: a tenant of weight 200 takes two turns in its round, one of 50 takes one in every two."""


class _Agent:
    """What runs of one agent, and its sessions that were set aside."""

    __slots__ = ("parked", "running")

    def __init__(self) -> None:
        self.parked: deque[Session] = deque()
        self.running = 0


class _Ring:
    """The ready sessions of one tenant."""

    __slots__ = ("agents", "deficit", "open", "running", "sessions", "visited", "waiting")

    def __init__(self) -> None:
        self.sessions: deque[Session] = deque()
        self.agents: dict[str, _Agent] = {}
        """Agents with running turns or parked sessions."""
        self.open: OrderedDict[str, None] = OrderedDict()
        """Agents with parked sessions that may have room again."""
        self.deficit = 0
        self.running = 0
        self.waiting = 0
        """Its ready sessions, the parked ones included."""
        self.visited = False
        """Whether its weight was added in this round."""

    def agent(self, name: str) -> _Agent:
        found = self.agents.get(name)
        if found is None:
            found = self.agents[name] = _Agent()
        return found

    def forget(self, name: str, agent: _Agent) -> None:
        """An agent with nothing to do costs no memory, and one with nothing parked is not looked at."""
        if not agent.parked:
            self.open.pop(name, None)
            if not agent.running:
                self.agents.pop(name, None)


class Scheduler:
    """Ready sessions and running counts of all tenants.

    `max_running` bounds turns in flight in this router; `limits(tenant)` gives a tenant's (weight, most turns at once),
    `agent_limit(tenant, agent)` the most turns of an agent at once. Of a tenant that is not alone a group starts at
    most `crowd` turns: what starts together passes every hop together, and neighbours would wait for all of it.
    """

    def __init__(
        self,
        max_running: int,
        limits: Callable[[str], tuple[int, int]],
        agent_limit: Callable[[str, str], int],
        crowd: int = NO_CROWD,
    ) -> None:
        self._crowd = crowd
        self._started: Counter[str] = Counter()
        """Turns started in the present group, by tenant."""
        self._held: OrderedDict[str, None] = OrderedDict()
        """Tenants that have started a crowd and wait for the next group."""
        self._max_running = max_running
        self._limits = limits
        self._agent_limit = agent_limit
        self._tenants: dict[str, _Ring] = {}
        self._active: OrderedDict[str, None] = OrderedDict()
        """Tenants with sessions that may be startable, in ring order."""
        self.running = 0
        self.waiting = 0
        """Ready sessions, those included that no gate lets through."""

    @property
    def startable(self) -> bool:
        """Whether a session may wait only for room in a brain: then it is worth a look when there is some."""
        return bool(self._active or self._held) and self.running < self._max_running

    @property
    def started_in_group(self) -> int:
        """Turns started since `open_group`."""
        return self._started.total()

    def open_group(self) -> None:
        """A new group begins: every tenant may start turns again."""
        self._started.clear()
        self._let_go()

    def add(self, session: Session) -> None:
        """Makes a session ready. Adding it twice changes nothing."""
        if session.ready:
            return
        session.ready = True
        tenant = session.key.tenant
        ring = self._ring(tenant)
        ring.sessions.append(session)
        ring.waiting += 1
        self.waiting += 1
        self._active.setdefault(tenant)

    def started(self, key: SessionKey) -> None:
        """Counts a turn in."""
        self.running += 1
        self._started[key.tenant] += 1
        ring = self._ring(key.tenant)
        ring.running += 1
        ring.agent(key.agent).running += 1

    def ended(self, key: SessionKey) -> None:
        """Counts a turn out: there is room for another of its agent and its tenant."""
        self.running -= 1
        ring = self._tenants[key.tenant]
        agent = ring.agents[key.agent]
        ring.running -= 1
        agent.running -= 1
        if agent.parked:
            ring.open.setdefault(key.agent)
        ring.forget(key.agent, agent)
        if ring.sessions or ring.open:
            self._active.setdefault(key.tenant)
        self._forget(key.tenant, ring)

    def gates_changed(self) -> None:
        """Tenants or agents may have other limits than before: whatever was held up is looked at again."""
        for tenant, ring in self._tenants.items():
            ring.open.update((name, None) for name, agent in ring.agents.items() if agent.parked)
            if ring.sessions or ring.open:
                self._active.setdefault(tenant)

    def may_start(self, key: SessionKey) -> bool:
        """Whether a turn of the session can start at once without overtaking anybody who could start too."""
        if self.running >= self._max_running:
            return False
        self._let_go_if_alone()
        if self._is_crowd(key.tenant):
            return False
        while self._active:
            first = next(iter(self._active))
            if self._is_crowd(first):
                self._hold(first)
                continue
            if self._head(first, self._tenants[first]) is not None:
                return False
            self._leave_round(first)
        ring = self._tenants.get(key.tenant)
        agent = ring.agents.get(key.agent) if ring is not None else None
        if agent is not None and agent.parked:
            return False
        return self._tenant_has_room(key.tenant, ring) and self._agent_has_room(key.tenant, key.agent, agent)

    def pick(self, room: int) -> Iterator[Session]:
        """Takes up to `room` sessions in fair order. The caller calls `started` for each before it takes the next."""
        self._let_go_if_alone()
        while room > 0 and self._active and self.running < self._max_running:
            tenant = next(iter(self._active))
            if self._is_crowd(tenant):
                self._hold(tenant)
                continue
            ring = self._tenants[tenant]
            sessions = self._head(tenant, ring)
            if sessions is None:
                self._leave_round(tenant)
                continue
            if not ring.visited:
                ring.visited = True
                ring.deficit += self._limits(tenant)[0]
            if ring.deficit < TURN_COST:
                ring.visited = False
                self._active.move_to_end(tenant)
                continue
            session = sessions.popleft()
            session.ready = False
            self.waiting -= 1
            ring.waiting -= 1
            ring.deficit -= TURN_COST
            agent = ring.agents.get(session.key.agent)
            if agent is not None:
                ring.forget(session.key.agent, agent)
            if not ring.sessions and not ring.open:
                self._leave_round(tenant)
            room -= 1
            yield session

    def drop(self, lost: Callable[[Session], bool]) -> None:
        """Forgets ready sessions for which `lost` is true."""
        for tenant, ring in list(self._tenants.items()):
            ring.sessions = self._without(lost, ring, ring.sessions)
            for name, agent in list(ring.agents.items()):
                agent.parked = self._without(lost, ring, agent.parked)
                ring.forget(name, agent)
            if not ring.sessions and not ring.open:
                self._leave_round(tenant)

    def _is_crowd(self, tenant: str) -> bool:
        return self._started[tenant] >= self._crowd and len(self._tenants) > 1

    def _let_go(self) -> None:
        for tenant in self._held:
            ring = self._tenants[tenant]
            if ring.sessions or ring.open:
                self._active.setdefault(tenant)
        self._held.clear()

    def _let_go_if_alone(self) -> None:
        if self._held and len(self._tenants) <= 1:
            self._let_go()

    def _hold(self, tenant: str) -> None:
        del self._active[tenant]
        self._held[tenant] = None

    def _without(self, lost: Callable[[Session], bool], ring: _Ring, sessions: deque[Session]) -> deque[Session]:
        kept = deque(session for session in sessions if not lost(session))
        ring.waiting -= len(sessions) - len(kept)
        self.waiting -= len(sessions) - len(kept)
        return kept

    def _head(self, tenant: str, ring: _Ring) -> deque[Session] | None:
        """The queue whose first session is the tenant's next; None if no gate lets one through."""
        if not self._tenant_has_room(tenant, ring):
            return None
        while ring.open:
            name = next(iter(ring.open))
            agent = ring.agents[name]
            if agent.parked and self._agent_has_room(tenant, name, agent):
                return agent.parked
            del ring.open[name]
        while ring.sessions:
            name = ring.sessions[0].key.agent
            known = ring.agents.get(name)
            has_room = self._agent_has_room(tenant, name, known)
            if has_room and (known is None or not known.parked):
                return ring.sessions
            agent = ring.agent(name)
            agent.parked.append(ring.sessions.popleft())
            if has_room:  # more room than anybody has told: the parked go first
                ring.open[name] = None
                return agent.parked
        return None

    def _tenant_has_room(self, tenant: str, ring: _Ring | None) -> bool:
        return (0 if ring is None else ring.running) < self._limits(tenant)[1]

    def _agent_has_room(self, tenant: str, name: str, agent: _Agent | None) -> bool:
        return (0 if agent is None else agent.running) < self._agent_limit(tenant, name)

    def _leave_round(self, tenant: str) -> None:
        """The tenant has nothing that could start. What waits at a gate keeps the share that it has not used; the
        share of a tenant for which nothing waits is not saved up.
        """
        self._active.pop(tenant, None)
        ring = self._tenants[tenant]
        if not ring.waiting:
            ring.deficit, ring.visited = 0, False
        self._forget(tenant, ring)

    def _ring(self, tenant: str) -> _Ring:
        ring = self._tenants.get(tenant)
        if ring is None:
            ring = self._tenants[tenant] = _Ring()
        return ring

    def _forget(self, tenant: str, ring: _Ring) -> None:
        if not ring.waiting and not ring.running:
            self._active.pop(tenant, None)
            self._held.pop(tenant, None)
            self._tenants.pop(tenant, None)
