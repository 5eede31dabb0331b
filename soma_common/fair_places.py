"""Places in something scarce, such as the connections of a pool, that tenants take in turns."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from soma.common.v1.error_reason_pb2 import ErrorReason

from soma_common.errors import ResourceExhausted

RETRY_S: Final = 0.5


class FairPlaces:
    """So many places, of which one tenant takes at most `of_tenant`. Who finds none waits in its tenant's line; a place
    that comes free goes to the tenants' lines in turn, so that a long one delays its own tenant only.
    """

    def __init__(self, places: int, *, of_tenant: int, waiting: int, bound: str) -> None:
        """`waiting` is the longest line of a tenant; `bound` names it in errors."""
        self._free = places
        self._of_tenant = of_tenant
        self._waiting = waiting
        self._bound = bound
        self._held: dict[str, int] = {}
        """By tenant; none is 0."""
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By tenant, the one whose turn it is first; none is empty."""

    @asynccontextmanager
    async def taken(self, tenant: str, timeout_s: float) -> AsyncIterator[None]:
        """Holds a place for as long as the block lasts.

        Raises:
            ResourceExhausted: QUEUE_FULL, the tenant's line is full.
            TimeoutError: no place came free in time.
        """
        async with asyncio.timeout(timeout_s):
            await self._take(tenant)
        try:
            yield
        finally:
            self._give_back(tenant)

    async def _take(self, tenant: str) -> None:
        line = self._lines.get(tenant)
        if line is None:
            if self._free and self._held.get(tenant, 0) < self._of_tenant:
                self._give(tenant)
                return
            line = self._lines[tenant] = deque()
        elif len(line) >= self._waiting:
            raise ResourceExhausted(
                ErrorReason.ERROR_REASON_QUEUE_FULL,
                f"{self._waiting} reads of the tenant wait here already: ask for fewer at once, or another instance",
                {"bound": self._bound, "value": str(self._waiting)},
                retry_delay_s=RETRY_S,
            )
        place = asyncio.get_running_loop().create_future()
        line.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._leave(tenant, place)
            else:
                self._give_back(tenant)  # It came in the moment in which its taker left.
            raise

    def _leave(self, tenant: str, place: asyncio.Future[None]) -> None:
        line = self._lines.get(tenant)
        if line is not None and place in line:
            line.remove(place)
            if not line:
                del self._lines[tenant]

    def _give(self, tenant: str) -> None:
        self._free -= 1
        self._held[tenant] = self._held.get(tenant, 0) + 1

    def _give_back(self, tenant: str) -> None:
        self._free += 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        self._pass_on()

    def _pass_on(self) -> None:
        """Gives the place that came free to the tenant whose turn it is. Those that hold all they may miss theirs; they
        are fewer than there are places.
        """
        for _ in range(len(self._lines)):
            tenant, line = next(iter(self._lines.items()))
            while line and line[0].cancelled():  # Its taker has left and did not run since.
                line.popleft()
            given = bool(line) and self._held.get(tenant, 0) < self._of_tenant
            if given:
                self._give(tenant)
                line.popleft().set_result(None)
            if line:
                self._lines.move_to_end(tenant)
            else:
                del self._lines[tenant]
            if given:
                return
