"""Tells the routers what became of their deliveries: gathered per (tenant, router), without guarantee.

An ack that is lost costs a redelivery, which the stream answers with another ack; so nothing is kept for a bus that
is away.
"""

from __future__ import annotations

import asyncio
from typing import Final

from soma.router.v1.outbound_pb2 import AckBatch

from services.gateway.application.ports import BusSilent, Routers

MAX_BATCH: Final = 8192
"""Acks in one message: 150 kB."""


class ReturnAcks:
    """Collects during one pass of the event loop and sends at its end."""

    def __init__(self, routers: Routers) -> None:
        self._routers = routers
        self._open: dict[tuple[str, str], AckBatch] = {}
        self._task: asyncio.Task[None] | None = None

    def ack(self, tenant: str, router: str, delivery_id: bytes) -> None:
        """The delivery is processed."""
        batch = self._open.get((tenant, router))
        if batch is None:
            batch = self._batch(tenant, router)
        batch.acks.append(delivery_id)

    def give_back(
        self, tenant: str, router: str, delivery_id: bytes, *, delay_ms: int, counts: bool, cause: str
    ) -> None:
        """The delivery comes back, to be tried again after the delay; `counts`: the adapter refused it."""
        self._batch(tenant, router).returns.add(delivery_id=delivery_id, delay_ms=delay_ms, counts=counts, cause=cause)

    async def flush(self) -> None:
        """Waits until what was collected is sent."""
        if self._task is not None:
            await self._task

    def _batch(self, tenant: str, router: str) -> AckBatch:
        batch = self._open.get((tenant, router))
        if batch is None:
            batch = self._open[tenant, router] = AckBatch()
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._send())
        return batch

    async def _send(self) -> None:
        try:
            while self._open:
                going, self._open = self._open, {}
                for (tenant, router), batch in going.items():
                    for part in _cut(batch):
                        try:
                            await self._routers.send_acks(tenant, router, part)
                        except BusSilent:
                            continue
        finally:
            self._task = None


def _cut(batch: AckBatch) -> list[AckBatch]:
    """The batch in pieces that fit the bus."""
    if len(batch.acks) + len(batch.returns) <= MAX_BATCH:
        return [batch]
    acks, returns = list(batch.acks), list(batch.returns)
    parts = [AckBatch(acks=acks[at : at + MAX_BATCH]) for at in range(0, len(acks), MAX_BATCH)]
    return parts + [AckBatch(returns=returns[at : at + 1024]) for at in range(0, len(returns), 1024)]
