"""Acks on their way to the routers: gathered, sent once each, kept while the bus is away."""

from __future__ import annotations

import asyncio

from soma.router.v1.outbound_pb2 import AckBatch, Presence

from services.gateway.application.ports import BusSilent
from services.gateway.application.return_acks import ReturnAcks
from soma_common.clock import monotonic
from soma_common.testing.eventually import eventually

TENANT, ROUTER = "demo", "router-0"


class Bus:
    """Keeps what is sent; `silent` takes nothing, and while it is not `open` it has not taken anything yet."""

    def __init__(self) -> None:
        self.sent: list[list[bytes]] = []
        self.silent = False
        self.open = asyncio.Event()
        self.open.set()
        self.losses = 0

    async def send_acks(self, tenant: str, router: str, batch: AckBatch) -> None:
        assert (tenant, router) == (TENANT, ROUTER)
        await self.open.wait()
        if self.silent:
            raise BusSilent
        self.sent.append(list(batch.acks))

    async def announce(self, tenant: str, presence: Presence) -> None:
        raise NotImplementedError


async def test_acks_that_come_close_together_go_together() -> None:
    bus = Bus()
    acks = ReturnAcks(bus, monotonic)
    acks.ack(TENANT, ROUTER, b"1")
    await asyncio.sleep(0)
    acks.ack(TENANT, ROUTER, b"2")
    assert bus.sent == []
    await acks.flush()
    assert bus.sent == [[b"1", b"2"]]


async def test_flush_sends_what_lingers_and_has_nothing_to_wait_for_otherwise() -> None:
    bus = Bus()
    acks = ReturnAcks(bus, monotonic)
    await acks.flush()
    acks.ack(TENANT, ROUTER, b"1")
    await acks.flush()
    assert bus.sent == [[b"1"]]
    await acks.flush()
    assert bus.sent == [[b"1"]]


async def test_what_comes_while_others_are_sent_goes_next() -> None:
    bus = Bus()
    bus.open.clear()
    acks = ReturnAcks(bus, monotonic)
    acks.ack(TENANT, ROUTER, b"1")
    await asyncio.sleep(0.01)
    acks.ack(TENANT, ROUTER, b"2")
    bus.open.set()
    await acks.flush()
    assert bus.sent == [[b"1"], [b"2"]]


async def test_a_silent_bus_loses_no_ack() -> None:
    bus = Bus()
    bus.silent = True
    acks = ReturnAcks(bus, monotonic)
    acks.ack(TENANT, ROUTER, b"1")
    await asyncio.sleep(0.06)
    assert bus.sent == []
    bus.silent = False
    await eventually(lambda: bus.sent == [[b"1"]])


async def test_acks_of_shortly_before_a_loss_are_sent_again() -> None:
    bus = Bus()
    acks = ReturnAcks(bus, monotonic)
    running = asyncio.create_task(acks.run())
    try:
        acks.ack(TENANT, ROUTER, b"1")
        await acks.flush()
        await asyncio.sleep(0)
        bus.losses += 1
        await eventually(lambda: bus.sent[1:2] == [[b"1"]])
    finally:
        running.cancel()
