"""ConfigService: complete copies, changes in order without gaps, heartbeats, and what ends a watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import grpc
import pytest
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec, DeleteAgentRequest, UpdateAgentRequest
from soma.controlplane.v1.config_service_pb2 import WatchConfigRequest, WatchConfigResponse
from soma.controlplane.v1.tenant_service_pb2 import DeleteTenantRequest, Tenant, UpdateTenantRequest

from services.controlplane.application.watch_config import HEARTBEAT_S
from soma_common.config_feed import ConfigFeed
from soma_common.grpc.channel import open_channel
from soma_common.testing.embedded import Database, FaultyPostgres, soma_database
from soma_common.testing.eventually import eventually
from tests.integration.controlplane.conftest import Caller, Plane, refused, running_plane

if TYPE_CHECKING:
    Call = grpc.aio.UnaryStreamCall[WatchConfigRequest, WatchConfigResponse]


class Watch:
    """A watch as a runtime keeps it: what it knows, and the frames it got."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.known: dict[str, Tenant | Agent] = {}
        self.version = 0
        self.versions: list[int] = []
        """Of the changes, in the order they came."""

    async def next(self) -> WatchConfigResponse:
        """Take the next frame into account."""
        async with asyncio.timeout(10):
            frame = await self._call.read()
        assert isinstance(frame, WatchConfigResponse)
        self.known |= {tenant.name: tenant for tenant in frame.tenants}
        self.known |= {agent.name: agent for agent in frame.agents}
        for name in frame.deleted:
            del self.known[name]
        self.version = frame.version
        if not (frame.snapshot or frame.heartbeat):
            self.versions.append(frame.version)
        return frame

    async def complete(self) -> None:
        """Take the complete copy."""
        while not (await self.next()).complete:
            pass

    async def until(self, version: int) -> None:
        """Take changes up to `version`."""
        while self.version < version:
            await self.next()


@asynccontextmanager
async def watching(caller: Caller, instance: str = "test-0") -> AsyncIterator[Watch]:
    """A watch that has its complete copy."""
    call = caller.config.WatchConfig(WatchConfigRequest(instance=instance))
    try:
        watch = Watch(call)
        await watch.complete()
        yield watch
    finally:
        call.cancel()


async def test_the_copy_is_complete_and_changes_follow(admin: Caller) -> None:
    demo, helper = await admin.tenant(), await admin.agent()
    async with watching(admin) as watch:
        assert watch.known == {demo.name: demo, helper.name: helper}
        assert watch.version == 2
        acme = await admin.tenant("acme")
        await watch.until(3)
        assert watch.known[acme.name] == acme
        await admin.agents.UpdateAgent(UpdateAgentRequest(agent=Agent(name=helper.name, display_name="Helper")))
        await watch.until(4)
        renamed = watch.known[helper.name]
        assert renamed.display_name == "Helper"
        assert renamed.etag != helper.etag
        await admin.agents.DeleteAgent(DeleteAgentRequest(name=helper.name))
        await watch.until(5)
        assert set(watch.known) == {demo.name, acme.name}


async def test_a_tenant_goes_with_its_agents_under_one_version(admin: Caller) -> None:
    await admin.tenant()
    for n in range(3):
        await admin.agent(f"a-{n}")
    async with watching(admin) as watch:
        before = watch.version
        await admin.tenants.DeleteTenant(DeleteTenantRequest(name="tenants/demo", force=True))
        frame = await watch.next()
        assert len(frame.deleted) == 4
        assert frame.version == before + 1
        assert watch.known == {}


async def test_what_changes_nothing_and_what_is_refused_take_no_version(admin: Caller) -> None:
    await admin.tenant()
    async with watching(admin) as watch:
        await admin.tenants.UpdateTenant(UpdateTenantRequest(tenant=Tenant(name="tenants/demo")))
        async with refused("ALREADY_EXISTS"):
            await admin.tenant()
        await admin.tenant("acme")
        await watch.until(2)
        assert watch.versions == [2]


async def test_watchers_that_begin_amid_changes_miss_and_repeat_nothing(admin: Caller) -> None:
    tenants = 40

    async def write() -> None:
        for n in range(tenants):
            await admin.tenant(f"t-{n}")

    async def watch_from_now() -> Watch:
        async with watching(admin) as watch:
            begun_at = watch.version
            await watch.until(tenants)
            assert watch.versions == list(range(begun_at + 1, tenants + 1))
            return watch

    writing = asyncio.create_task(write())
    watches = []
    for _ in range(8):
        watches.append(asyncio.create_task(watch_from_now()))
        await asyncio.sleep(0.01)
    await writing
    for watch in await asyncio.gather(*watches):
        assert len(watch.known) == tenants


async def test_an_idle_watch_beats(admin: Caller) -> None:
    async with watching(admin) as watch:
        async with asyncio.timeout(HEARTBEAT_S + 1):
            frame = await watch.next()
        assert frame.heartbeat
        assert not frame.snapshot


async def test_a_large_copy_comes_in_pieces(admin: Caller) -> None:
    await admin.tenant()
    await asyncio.gather(*(admin.agent(f"a-{n}", instructions="x" * 60_000) for n in range(40)))
    call = admin.config.WatchConfig(WatchConfigRequest(instance="test-0"))
    watch = Watch(call)
    pieces = 1
    while not (await watch.next()).complete:
        pieces += 1
    call.cancel()
    assert pieces > 2
    assert len(watch.known) == 41


async def test_changes_reach_watchers_of_other_instances(tmp_path: Path, postgres: Database) -> None:
    async with (
        running_plane(tmp_path / "a", postgres, "controlplane-0") as first,
        running_plane(tmp_path / "b", postgres, "controlplane-1") as second,
        first.caller() as writer,
        second.caller() as reader,
        watching(reader) as watch,
    ):
        await writer.tenant()
        await watch.until(1)
        assert "tenants/demo" in watch.known


async def test_a_lost_notification_costs_a_second(admin: Caller, plane: Plane) -> None:
    async with watching(admin) as watch:
        connection = await asyncpg.connect(plane.database.superuser_dsn)
        async with connection.transaction():
            await connection.execute("UPDATE controlplane.config_head SET version = 1")
            await connection.execute(
                "INSERT INTO controlplane.config_changes VALUES (1, 1, 'x', 'tenant', 'tenants/x', $1, now())",
                Tenant(name="tenants/x").SerializeToString(),
            )
        await connection.close()
        async with asyncio.timeout(10):
            await watch.until(1)
        assert "tenants/x" in watch.known


async def test_after_the_feeds_connection_was_cut_watchers_start_anew(admin: Caller, plane: Plane) -> None:
    call = admin.config.WatchConfig(WatchConfigRequest(instance="test-0"))
    await Watch(call).complete()
    connection = await asyncpg.connect(plane.database.superuser_dsn)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%feed'"
    )
    await connection.close()
    async with refused("STORE_UNAVAILABLE"), asyncio.timeout(5):
        while await call.read() is not grpc.aio.EOF:
            pass
    async with watching(admin) as watch:
        await admin.tenant()
        await watch.until(1)


async def test_a_watch_outlives_the_databases_death_and_begins_anew_after_it(
    tmp_path: Path, own_postgres: FaultyPostgres
) -> None:
    async with running_plane(tmp_path, soma_database(own_postgres)) as plane, plane.caller() as admin:
        await admin.tenant()
        call = admin.config.WatchConfig(WatchConfigRequest(instance="test-0"))
        watch = Watch(call)
        await watch.complete()
        await own_postgres.kill9()
        for _ in range(2):
            assert (await watch.next()).heartbeat
        await own_postgres.restart()
        async with refused("STORE_UNAVAILABLE"), asyncio.timeout(5):
            while await call.read() is not grpc.aio.EOF:
                pass
        async with watching(admin) as again:
            assert set(again.known) == {"tenants/demo"}


async def test_a_watcher_that_reads_too_slowly_is_ended(admin: Caller) -> None:
    """The frames of one watcher are held back by its own flow control; the bound is on what waits behind them."""
    await admin.tenant()
    await admin.agent()
    call = admin.config.WatchConfig(WatchConfigRequest(instance="slow-0"))
    watch = Watch(call)
    await watch.complete()
    names = ("a" * 60_000, "b" * 60_000)
    for n in range(600):
        patch = Agent(name="tenants/demo/agents/helper", spec=AgentSpec(model="echo/echo", instructions=names[n % 2]))
        await admin.agents.UpdateAgent(UpdateAgentRequest(agent=patch))
    async with refused("QUEUE_FULL"), asyncio.timeout(10):
        while await call.read() is not grpc.aio.EOF:
            pass


async def test_the_shared_feed_follows(admin: Caller, plane: Plane) -> None:
    """The reader that all services use and this server agree."""
    await admin.tenant()
    token = plane.identities.bearer("router-0", "*", ["service"])
    async with open_channel(plane.target, token=token, service="controlplane") as channel:
        feed = ConfigFeed(channel, "router-0")
        task = asyncio.create_task(feed.run())
        try:
            await feed.ready.wait()
            assert feed.tenant("demo") is not None
            made = await admin.agent()
            await eventually(lambda: feed.agent("demo", "helper") == made)
            await admin.agents.DeleteAgent(DeleteAgentRequest(name=made.name))
            await eventually(lambda: feed.agent("demo", "helper") is None)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("role", ["channel", "nobody"])
async def test_only_services_watch(plane: Plane, role: str) -> None:
    async with plane.caller("*", role) as caller, refused("PERMISSION_DENIED"):
        await caller.config.WatchConfig(WatchConfigRequest(instance="x-0")).read()
