from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec, CreateAgentRequest
from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceStub
from soma.controlplane.v1.config_service_pb2_grpc import ConfigServiceStub
from soma.controlplane.v1.tenant_service_pb2 import CreateTenantRequest, Tenant
from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceStub

from services.controlplane.main import start
from services.controlplane.settings import ControlplaneSettings
from soma_common.errors import SomaError, from_rpc_error, reason_name
from soma_common.grpc.channel import open_channel
from soma_common.lifecycle import Lifecycle
from soma_common.testing.auth import Identities
from soma_common.testing.embedded import Database

if TYPE_CHECKING:
    from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceAsyncStub
    from soma.controlplane.v1.config_service_pb2_grpc import ConfigServiceAsyncStub
    from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceAsyncStub


@dataclass(frozen=True)
class Caller:
    """The control plane as one caller sees it over a real socket."""

    tenants: TenantServiceAsyncStub
    agents: AgentServiceAsyncStub
    config: ConfigServiceAsyncStub

    async def tenant(self, tenant: str = "demo") -> Tenant:
        """Create a tenant."""
        return (await self.tenants.CreateTenant(CreateTenantRequest(tenant_id=tenant))).tenant

    async def agent(self, agent: str = "helper", tenant: str = "demo", **spec: object) -> Agent:
        """Create an agent."""
        made = AgentSpec(**{"model": "echo/echo", **spec})  # type: ignore[arg-type]  # whatever a test wants of the spec
        request = CreateAgentRequest(parent=f"tenants/{tenant}", agent_id=agent, agent=Agent(spec=made))
        return (await self.agents.CreateAgent(request)).agent


@dataclass(frozen=True)
class Plane:
    """A running control plane."""

    target: str
    identities: Identities
    database: Database

    @asynccontextmanager
    async def caller(self, tenant: str = "*", role: str = "admin") -> AsyncIterator[Caller]:
        """Somebody with a token of `role` for `tenant`, without the retries of the service config."""
        token = self.identities.bearer("tester", tenant, [role])
        async with open_channel(self.target, token=token, service="none", wait_for_ready=True) as channel:
            yield Caller(TenantServiceStub(channel), AgentServiceStub(channel), ConfigServiceStub(channel))


@asynccontextmanager
async def running_plane(folder: Path, database: Database, instance: str = "controlplane-0") -> AsyncIterator[Plane]:
    """A control plane on `database`, in this process."""
    identities = Identities(folder)
    settings = ControlplaneSettings(
        service_instance=instance,
        postgres_dsn=database.dsn("controlplane"),
        postgres_owner_dsn=database.owner_dsn("controlplane"),
        auth_keys_file=identities.keys_file,
        drain_timeout_s=0.2,
    )
    lifecycle = Lifecycle()
    try:
        port, _ = await start(lifecycle, settings)
        yield Plane(f"127.0.0.1:{port}", identities, database)
    finally:
        await lifecycle.stop()


@pytest.fixture
async def plane(tmp_path: Path, postgres: Database) -> AsyncIterator[Plane]:
    """A control plane of this test alone."""
    async with running_plane(tmp_path, postgres) as plane:
        yield plane


@pytest.fixture
async def admin(plane: Plane) -> AsyncIterator[Caller]:
    """An administrator of the whole platform."""
    async with plane.caller() as caller:
        yield caller


@asynccontextmanager
async def refused(reason: str) -> AsyncIterator[None]:
    """The block fails with a status whose ErrorInfo has `reason`."""
    found: SomaError | None = None
    try:
        yield
    except grpc.aio.AioRpcError as error:
        found = from_rpc_error(error)
    assert found is not None, f"nothing was refused; {reason} was expected"
    assert reason_name(found.reason) == reason, str(found)
