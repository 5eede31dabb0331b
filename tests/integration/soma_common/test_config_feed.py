"""The copy of the configuration: complete before it is used, kept while the feed is away, replaced as a whole."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from soma.controlplane.v1.agent_service_pb2 import Agent
from soma.controlplane.v1.config_service_pb2 import WatchConfigRequest, WatchConfigResponse
from soma.controlplane.v1.config_service_pb2_grpc import ConfigServiceServicer, add_ConfigServiceServicer_to_server
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from soma_common.config_feed import ConfigFeed
from soma_common.grpc.channel import open_channel
from soma_common.grpc.server import GrpcServer
from soma_common.settings import ServiceSettings
from soma_common.testing.auth import Identities
from soma_common.testing.eventually import eventually

DEMO, OTHER = Tenant(name="tenants/demo", display_name="Demo"), Tenant(name="tenants/other")
ASSISTANT = Agent(name="tenants/demo/agents/assistant", revision="r1")

Frames = asyncio.Queue[WatchConfigResponse | None]


class Controlplane(ConfigServiceServicer):
    """Gives each watcher the frames that the test puts into the newest of `watches`; None ends the stream."""

    def __init__(self) -> None:
        self.watches: list[Frames] = []

    async def WatchConfig(self, request: WatchConfigRequest, context: Any) -> AsyncIterator[WatchConfigResponse]:
        assert request.instance == "gateway-0"
        frames: Frames = asyncio.Queue()
        self.watches.append(frames)
        while (frame := await frames.get()) is not None:
            yield frame

    async def watched(self, number: int) -> Frames:
        """Return the `number`-th watch, from 1, when it has come."""
        await eventually(lambda: len(self.watches) >= number, what=f"watch {number}")
        return self.watches[number - 1]


class Running:
    """A feed on a control plane."""

    def __init__(self, controlplane: Controlplane, channel: grpc.aio.Channel) -> None:
        self.controlplane, self.channel = controlplane, channel
        self.feed = feed = ConfigFeed(channel, "gateway-0")
        self.versions: list[int] = []
        feed.on_change(lambda: self.versions.append(feed.version))


@pytest.fixture
async def running(tmp_path: Any) -> AsyncIterator[Running]:
    identities, controlplane = Identities(tmp_path), Controlplane()
    server = GrpcServer(
        ServiceSettings(service_instance="controlplane-0"),
        identities.authorizer(),
        services=[(add_ConfigServiceServicer_to_server, controlplane, "soma.controlplane.v1.ConfigService")],
    )
    port = await server.start()
    await server.set_serving(True)
    async with open_channel(f"127.0.0.1:{port}", token=identities.bearer(), service="controlplane") as channel:
        running = Running(controlplane, channel)
        task = asyncio.create_task(running.feed.run())
        yield running
        task.cancel()
        await asyncio.wait([task])
    await server.stop(0)


async def test_the_first_copy_counts_when_it_is_complete(running: Running) -> None:
    watch = await running.controlplane.watched(1)
    await watch.put(WatchConfigResponse(snapshot=True, tenants=[DEMO, OTHER], version=7))
    await watch.put(WatchConfigResponse(snapshot=True, agents=[ASSISTANT], version=7))
    await asyncio.sleep(0.05)
    assert not running.feed.ready.is_set()
    assert running.feed.tenant("demo") is None
    await watch.put(WatchConfigResponse(snapshot=True, complete=True, version=7))
    await asyncio.wait_for(running.feed.ready.wait(), 15)
    assert running.feed.tenant("demo") == DEMO
    assert running.feed.agent("demo", "assistant") == ASSISTANT
    assert running.feed.agent("other", "assistant") is None
    assert {tenant.name for tenant in running.feed.tenants()} == {DEMO.name, OTHER.name}
    assert list(running.feed.agents()) == [ASSISTANT]
    assert running.versions == [7]


async def test_changes_and_deletions_follow(running: Running) -> None:
    watch = await running.controlplane.watched(1)
    await watch.put(WatchConfigResponse(snapshot=True, complete=True, tenants=[DEMO], agents=[ASSISTANT], version=1))
    await watch.put(WatchConfigResponse(agents=[Agent(name=ASSISTANT.name, revision="r2")], version=2))
    await watch.put(WatchConfigResponse(heartbeat=True, version=2))
    await watch.put(WatchConfigResponse(deleted=[ASSISTANT.name], version=3))
    await eventually(lambda: running.versions == [1, 2, 3], what="both changes")
    assert running.feed.agent("demo", "assistant") is None
    assert running.feed.tenant("demo") == DEMO


async def test_the_last_copy_stays_until_the_next_is_complete(running: Running) -> None:
    first = await running.controlplane.watched(1)
    await first.put(WatchConfigResponse(snapshot=True, complete=True, tenants=[DEMO], version=1))
    await asyncio.wait_for(running.feed.ready.wait(), 15)
    await first.put(None)
    second = await running.controlplane.watched(2)
    assert running.feed.tenant("demo") == DEMO
    await second.put(WatchConfigResponse(snapshot=True, tenants=[OTHER], version=2))
    await asyncio.sleep(0.05)
    assert running.feed.tenant("other") is None
    await second.put(WatchConfigResponse(snapshot=True, complete=True, version=2))
    await eventually(lambda: running.feed.tenant("other") is not None, what="the new copy")
    assert running.feed.tenant("demo") is None


async def test_a_silent_feed_is_opened_again(running: Running) -> None:
    impatient = ConfigFeed(running.channel, "gateway-0", silence_limit_s=0.5)
    task = asyncio.create_task(impatient.run())
    await running.controlplane.watched(2)
    for watch in running.controlplane.watches:  # the other one is the fixture's, and either may have come first
        await watch.put(WatchConfigResponse(snapshot=True, complete=True, tenants=[DEMO], version=1))
    await running.controlplane.watched(4)
    task.cancel()
    await asyncio.wait([task])
    assert impatient.tenant("demo") == DEMO
