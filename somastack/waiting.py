"""Why an accepted message is not answered yet, and what a person can do about it."""

import asyncio
from typing import Final

import grpc
from soma.common.v1.turn_pb2 import ArrivalPolicy, QueueState
from soma.controlplane.v1.agent_service_pb2 import Agent, GetAgentRequest
from soma.controlplane.v1.tenant_service_pb2 import GetTenantRequest, Tenant
from soma.router.v1.session_service_pb2 import GetSessionRequest, Session, WatchSessionRequest

from soma_common.errors import from_rpc_error
from soma_common.ids import SessionName
from somastack.remote import Remote
from somastack.resource_names import short, tenant_option

LOOK_S: Final = 5.0
"""How long a service may take to say how things stand."""


async def what_holds(remote: Remote, name: SessionName, message_id: bytes, policy: ArrivalPolicy.ValueType) -> str:
    """What the message of a session waits for, with the command that changes it; empty: it does not wait. `policy` is
    the message's own; not set: the agent's.

    Raises:
        SomaError: a service refused, or does not answer.
    """
    try:
        async with asyncio.timeout(LOOK_S):
            tenant, agent = await _configured(remote, name)
            session, queue = await _session(remote, name)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    except TimeoutError:
        return f"no answer from the services yet ({remote.home.command('status')})"
    place = next((each.place for each in queue.messages if each.message_id == message_id), 0)
    if not place and session is not None and queue.count <= len(queue.messages):
        return ""
    if pauses := _pauses(remote, name, tenant, agent, session):
        return " and ".join(pauses)
    if session is None:
        return f"no router has it yet ({remote.home.command('status')})"
    before = max(place or queue.count, 1) - 1
    waiting = f"{before} message{'' if before == 1 else 's'}" if before else ""
    if session.running_turn or before:
        return "behind " + " and ".join(filter(None, ("the running turn" if session.running_turn else "", waiting)))
    if (policy or agent.spec.arrival_policy) == ArrivalPolicy.ARRIVAL_POLICY_ACCUMULATE:
        return "further messages may join it (policy accumulate)"
    look = remote.home.command("sessions", "get", short(str(name)), "--waiting", *tenant_option(name.tenant))
    return f"no turn has begun yet ({look})"


async def _configured(remote: Remote, name: SessionName) -> tuple[Tenant, Agent]:
    parent = f"tenants/{name.tenant}"
    async with remote.tenants() as tenants:
        tenant = (await tenants.GetTenant(GetTenantRequest(name=parent))).tenant
    async with remote.agents() as agents:
        agent = (await agents.GetAgent(GetAgentRequest(name=f"{parent}/agents/{name.agent}"))).agent
    return tenant, agent


async def _session(remote: Remote, name: SessionName) -> tuple[Session | None, QueueState]:
    """The session, if a router knows of it, and what waits in it."""
    async with remote.sessions(name.tenant) as sessions:
        try:
            session = (await sessions.GetSession(GetSessionRequest(name=str(name)))).session
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return None, QueueState()
        watch = sessions.WatchSession(WatchSessionRequest(name=str(name)))
        try:
            async for told in watch:
                if told.event.WhichOneof("event") == "queued":
                    return session, told.event.queued
        finally:
            watch.cancel()
    return session, QueueState()


def _pauses(remote: Remote, name: SessionName, tenant: Tenant, agent: Agent, session: Session | None) -> list[str]:
    resume, of = remote.home.command, tenant_option(name.tenant)
    pauses = []
    if tenant.paused:
        pauses.append(f"tenant {name.tenant} is paused ({resume('tenants', 'resume', name.tenant)})")
    if agent.paused:
        pauses.append(f"agent {name.agent} is paused ({resume('agents', 'resume', name.agent, *of)})")
    if session is not None and session.paused:
        pauses.append(f"the session is paused ({resume('sessions', 'resume', short(str(name)), *of)})")
    return pauses
