"""CancelInvocation: afterwards the call either never runs, or has ended. Only then may a transcript call it
cancelled."""

from __future__ import annotations

from typing import NamedTuple

from services.toolgw.application.await_runner import Patience
from services.toolgw.application.ports import InvocationStore
from services.toolgw.domain import refusals
from services.toolgw.domain.invocation import Invocation, State
from services.toolgw.domain.outcome import Outcome


class Settled(NamedTuple):
    """What became of a call; never RUNNING."""

    state: State
    outcome: Outcome | None
    """Set when DONE."""


class CancelInvocation:
    """Settles calls in `store`."""

    def __init__(self, store: InvocationStore) -> None:
        self._store = store

    async def __call__(self, tenant: str, session_id: bytes, key: str) -> Settled:
        """Store a tombstone under a key that has not come yet, or wait for the end of what runs. Waits as long as the
        caller.

        Raises:
            AlreadyExists: IDEMPOTENCY_KEY_REUSED, the key belongs to another session.
            Unavailable: the database does not answer; a retry is safe.
        """
        patience = Patience()
        while True:
            found = await self._store.cancel(tenant, session_id, key)
            if found is None:
                return Settled(State.CANCELLED, None)
            if found.session_id != session_id:
                raise refusals.key_reused(key)
            if found.state is not State.RUNNING:
                return Settled(found.state, found.outcome)
            if patience.holds_dead(found):
                await self._settle(tenant, key, found)
            else:
                await patience.pause()

    async def _settle(self, tenant: str, key: str, found: Invocation) -> None:
        """End a call whose runner is dead; the next look sees what became of it, also when somebody was faster."""
        await self._store.end_without_result(tenant, key, found.claim, found.cancelled_after_runner_death)
