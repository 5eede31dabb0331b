"""CancelInvocation: afterwards the call either never runs, or has ended, or its outcome is unknown for good. Only then
may a transcript close it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import structlog

from services.toolgw.application.await_runner import Patience
from services.toolgw.application.places import Shared, WaitingPlaces
from services.toolgw.application.ports import InvocationStore
from services.toolgw.application.run_once import MAX_WAITING, MAX_WAITING_PER_TENANT
from services.toolgw.application.run_tool import Bounds
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
    """Settles calls in `store`; `default_timeout_s` counts where a cancel does not say how long it waits. Cancels have
    places of their own to wait in: a tenant whose calls fill theirs can still stop them."""

    def __init__(self, store: InvocationStore, default_timeout_s: float) -> None:
        self._store = store
        self._default_timeout_s = default_timeout_s
        self._places = WaitingPlaces(Bounds(of_process=MAX_WAITING, of_tenant=MAX_WAITING_PER_TENANT))
        self._looks = Shared[Invocation | None]()
        self._ends = Shared[None]()

    async def __call__(self, tenant: str, session_id: bytes, key: str, timeout_s: float = 0.0) -> Settled:
        """Store a tombstone under a key that has not come yet, or wait for the end of what runs. `timeout_s` (0: the
        default) after the first cancel of the key, by the database's clock, what still runs is given up.

        Raises:
            AlreadyExists: IDEMPOTENCY_KEY_REUSED, the key belongs to another session.
            ResourceExhausted: QUEUE_FULL, the call runs and there is no place to wait for it; a retry is safe.
            Unavailable: the database does not answer; a retry is safe.
        """
        found = await self._store.cancel(tenant, session_id, key)
        if found is None:
            return Settled(State.CANCELLED, None)
        settled = _settled(session_id, found)
        if settled is not None:
            return settled
        with self._places.taken(tenant, key):
            return await self._wait(tenant, session_id, found, timeout_s or self._default_timeout_s)

    async def _wait(self, tenant: str, session_id: bytes, found: Invocation, timeout_s: float) -> Settled:
        """Wait until a call that runs has ended, or end it. Whoever waits for one key shares the looks at it."""
        key, patience = found.key, Patience()
        while True:
            settled = _settled(session_id, found)
            if settled is not None:
                return settled
            left_s = timeout_s - found.asked_to_end_s
            if patience.holds_dead(found):
                await self._ends.do((tenant, key, found.claim), partial(self._settle, tenant, key, found))
            elif left_s <= 0:
                await self._ends.do((tenant, key, found.claim), partial(self._give_up, tenant, key, found))
            look = partial(self._look_later, tenant, key, patience, max(left_s, 0.0))
            again = await self._looks.do((tenant, key), look)
            if again is None:
                return Settled(State.UNKNOWN, None)  # Cleared away: its time was over.
            found = again

    async def _look_later(self, tenant: str, key: str, patience: Patience, at_most_s: float) -> Invocation | None:
        await patience.pause(at_most_s)
        return await self._store.find(tenant, key)

    async def _settle(self, tenant: str, key: str, found: Invocation) -> None:
        """End a call whose runner is dead; the next look sees what became of it, also when somebody was faster."""
        await self._store.end_without_result(tenant, key, found.claim, found.cancelled_after_runner_death)

    async def _give_up(self, tenant: str, key: str, found: Invocation) -> None:
        """Decide that the outcome is unknown, unless the call ends first; the next look sees which it was."""
        if await self._store.end_without_result(tenant, key, found.claim, State.UNKNOWN):
            log.warning("toolgw.cancel.given_up", tenant=tenant, tool=found.tool, key=key)
            _GIVEN_UP.inc()


def _settled(session_id: bytes, found: Invocation) -> Settled | None:
    """What became of a call; None while it runs. Raises AlreadyExists."""
    if found.session_id != session_id:
        raise refusals.key_reused(found.key)
    return None if found.state is State.RUNNING else Settled(found.state, found.outcome)
