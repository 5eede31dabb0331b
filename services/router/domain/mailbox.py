"""How many messages and controls wait, by tenant and partition, and which sessions are at their bound.

Only counted here, never refused: what is in a lane was accepted. The gateways refuse, by what the routers tell them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from services.router.domain.session import Session

FULL_SESSIONS: Final = 4096
"""Most sessions of a tenant that are named as being at their bound: beyond it the tenant's own bound has to do."""

STEPS: Final = 20
"""A tenant comes closer to its bound in so many steps, each worth a word at once."""


@dataclass(slots=True)
class TenantMail:
    """What waits for one tenant in this router."""

    waiting: int = 0
    partitions: dict[int, int] = field(default_factory=dict)
    """What waits by partition; none is 0."""
    full: dict[bytes, int] = field(default_factory=dict)
    """Sessions at their bound, each with its partition."""


class Mailbox:
    """The waiting messages and controls of this router, counted. For a tenant a control that waits counts as a message;
    a session is full with `session_bound` of either: whoever cancels what waits takes no places of messages.
    """

    def __init__(self, session_bound: int, tenant_bound: int) -> None:
        self.session_bound = session_bound
        self._tenant_step = max(tenant_bound // STEPS, 1)
        self.waiting = 0
        self._tenants: dict[str, TenantMail] = {}
        self.crossed: set[str] = set()
        """Tenants that have come a step closer to their bound, or of which a session has reached its own or left it,
        since somebody last looked.
        """

    def added(self, session: Session) -> None:
        """A message was put into the session's queue."""
        tenant = session.key.tenant
        mail = self._tenants.get(tenant)
        if mail is None:
            mail = self._tenants[tenant] = TenantMail()
        number = session.partition.id
        self.waiting += 1
        mail.waiting += 1
        mail.partitions[number] = mail.partitions.get(number, 0) + 1
        if mail.waiting % self._tenant_step == 0:
            self.crossed.add(tenant)
        is_full = len(session.queue) >= self.session_bound or session.waiting_controls >= self.session_bound
        if is_full and session.id not in mail.full and len(mail.full) < FULL_SESSIONS:
            mail.full[session.id] = number
            self.crossed.add(tenant)

    def taken(self, session: Session) -> None:
        """A message was taken out of the session's queue."""
        self._less(session, 1)

    def control_added(self, session: Session) -> None:
        """A control of the session has to wait."""
        session.waiting_controls += 1
        self.added(session)

    def controls_taken(self, session: Session, count: int) -> None:
        """So many of them do not wait any more."""
        session.waiting_controls -= count
        self._less(session, count)

    def forget(self, session: Session) -> None:
        """What waits of the session is not this router's any more."""
        count = len(session.queue) + session.waiting_controls
        session.waiting_controls = 0
        if count:
            self._less(session, count)
        mail = self._tenants.get(session.key.tenant)
        if mail is not None:
            mail.full.pop(session.id, None)

    def tenant(self, tenant: str) -> TenantMail:
        """What waits for a tenant."""
        return self._tenants.get(tenant) or TenantMail()

    def __iter__(self) -> Iterator[tuple[str, TenantMail]]:
        """Tenants for which something waits."""
        return iter(self._tenants.items())

    def _less(self, session: Session, count: int) -> None:
        tenant, number, bound = session.key.tenant, session.partition.id, self.session_bound
        mail = self._tenants[tenant]
        self.waiting -= count
        mail.waiting -= count
        left = mail.partitions[number] - count
        if left:
            mail.partitions[number] = left
        else:
            del mail.partitions[number]
        if session.id in mail.full and len(session.queue) < bound and session.waiting_controls < bound:
            del mail.full[session.id]
            self.crossed.add(tenant)
        if not mail.waiting:
            del self._tenants[tenant]
