"""A stack of its own for the benchmark: started as a user starts it, provisioned through the control plane, stopped
at the end.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec, CreateAgentRequest
from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceStub
from soma.controlplane.v1.tenant_service_pb2 import CreateTenantRequest, Tenant
from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceStub

from soma_common.embedded.postgres import PostgresConfig, PostgresServer
from soma_common.grpc.channel import open_channel
from somastack.home import Home
from somastack.layout import Layout, is_taken
from somastack.state import Phase, StackState

TENANT = "bench"
CHANNEL = "load"


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack: addresses, the admin's token, and the pids of its parts by name."""

    home: Path
    gateway: str
    controlplane: str
    nats: str
    token: str
    pids: dict[str, int]
    supervisor: int
    """The pid of whoever keeps the parts running."""

    @property
    def everything(self) -> dict[str, int]:
        """The pids of the parts and of their supervisor, by name."""
        return {**self.pids, "supervisor": self.supervisor}

    def look_again(self) -> bool:
        """Brings the pids up to date after parts were started again; returns whether all parts are ready."""
        state = StackState.load(Home(self.home).state_file)
        if state is None:
            return False
        self.pids.update({part.name: part.process.pid for part in state.parts if part.process is not None})
        return all(part.phase is Phase.READY for part in state.parts)

    def postgres_dsn(self) -> str:
        """Where a superuser finds the stack's database."""
        return PostgresServer(PostgresConfig(Home(self.home).postgres)).dsn()

    async def agent(self, name: str, model: str, context_messages: int = 20) -> None:
        """Makes an agent with a built-in model."""
        channel = open_channel(self.controlplane, token=lambda: self.token, service="controlplane")
        spec = AgentSpec(
            model=model, context_messages=context_messages, arrival_policy=ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE
        )
        try:
            await AgentServiceStub(channel).CreateAgent(
                CreateAgentRequest(parent=f"tenants/{TENANT}", agent_id=name, agent=Agent(spec=spec))
            )
        finally:
            await channel.close()


async def start(replicas: Mapping[str, int] | None = None) -> Stack:
    """Starts a stack in a new home on free ports and makes the tenant; `replicas` by service, one each by default."""
    home = Path(tempfile.mkdtemp(prefix="soma-bench-"))
    several = [f"--replicas={service}={count}" for service, count in (replicas or {}).items()]
    base = str(_free_base(replicas or {}))
    await _somastack("up", "--detach", "--no-demo", "--home", str(home), "--port-base", base, *several)
    status = json.loads(await _somastack("status", "--home", str(home), "--output", "json"))
    parts = {part["name"]: part for part in status["components"]}
    stack = Stack(
        home=home,
        gateway=parts["gateway-0"]["addresses"]["grpc"],
        controlplane=parts["controlplane-0"]["addresses"]["grpc"],
        nats=parts["nats"]["addresses"]["nats"],
        token=(home / "auth" / "admin.token").read_text().strip(),
        pids={name: part["pid"] for name, part in parts.items()},
        supervisor=status["supervisor_pid"],
    )
    channel = open_channel(stack.controlplane, token=lambda: stack.token, service="controlplane")
    try:
        await TenantServiceStub(channel).CreateTenant(CreateTenantRequest(tenant_id=TENANT, tenant=Tenant()))
    finally:
        await channel.close()
    return stack


async def stop(stack: Stack) -> None:
    """Stops the stack and removes its home."""
    await _somastack("down", "--home", str(stack.home))
    shutil.rmtree(stack.home, ignore_errors=True)


async def _somastack(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "somastack.cli",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), timeout=60)
    if process.returncode:
        raise RuntimeError(f"somastack {' '.join(arguments)} failed:\n{out.decode()}{err.decode()}")
    return out.decode()


def _free_base(replicas: Mapping[str, int]) -> int:
    """A base whose ports are free, below those that the system gives to outgoing connections. By chance: others may be
    starting a stack at the same time.
    """
    bases = random.sample(range(12000, 30000, 200), 90)
    return next(base for base in bases if not any(is_taken(port) for port, _ in Layout(base, replicas).ports()))
