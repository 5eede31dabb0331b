"""The connection to the real NATS comes back by itself and says so when it cannot be made."""

import time
from pathlib import Path

import nats.errors
import pytest

from soma_common.errors import Unavailable, reason_name
from soma_common.nats.connection import connect_nats
from soma_common.telemetry.metrics import REGISTRY
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually


def connected(name: str) -> float | None:
    return REGISTRY.get_sample_value("soma_nats_connected", {"name": name})


async def test_a_lost_connection_is_made_again(nats_server: FaultyNats) -> None:
    client = await connect_nats(nats_server.url, nats_server.token_file, "test-0")
    subscription = await client.subscribe("soma.test")
    await nats_server.kill9()
    await eventually(lambda: not client.is_connected, what="the loss is noticed")
    await eventually(lambda: connected("test-0") == 0, what="the loss is shown")
    await nats_server.restart()
    await eventually(lambda: client.is_connected, what="the connection is back")
    await client.publish("soma.test", b"again")
    assert (await subscription.next_msg(timeout=2)).data == b"again"
    await eventually(lambda: connected("test-0") == 1, what="the connection is shown")
    assert REGISTRY.get_sample_value("soma_nats_reconnects_total", {"name": "test-0"}) == 1
    await client.close()


async def test_what_waits_for_a_lost_server_is_bounded(nats_server: FaultyNats) -> None:
    client = await connect_nats(nats_server.url, nats_server.token_file, "test-1")
    await nats_server.kill9()
    await eventually(lambda: client.is_reconnecting, what="the loss is noticed")

    async def flood() -> None:
        for _ in range(100):
            await client.publish("soma.test", b"x" * 256 * 1024)

    with pytest.raises(nats.errors.OutboundBufferLimitError):
        await flood()
    await nats_server.restart()
    await eventually(lambda: client.is_connected, what="the connection is back")
    await client.close()


async def test_a_server_that_is_not_there_is_told_within_the_limit() -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match="is it running") as failed:
        await connect_nats("nats://127.0.0.1:1", None, "test-2")
    assert reason_name(failed.value.reason) == "BUS_UNAVAILABLE"
    assert time.monotonic() - started < 10


async def test_a_wrong_token_is_told(nats_server: FaultyNats, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.token"
    wrong.write_text("no")
    with pytest.raises(Unavailable, match="is the token right"):
        await connect_nats(nats_server.url, wrong, "test-3")
