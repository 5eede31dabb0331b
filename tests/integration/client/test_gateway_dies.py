"""The gateway's process dies at the edges where it matters; the client kit and a second process make it whole."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from soma.common.v1.turn_pb2 import Delivery

from services.gateway.settings import GatewaySettings
from soma_common import ids
from soma_common.client import ChannelClient
from soma_common.testing.eventually import eventually
from tests.integration.client.test_channel_client import client
from tests.integration.gateway.harness import AGENT, CHANNEL, TENANT, World, delivery

ROOT = Path(__file__).parents[3]


def environment(settings: GatewaySettings) -> dict[str, str]:
    given = settings.model_dump(mode="json", include=settings.model_fields_set)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "gen")]),
        **{f"SOMA_{name.upper()}": str(value) for name, value in given.items()},
    }


@asynccontextmanager
async def gateway_process(
    world: World, listen: str, failpoints: str = "", **changes: object
) -> AsyncIterator[asyncio.subprocess.Process]:
    settings = world.settings("gateway-0", listen=listen, failpoints=failpoints, **changes)
    await world.make_lanes(settings)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.gateway.main",
        env=environment(settings),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.fixture
def listen() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def test_killed_between_the_bus_and_the_receipt_nothing_is_lost(world: World, listen: str) -> None:
    failpoint = "gateway.after_publish_before_ack=kill@3"
    async with gateway_process(world, listen, failpoint) as first, client(world, listen) as c:
        sending = asyncio.create_task(send_many(c, 10))
        await first.wait()
        async with gateway_process(world, listen):
            await sending
    stored = [item.message_id for _, item in await world.router.stored()]
    expected = [ids.message_id(TENANT, AGENT, CHANNEL, "s", f"k{number}") for number in range(10)]
    assert list(dict.fromkeys(stored)) == expected
    assert len(stored) == 11  # the one whose receipt was lost is there twice; routers take the first


async def send_many(c: ChannelClient, count: int) -> None:
    for number in range(count):
        await c.send(AGENT, "s", "x", idempotency_key=f"k{number}")


async def test_killed_after_a_delivery_the_instance_says_what_it_has_processed(world: World, listen: str) -> None:
    shown: list[Delivery] = []
    failpoint = "gateway.after_delivery_before_ack=kill"
    async with (
        gateway_process(world, listen, failpoint) as first,
        client(world, listen, on_delivery=shown.append) as c,
    ):
        gateway, stream = await world.router.stream("a")
        await world.router.hand_over(gateway, stream.stream, delivery(1))
        await first.wait()
        await eventually(lambda: shown)
        del world.router.presence[TENANT, gateway]  # a router forgets a silent gateway
        async with gateway_process(world, listen):
            again, stream = await world.router.stream("a", timeout_s=10)
            assert again != gateway
            await world.router.hand_over(again, stream.stream, delivery(1))
            await eventually(lambda: delivery(1).delivery_id in world.router.acks)
            assert c.streams >= 2
    assert len(shown) == 1


async def test_a_frozen_gateway_is_left_after_three_silent_intervals(world: World, listen: str) -> None:
    async with gateway_process(world, listen, heartbeat_interval_s=0.3) as frozen, client(world, listen) as c:
        await c.send(AGENT, "s", "x", idempotency_key="k1")
        frozen.send_signal(signal.SIGSTOP)
        try:
            sending = asyncio.create_task(c.send(AGENT, "s", "x", idempotency_key="k2"))
            await eventually(lambda: c.welcome is None, timeout_s=3)
        finally:
            frozen.send_signal(signal.SIGCONT)
        await asyncio.wait_for(sending, 15)
        assert c.streams >= 2
    stored = [item.message_id for _, item in await world.router.stored()]
    assert list(dict.fromkeys(stored)) == [ids.message_id(TENANT, AGENT, CHANNEL, "s", key) for key in ("k1", "k2")]
