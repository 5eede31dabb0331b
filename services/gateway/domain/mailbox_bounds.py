"""Refuses messages of tenants and sessions for which too many wait already, by what the routers tell.

A figure belongs to a partition and the owner's epoch. It is replaced by the figure of the partition's next owner, and
not added to it; without one it runs out, later than a new owner would have spoken. What the routers have not counted
yet is let in: what is in a lane, and what was accepted since their last report. While no router speaks the lanes' own
bounds protect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from soma.router.v1.outbound_pb2 import MailboxLoad

from services.gateway.domain.refusal import queue_full

EXPIRES_S: Final = 10.0
"""Longer than a take-over (a lease of 3 s, the load of what is pending) and the new owner's first report take."""
RETRY_MS: Final = 1000


@dataclass(slots=True)
class _Partition:
    epoch: int
    waiting: int
    full: frozenset[bytes]
    heard_at: float


@dataclass(slots=True)
class _Tenant:
    partitions: dict[int, _Partition] = field(default_factory=dict)
    waiting: int = 0
    full: frozenset[bytes] = frozenset()

    def add_up(self) -> None:
        self.waiting = sum(partition.waiting for partition in self.partitions.values())
        self.full = frozenset[bytes]().union(*(partition.full for partition in self.partitions.values()))


class MailboxBounds:
    """What waits for which tenant, and the bounds on it."""

    def __init__(self, *, per_tenant: int, per_session: int, clock: Callable[[], float]) -> None:
        self._per_tenant = per_tenant
        self._per_session = per_session
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}
        self._swept_at = clock()

    def on_load(self, tenant: str, load: MailboxLoad) -> None:
        """Takes a router's report."""
        self._sweep()
        known = self._tenants.get(tenant)
        if known is None:
            known = self._tenants[tenant] = _Tenant()
        now = self._clock()
        for said in load.partitions:
            had = known.partitions.get(said.partition)
            if had is None or said.epoch >= had.epoch:
                known.partitions[said.partition] = _Partition(
                    said.epoch, said.waiting, frozenset(said.full_sessions), now
                )
        known.add_up()

    def check_tenant(self, tenant: str) -> None:
        """Raises Refused when messages of the tenant have to wait outside."""
        known = self._tenants.get(tenant)
        if known is not None and known.waiting >= self._per_tenant:
            self._sweep()
            if known.waiting >= self._per_tenant:
                raise queue_full("tenant.queued_messages", self._per_tenant, RETRY_MS)

    def check_session(self, tenant: str, session_id: bytes) -> None:
        """Raises Refused when messages of the session have to wait outside."""
        known = self._tenants.get(tenant)
        if known is not None and session_id in known.full:
            self._sweep()
            if session_id in known.full:
                raise queue_full("session.queued_messages", self._per_session, RETRY_MS)

    def _sweep(self) -> None:
        """Forgets what nobody has confirmed for long."""
        now = self._clock()
        if now - self._swept_at < 1.0:
            return
        self._swept_at = now
        for tenant, known in list(self._tenants.items()):
            kept = {n: p for n, p in known.partitions.items() if now - p.heard_at < EXPIRES_S}
            if len(kept) < len(known.partitions):
                known.partitions = kept
                known.add_up()
                if not kept:
                    del self._tenants[tenant]
