"""CancelInvocation: afterwards the call either never runs, or has ended, or its outcome is unknown for good. Only then
may a transcript close it."""

from __future__ import annotations

from typing import NamedTuple

import structlog

from services.toolgw.application.await_runner import Patience
from services.toolgw.application.ports import InvocationStore
from services.toolgw.domain import refusals
from services.toolgw.domain.invocation import Invocation, State
from services.toolgw.domain.outcome import Outcome
from soma_common.telemetry.metrics import counter

_GIVEN_UP = counter("soma_toolgw_given_up_total", "Calls that ran on when their turn no longer waited for them.")

log = structlog.get_logger(__name__)


class Settled(NamedTuple):
    """What became of a call; never RUNNING."""

    state: State
    outcome: Outcome | None
    """Set when DONE."""


class CancelInvocation:
    """Settles calls in `store`; `default_timeout_s` counts where a cancel does not say how long it waits."""

    def __init__(self, store: InvocationStore, default_timeout_s: float) -> None:
        self._store = store
        self._default_timeout_s = default_timeout_s

    async def __call__(self, tenant: str, session_id: bytes, key: str, timeout_s: float = 0.0) -> Settled:
        """Store a tombstone under a key that has not come yet, or wait for the end of what runs. `timeout_s` (0: the
        default) after the first cancel of the key, by the database's clock, what still runs is given up.

        Raises:
            AlreadyExists: IDEMPOTENCY_KEY_REUSED, the key belongs to another session.
            Unavailable: the database does not answer; a retry is safe.
        """
        timeout_s = timeout_s or self._default_timeout_s
        patience = Patience()
        while True:
            found = await self._store.cancel(tenant, session_id, key)
            if found is None:
                return Settled(State.CANCELLED, None)
            if found.session_id != session_id:
                raise refusals.key_reused(key)
            if found.state is not State.RUNNING:
                return Settled(found.state, found.outcome)
            left_s = timeout_s - found.asked_to_end_s
            if patience.holds_dead(found):
                await self._settle(tenant, key, found)
            elif left_s <= 0:
                await self._give_up(tenant, key, found)
            else:
                await patience.pause(left_s)

    async def _settle(self, tenant: str, key: str, found: Invocation) -> None:
        """End a call whose runner is dead; the next look sees what became of it, also when somebody was faster."""
        await self._store.end_without_result(tenant, key, found.claim, found.cancelled_after_runner_death)

    async def _give_up(self, tenant: str, key: str, found: Invocation) -> None:
        """Decide that the outcome is unknown, unless the call ends first; the next look sees which it was."""
        if await self._store.end_without_result(tenant, key, found.claim, State.UNKNOWN):
            log.warning("toolgw.cancel.given_up", tenant=tenant, tool=found.tool, key=key)
            _GIVEN_UP.inc()
