"""How calls behave when the other side is slow, gone, frozen or not ready."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from soma.cognition.v1.cognition_service_pb2 import RunTurnsRequest
from soma.cognition.v1.cognition_service_pb2_grpc import CognitionServiceStub
from soma.toolgw.v1.tool_service_pb2 import CancelInvocationRequest, ListToolsRequest
from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceStub

from soma_common.authz.tokens import load_token
from soma_common.errors import from_rpc_error, reason_name
from soma_common.grpc import service_config
from soma_common.grpc.channel import open_channel
from soma_common.settings import ServiceSettings
from soma_common.testing.auth import Identities
from soma_common.testing.eventually import eventually
from tests.integration.soma_common.conftest import Stack
from tests.stalls import Stalls

DEMO = ListToolsRequest(parent="tenants/demo")


@asynccontextmanager
async def server_process(identities: Identities) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run a server of its own, so that it can be frozen; yields the process and its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.soma_common.serve_tools",
        str(identities.keys_file.parent),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 20)
        yield process, f"127.0.0.1:{int(line)}"
    finally:
        process.kill()
        await process.wait()


async def test_a_frozen_peer_is_noticed(identities: Identities) -> None:
    async with (
        Stalls() as stalls,
        server_process(identities) as (process, address),
        open_channel(address, token=identities.bearer(), service="cognition") as channel,
    ):
        stub = ToolServiceStub(channel)
        await stub.ListTools(DEMO)
        process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ListTools(DEMO, timeout=20)
        process.send_signal(signal.SIGCONT)
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 9 + stalls.since(started)


async def test_a_killed_peer_is_found_again(identities: Identities, tmp_path: Path) -> None:
    first = Stack(identities, ServiceSettings(service_instance="toolgw-0"))
    await first.server.start()
    await first.server.set_serving(True)
    address = first.address
    async with (
        Stalls() as stalls,
        open_channel(address, token=identities.bearer(), service="toolgw", wait_for_ready=True) as channel,
    ):
        stub = ToolServiceStub(channel)
        await stub.ListTools(DEMO)
        await first.server.stop(0)
        waiting = asyncio.ensure_future(stub.ListTools(DEMO, timeout=10))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        second = Stack(identities, ServiceSettings(service_instance="toolgw-0", listen=address))
        await second.server.start()
        await second.server.set_serving(True)
        started = time.monotonic()
        await waiting
        assert time.monotonic() - started < 3 + stalls.since(started)
        assert len(second.tools.requests) == 1
        await second.server.stop(0)


async def test_an_unreachable_peer_is_an_error_with_a_reason(identities: Identities) -> None:
    async with open_channel("127.0.0.1:1", token=identities.bearer(), service="toolgw") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await ToolServiceStub(channel).ListTools(DEMO)
    assert reason_name(from_rpc_error(failed.value).reason) == "SERVICE_UNAVAILABLE"


async def test_an_idempotent_call_is_tried_again_when_the_peer_is_unavailable(stack: Stack) -> None:
    failures = iter([True, True, False])

    def fail_twice() -> None:
        if next(failures):
            raise from_rpc_error(
                grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())
            )

    stack.tools.behave = fail_twice
    async with stack.channel() as channel:
        await ToolServiceStub(channel).ListTools(DEMO)
    assert len(stack.tools.requests) == 3


@pytest.fixture
def brief_default(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> float:
    """Channels that are opened now take a default of so many seconds for ListTools; the server, which is slower than
    that, keeps its own."""
    brief_s = 0.3
    name = {"service": "soma.toolgw.v1.ToolService", "method": "ListTools"}
    config = {"methodConfig": [{"name": [name], "timeout": f"{brief_s}s"}]}
    monkeypatch.setattr(service_config, "load_service_config", lambda _: config)
    stack.tools.behave = lambda: asyncio.sleep(2 * brief_s)
    return brief_s


async def test_a_call_may_take_longer_than_its_methods_default(stack: Stack, brief_default: float) -> None:
    async with stack.channel() as channel:
        await ToolServiceStub(channel).ListTools(DEMO, timeout=20)
    (left_s,) = stack.tools.time_left
    assert left_s is not None
    assert left_s > 10


async def test_a_call_may_take_less_than_its_methods_default(stack: Stack) -> None:
    stack.tools.behave = lambda: asyncio.sleep(3)
    async with stack.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await ToolServiceStub(channel).ListTools(DEMO, timeout=0.3)
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("service", ["toolgw", "cognition"])
async def test_a_call_without_a_timeout_has_its_methods_default(
    stack: Stack, brief_default: float, service: str
) -> None:
    """Whatever service the channel was opened for: a peer that does not answer must not keep its callers."""
    async with open_channel(stack.address, token=stack.identities.bearer(), service=service) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await ToolServiceStub(channel).ListTools(DEMO)
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    (left_s,) = stack.tools.time_left
    assert left_s is not None
    assert left_s <= brief_default


async def test_nothing_else_is_tried_again(stack: Stack) -> None:
    async with stack.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await ToolServiceStub(channel).CancelInvocation(CancelInvocationRequest())
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_peer_that_is_not_serving_gets_no_calls(stack: Stack) -> None:
    async with stack.channel() as channel:
        stub = ToolServiceStub(channel)
        await stub.ListTools(DEMO)
        await stack.server.set_serving(False)

        async def is_refused() -> bool:
            try:
                await stub.ListTools(DEMO, timeout=0.5, wait_for_ready=False)
            except grpc.aio.AioRpcError:
                return True
            return False

        await eventually(is_refused, what="calls stop")
        await stack.server.set_serving(True)
        await stub.ListTools(DEMO, wait_for_ready=True)


async def test_several_addresses_take_turns(identities: Identities) -> None:
    stacks = [Stack(identities, ServiceSettings(service_instance=f"toolgw-{n}")) for n in range(2)]
    for one in stacks:
        await one.server.start()
        await one.server.set_serving(True)
    target = ",".join(one.address for one in stacks)
    async with open_channel(target, token=identities.bearer(), service="soma.toolgw.v1.ToolService") as channel:
        stub = ToolServiceStub(channel)

        async def both_were_called() -> bool:
            await stub.ListTools(DEMO)
            return all(one.tools.requests for one in stacks)

        await eventually(both_were_called)
    for one in stacks:
        await one.server.stop(0)


async def test_the_token_is_read_again(stack: Stack, tmp_path: Path) -> None:
    path = tmp_path / "own.token"
    path.write_text(stack.identities.token("first"))
    async with open_channel(stack.address, token=load_token(path), service="toolgw") as channel:
        stub = ToolServiceStub(channel)
        await stub.ListTools(DEMO)
        renewed = tmp_path / "renewed"
        renewed.write_text(stack.identities.token("second"))
        renewed.replace(path)

        async def second_was_seen() -> bool:
            await stub.ListTools(DEMO)
            return stack.tools.callers[-1].subject == "second"

        await eventually(second_was_seen)
    assert stack.tools.callers[0].subject == "first"


async def test_pings_do_not_end_an_idle_stream(stack: Stack) -> None:
    """gRPC sends away a client that pings more often than the server allows, with all its streams, on a third ping."""
    options = [
        ("grpc.keepalive_time_ms", 1100),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    metadata = (("authorization", f"Bearer {stack.identities.token()}"),)
    async with grpc.aio.insecure_channel(stack.address, options=options) as channel:
        call = CognitionServiceStub(channel).RunTurns(metadata=metadata)
        await call.write(RunTurnsRequest())
        await call.read()
        await asyncio.sleep(7)  # Six pings: only time shows that nothing happens.
        await call.write(RunTurnsRequest())
        assert await call.read() is not grpc.aio.EOF
        call.cancel()
