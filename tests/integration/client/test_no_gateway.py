"""The client kit where nobody listens, or has no token to show: it says what to check instead of being silent."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from soma.gateway.v1.channel_service_pb2 import ConnectRequest
from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceStub
from structlog.testing import capture_logs

from soma_common import errors
from soma_common.client import ChannelClient
from soma_common.client.watch import watch_session
from soma_common.grpc.channel import open_channel
from soma_common.testing.eventually import eventually
from tests.integration.client.scripted import scripted_gateway
from tests.integration.client.test_channel_client import client
from tests.integration.client.wire import Wire
from tests.integration.gateway.harness import AGENT, World

NOBODY = "127.0.0.1:1"
SESSION = "tenants/demo/agents/assistant/channels/line/sessions/s"


def lonely(target: str = NOBODY, token: str | Callable[[], str] = "t", **options: float) -> ChannelClient:
    return ChannelClient(target, token=token, tenant="demo", channel="line", instance="line-1", **options)  # type: ignore[arg-type]


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def test_entering_waits_and_warns_once() -> None:
    with capture_logs() as logs, pytest.raises(TimeoutError):
        async with asyncio.timeout(0.6), lonely():
            pass
    first, *later = [line for line in logs if line["event"].startswith("channel_client.")]
    assert (first["event"], first["log_level"]) == ("channel_client.no_gateway", "warning")
    assert first["target"] == NOBODY
    assert "Connect call failed" in first["error"]
    assert "that a gateway runs there" in first["check"]
    assert later, "it has tried again"
    assert {line["log_level"] for line in later} == {"info"}


async def test_entering_within_a_bound_raises_what_was_wrong() -> None:
    with pytest.raises(errors.Unavailable) as failed:
        async with lonely(connect_timeout_s=0.3):
            pass
    assert failed.value.message.startswith(f"no gateway at {NOBODY} within 0.3 s: check the address")
    assert "Connect call failed" in failed.value.message
    assert not any(task.get_name().startswith("channel-") for task in asyncio.all_tasks())


async def test_a_gateway_that_takes_the_connection_and_says_nothing_is_given_up_within_the_bound() -> None:
    left = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(errors.Unavailable, match="it does not answer"):
        async with lonely(target, connect_timeout_s=0.3):
            pass
    async with asyncio.timeout(5):
        await left.wait()
    server.close()
    await server.wait_closed()


async def test_what_ends_each_stream_well_before_a_welcome_is_no_gateway_either() -> None:
    """A proxy may: each such stream counts as a try that has failed, and the first is told."""
    hellos = 0

    async def end(requests: AsyncIterator[ConnectRequest], _context: object) -> None:
        nonlocal hellos
        await anext(aiter(requests))
        hellos += 1

    async with scripted_gateway(end) as target:
        with capture_logs() as logs, pytest.raises(errors.Unavailable, match="ended before the gateway's welcome"):
            async with lonely(target, connect_timeout_s=1.0):
                pass
    told = [line for line in logs if line["event"].startswith("channel_client.")]
    assert (told[0]["event"], told[0]["log_level"]) == ("channel_client.no_gateway", "warning")
    assert {line["log_level"] for line in told[1:]} == {"info"}
    waits = [line["backoff_s"] for line in told[1:]]
    assert waits == [0.1, 0.2, 0.4, 0.8][: len(waits)]
    assert hellos == len(told)


async def test_the_wait_is_over_when_a_gateway_comes_within_the_bound(world: World) -> None:
    listen = free_address()
    with capture_logs() as logs:
        c = client(world, listen, connect_timeout_s=30.0)
        entering = asyncio.create_task(c.__aenter__())
        await eventually(lambda: "channel_client.no_gateway" in events(logs))
        await world.gateway(listen=listen)
        await entering
        assert "channel_client.gateway_found" in events(logs)
        await c.send(AGENT, "s", "x")
        await c.close()
    assert events(logs).count("channel_client.no_gateway") == 1


async def test_a_gateway_that_does_not_come_back_is_told_too(world: World) -> None:
    with capture_logs() as logs:
        async with Wire(await world.gateway()) as wire:
            c = await client(world, wire.address).__aenter__()
            wire.cut()
            await eventually(lambda: c.streams == 2 and c.welcome is not None)
        assert "channel_client.no_gateway" not in events(logs), "a loss that is mended at once is none to look after"
        await eventually(lambda: "channel_client.no_gateway" in events(logs))
        await c.close()
    assert "channel_client.stream_lost" in events(logs)


def events(logs: Sequence[Mapping[str, object]]) -> list[object]:
    return [line["event"] for line in logs]


async def test_a_token_that_cannot_be_read_is_told_with_its_file() -> None:
    missing = Path("/nowhere/demo.token")
    with capture_logs() as logs, pytest.raises(errors.Unauthenticated) as failed:
        async with lonely(token=missing.read_text):
            pass
    assert "No such file or directory: '/nowhere/demo.token'" in failed.value.message
    assert isinstance(failed.value.__cause__, FileNotFoundError)
    assert not any("exc_info" in line for line in logs), "the error says it all: no traceback beside it"


async def test_a_watch_whose_streams_end_well_without_an_event_is_told_too() -> None:
    class Ended:
        """A call that ends at once."""

        def WatchSession(self, _request: object) -> "Ended":
            return self

        def __aiter__(self) -> "Ended":
            return self

        async def __anext__(self) -> object:
            raise StopAsyncIteration

        def cancel(self) -> None:
            pass

    async def watch() -> None:
        async for _ in watch_session(cast(Any, Ended()), SESSION):
            pass

    with capture_logs() as logs, pytest.raises(TimeoutError):
        await asyncio.wait_for(watch(), 0.5)
    (line,) = [line for line in logs if line["event"].startswith("watch.")]
    assert (line["event"], line["error"]) == ("watch.no_stream", "the stream was ended before its first event")


async def test_a_watch_warns_once_that_nobody_is_there() -> None:
    async def watch() -> None:
        async with open_channel(NOBODY, token=lambda: "t", service="gateway") as channel:
            async for _ in watch_session(ChannelServiceStub(channel), SESSION):
                pass

    with capture_logs() as logs, pytest.raises(TimeoutError):
        await asyncio.wait_for(watch(), 1.0)
    (line,) = [line for line in logs if line["event"].startswith("watch.")]
    assert (line["event"], line["log_level"]) == ("watch.no_stream", "warning")
    assert "127.0.0.1:1" in line["error"]
    assert "that a gateway runs there" in line["check"]
