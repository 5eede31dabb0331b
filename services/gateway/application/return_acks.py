"""Tells the routers what became of their deliveries: gathered per (tenant, router).

A session's next answer waits for the ack of the one before, so an ack must not get lost when the bus does: what could
not be sent is kept until it can, and what was sent shortly before the connection broke is sent again. Routers ignore
an ack they know.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from soma.router.v1.outbound_pb2 import AckBatch

from services.gateway.application.ports import BusSilent, Routers

MAX_BATCH: Final = 8192
"""Acks in one message: 150 kB."""
RECENT_S: Final = 6.0
"""Acks of so long before a loss are sent again; a frozen bus is noticed within four seconds."""
AGAIN_S: Final = (0.3, 2.0)
"""Pauses before they are: the routers' connections come back when they do, and are tried ten times a second."""
MAX_RECENT: Final = 4096
"""Batches remembered for that."""
LOOK_S: Final = 0.2
PAUSE_S: Final = 0.05
LINGER_S: Final = 0.001
"""How long acks wait for others, also without load. Where an answer is followed by the next message at once, as in a
crowd, its ack comes in that message's frame, and a router that is woken by the ack takes the processor from those who
store the message. It costs a session whose outcomes stand in line a millisecond for each.
"""

_Sent = tuple[float, tuple[str, str], AckBatch]
"""When, to whom (tenant, router), what."""


class ReturnAcks:
    """Collects during a millisecond and sends what there is."""

    def __init__(self, routers: Routers, clock: Callable[[], float]) -> None:
        self._routers = routers
        self._clock = clock
        self._open: dict[tuple[str, str], AckBatch] = {}
        self._recent: deque[_Sent] = deque(maxlen=MAX_RECENT)
        self._task: asyncio.Task[None] | None = None

    def ack(self, tenant: str, router: str, delivery_id: bytes) -> None:
        """The delivery is processed."""
        batch = self._open.get((tenant, router))
        if batch is None:
            batch = self._batch((tenant, router))
        batch.acks.append(delivery_id)

    def give_back(
        self, tenant: str, router: str, delivery_id: bytes, *, delay_ms: int, counts: bool, cause: str
    ) -> None:
        """The delivery comes back, to be tried again after the delay; `counts`: the adapter refused it."""
        self._batch((tenant, router)).returns.add(
            delivery_id=delivery_id, delay_ms=delay_ms, counts=counts, cause=cause
        )

    async def run(self) -> None:
        """Sends the latest acks again whenever the connection was lost, until cancelled."""
        losses = self._routers.losses
        while True:
            await asyncio.sleep(LOOK_S)
            if losses == self._routers.losses:
                continue
            losses = self._routers.losses
            suspect = list(self._recent)
            for pause in AGAIN_S:
                await asyncio.sleep(pause)
                self._send_again(suspect)

    async def flush(self) -> None:
        """Waits until what was collected is sent."""
        if self._task is not None:
            await self._task

    def _batch(self, key: tuple[str, str]) -> AckBatch:
        batch = self._open.get(key)
        if batch is None:
            batch = self._open[key] = AckBatch()
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._send())
        return batch

    def _send_again(self, sent: list[_Sent]) -> None:
        for _, key, batch in sent:
            self._batch(key).acks.extend(batch.acks)

    async def _send(self) -> None:
        try:
            await asyncio.sleep(LINGER_S)
            while self._open:
                going, self._open = self._open, {}
                for key, batch in going.items():
                    for part in _cut(batch):
                        await self._send_part(key, part)
        finally:
            self._task = None

    async def _send_part(self, key: tuple[str, str], part: AckBatch) -> None:
        """Sends as soon as the bus takes it. While it does not, adapters get no deliveries, so little gathers."""
        while True:
            try:
                await self._routers.send_acks(*key, part)
            except BusSilent:
                await asyncio.sleep(PAUSE_S)
                continue
            break
        now, recent = self._clock(), self._recent
        while recent and recent[0][0] < now - RECENT_S:
            recent.popleft()
        recent.append((now, key, part))


def _cut(batch: AckBatch) -> list[AckBatch]:
    """The batch in pieces that fit the bus."""
    if len(batch.acks) + len(batch.returns) <= MAX_BATCH:
        return [batch]
    acks, returns = list(batch.acks), list(batch.returns)
    parts = [AckBatch(acks=acks[at : at + MAX_BATCH]) for at in range(0, len(acks), MAX_BATCH)]
    return parts + [AckBatch(returns=returns[at : at + 1024]) for at in range(0, len(returns), 1024)]
