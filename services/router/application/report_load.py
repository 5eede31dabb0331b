"""Tells the gateways what waits in this router's mailboxes, so that they refuse what is over a bound before it is
stored.

Small numbers are not worth a word: a tenant is spoken of while a hundredth of its bound waits here, or a session of
it is at its own bound, and once more when that is over. News that is lost comes again with the next report.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from soma.router.v1.outbound_pb2 import MailboxLoad

from soma_common.clock import monotonic
from soma_common.telemetry.metrics import gauge

if TYPE_CHECKING:
    from services.router.application.state import RouterState

REPORT_S: Final = 0.5
LOOK_S: Final = 0.05
"""How soon a session that reaches its bound is spoken of, or a tenant that comes closer to its own."""
SMALL: Final = 100
"""A tenant with less than one in so many of its bound in this router is not worth a report."""
LAST_WORDS: Final = 2
"""Reports after a tenant has become small again: one may be lost."""

WAITING = gauge("soma_router_messages_waiting", "Messages in the mailbox that wait for their turn.")
FULL = gauge("soma_router_sessions_full", "Sessions with as many waiting messages as a session may have.")


class ReportLoad:
    """The reports of one router. `send(tenant, load)` may lose one; a router that may not speak says nothing."""

    def __init__(
        self,
        state: RouterState,
        router: str,
        send: Callable[[str, MailboxLoad], Awaitable[None]],
        may_speak: Callable[[], bool],
        *,
        tenant_bound: int,
    ) -> None:
        self._state = state
        self._router = router
        self._send = send
        self._may_speak = may_speak
        self._small = max(tenant_bound // SMALL, 1)
        self._told: dict[str, int] = {}
        """Tenants that were reported, each with how many reports are due after it is small again."""
        WAITING.set_function(lambda: state.mailbox.waiting)
        FULL.set_function(lambda: sum(len(mail.full) for _, mail in state.mailbox))

    async def run(self) -> None:
        """Reports until cancelled."""
        due = monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            if monotonic() >= due:
                due = monotonic() + REPORT_S
                await self.report_all()
            elif self._state.mailbox.crossed:
                await self.report_crossed()

    async def report_all(self) -> None:
        """Speaks of every tenant that is not small, or was not just now."""
        if not self._may_speak():
            return
        self._state.mailbox.crossed.clear()
        loaded = {t for t, mail in self._state.mailbox if mail.waiting >= self._small or mail.full}
        for tenant in loaded:
            self._told[tenant] = LAST_WORDS
        for tenant in list(self._told):
            await self._send(tenant, self._load(tenant))
            if tenant not in loaded:
                self._told[tenant] -= 1
                if not self._told[tenant]:
                    del self._told[tenant]

    async def report_crossed(self) -> None:
        """Speaks of tenants for which a bound has come closer."""
        if not self._may_speak():
            return
        crossed = list(self._state.mailbox.crossed)
        self._state.mailbox.crossed.clear()
        for tenant in crossed:
            self._told[tenant] = LAST_WORDS
            await self._send(tenant, self._load(tenant))

    def _load(self, tenant: str) -> MailboxLoad:
        mail = self._state.mailbox.tenant(tenant)
        load = MailboxLoad(router=self._router)
        full: dict[int, list[bytes]] = {}
        for session_id, number in mail.full.items():
            full.setdefault(number, []).append(session_id)
        for partition in self._state.partitions.values():
            load.partitions.add(
                partition=partition.id,
                epoch=partition.epoch,
                waiting=mail.partitions.get(partition.id, 0),
                full_sessions=full.get(partition.id, ()),
            )
        return load
