"""Tells the gateways how far this router has taken the lanes in, so that no tenant's messages pile up in them before
everybody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from soma.router.v1.outbound_pb2 import LaneProgress

from soma_common.clock import monotonic

if TYPE_CHECKING:
    from services.router.domain.partition import Partition

PACE_S: Final = 0.01
"""Between two reports."""
IDLE_LOOK_S: Final = 0.05
"""How long nothing is taken in before the lanes are looked at all the same: what they hold may be for others."""
AGAIN_S: Final = 0.25
"""A lane that does not move is spoken of all the same: silence means that this router is away."""


class Lane(Protocol):
    """A lane as it is read."""

    last_seq: int
    """Last lane message seen."""

    def partitions(self) -> list[Partition]:
        """This router's partitions that the lane carries."""


class ReportProgress:
    """The reports of one router; `send` may lose one, the next says more. Who has filled the window of a gateway waits
    for them, so what was taken in is told at once, not at the next look.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        router: str,
        send: Callable[[LaneProgress], Awaitable[None]],
        may_speak: Callable[[], bool],
    ) -> None:
        self._lanes = lanes
        self._router = router
        self._send = send
        self._may_speak = may_speak
        self._taken_in = asyncio.Event()
        self._said: dict[int, tuple[int, float]] = {}

    async def run(self) -> None:
        """Reports until cancelled."""
        while True:
            self._taken_in.clear()
            await self.report()
            await asyncio.sleep(PACE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_LOOK_S):
                    await self._taken_in.wait()

    def taken_in(self) -> None:
        """Lane messages are in the mailbox."""
        self._taken_in.set()

    async def report(self) -> None:
        """Speaks of lanes that have moved, or were not spoken of for long."""
        if not self._may_speak():
            return
        now = monotonic()
        for number, lane in enumerate(self._lanes):
            place = _place(lane)
            if place is None:
                continue
            said, said_at = self._said.get(number, (0, 0.0))
            if place != said or now - said_at >= AGAIN_S:
                self._said[number] = (place, now)
                await self._send(LaneProgress(router=self._router, lane=number, seq=place))


def _place(lane: Lane) -> int | None:
    """The place up to which everything is in the mailbox; None if nothing of the lane is this router's."""
    return min(
        (
            # What was read of it is on its way, or its reader has yet to go back for it; else it has all that was seen.
            p.cursor.seq if p.read_seq > p.cursor.seq or not p.attached else max(lane.last_seq, p.cursor.seq)
            for p in lane.partitions()
        ),
        default=None,
    )
