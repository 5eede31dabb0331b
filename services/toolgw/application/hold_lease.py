"""The lease by which other instances see that this one lives, and so that its calls still run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from services.toolgw.application.ports import LeaseStore
from soma_common import clock
from soma_common.errors import Unavailable

LEASE_S: Final = 5.0
"""A runner that was silent for so long is held to be dead."""
HEARTBEAT_S: Final = 1.0
BEGIN_WITHIN_S: Final = 3.0
"""Calls are begun only so long after the last heartbeat: a call begun later might be given up while it runs."""

log = structlog.get_logger(__name__)


class RunnerLease:
    """This process's lease. No decision about safety depends on it: a runner wrongly held to be dead cannot store a
    result over what was decided without it. It only decides how soon others stop waiting."""

    def __init__(self, store: LeaseStore, now: Callable[[], float] = clock.monotonic) -> None:
        self._store = store
        self._now = now
        self._renewed_at: float | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether calls may be begun."""
        return self._renewed_at is not None and self._now() - self._renewed_at < BEGIN_WITHIN_S

    async def acquire(self) -> None:
        """Take the lease for the first time, in the place of earlier processes of this instance. Raises Unavailable."""
        await self._store.replace_predecessors()
        await self._renew()

    async def run(self) -> None:
        """Renew the lease until cancelled; a database that is away is tried again each second."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self._renew()
            except Unavailable as error:
                log.warning("toolgw.lease.not_renewed", error=str(error))

    async def release(self) -> None:
        """Give the lease back: whoever waits for a call of this process need not wait for its end."""
        self._renewed_at = None
        await self._store.release()

    async def _renew(self) -> None:
        asked_at = self._now()  # The lease runs from here at the latest; the answer may be slow.
        await self._store.renew(LEASE_S)
        self._renewed_at = asked_at
