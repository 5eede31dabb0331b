"""Waiting for a call that runs elsewhere: when to look again, and when to hold its runner to be dead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from services.toolgw.domain.invocation import Invocation, Runner
from soma_common import clock

FIRST_PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 0.25
SECOND_LOOK_S: Final = 1.5
"""A runner counts as dead when it was silent for its lease and still is after this time: after a pause of the
database all leases look run out until their holders have had a heartbeat."""


class Patience:
    """One caller's wait for one call."""

    def __init__(self, now: Callable[[], float] = clock.monotonic) -> None:
        self._now = now
        self._pause_s = FIRST_PAUSE_S
        self._silent_claim = ""
        self._silent_since = 0.0

    def holds_dead(self, found: Invocation) -> bool:
        """Whether the runner of `found` is to be held dead, after this and the earlier looks."""
        if found.runner is not Runner.SILENT:
            self._silent_claim = ""
            return found.runner is Runner.GONE
        if self._silent_claim != found.claim:
            self._silent_claim, self._silent_since = found.claim, self._now()
        return self._now() - self._silent_since >= SECOND_LOOK_S

    async def pause(self, at_most_s: float = LONGEST_PAUSE_S) -> None:
        """Wait until it is time to look again: soon at first, then less and less often."""
        await asyncio.sleep(min(self._pause_s, max(at_most_s, 0.0)))
        self._pause_s = min(self._pause_s * 1.6, LONGEST_PAUSE_S)
