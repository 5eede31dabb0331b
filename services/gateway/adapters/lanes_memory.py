"""Lanes in memory: the fake of `lanes_nats.py` for tests, held to the same suite
(tests/contract/gateway/test_lanes.py)."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from soma.router.v1.inbound_pb2 import InBatch, Inbound

from services.gateway.application.ports import BatchUnacceptable, BusSilent, LaneFull
from soma_common.layout import BATCH_FORMAT


class MemoryLanes:
    """Port `Lanes`, with faults that a test can switch on."""

    def __init__(self, tenant_bound: int = 1000, max_payload: int = 1024 * 1024) -> None:
        self._tenant_bound = tenant_bound
        self._max_payload = max_payload
        self._known: set[str] = set()
        self.batches: dict[tuple[str, int], list[list[Inbound]]] = defaultdict(list)
        """What is stored, by tenant and lane."""
        self.in_flight: dict[tuple[str, int], int] = defaultdict(int)
        self.most_in_flight = 0
        """Most calls of one tenant and lane that were open at once."""
        self.silent = 0
        """So many calls get no answer."""
        self.stores_silently = False
        """Whether a call without an answer stores its batch."""
        self.delay_s = 0.0
        self.tries: list[str] = []
        """The batch ids of all calls."""

    async def store(self, tenant: str, lane: int, batch_id: str, items: Sequence[Inbound], timeout_s: float) -> int:
        """As the port says."""
        key = (tenant, lane)
        self.in_flight[key] += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight[key])
        try:
            self.tries.append(batch_id)
            await asyncio.sleep(self.delay_s)
            if self.silent:
                self.silent -= 1
                if self.stores_silently:
                    self._keep(key, batch_id, items)
                await asyncio.sleep(timeout_s)
                raise BusSilent
            self._keep(key, batch_id, items)
            return len(self.batches[key])
        finally:
            self.in_flight[key] -= 1

    def _keep(self, key: tuple[str, int], batch_id: str, items: Sequence[Inbound]) -> None:
        size = InBatch(format=BATCH_FORMAT, tenant=key[0], items=items).ByteSize()
        if size > self._max_payload:
            raise BatchUnacceptable(f"{size} bytes are more than its largest payload")
        if batch_id in self._known:
            return
        if len(self.batches[key]) >= self._tenant_bound:
            raise LaneFull("lane.tenant_batches", self._tenant_bound)
        self._known.add(batch_id)
        self.batches[key].append(list(items))
