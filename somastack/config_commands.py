"""`somastack agents` and `somastack tenants`: what there is, and pauses."""

from collections.abc import Sequence
from typing import Annotated

import typer
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.controlplane.v1.agent_service_pb2 import Agent, ListAgentsRequest, PauseAgentRequest, ResumeAgentRequest
from soma.controlplane.v1.tenant_service_pb2 import (
    ListTenantsRequest,
    PauseTenantRequest,
    ResumeTenantRequest,
    Tenant,
)

from somastack.demo import TENANT
from somastack.remote import Remote, every, first, request_id, run
from somastack.resource_names import agent_named, last, tenant_named
from somastack.tables import NOTHING, as_table, print_json, since
from somastack.terminal import (
    EtagOption,
    HomeOption,
    LimitOption,
    Output,
    OutputOption,
    RequestIdOption,
    TenantOption,
    console,
)
from somastack.turn_view import policy_name

PAGE_SIZE = 200
AGENT_COLUMNS = ("agent", "state", "model", "arrivals", "at once", "revision", "changed")
TENANT_COLUMNS = ("tenant", "state", "weight", "at once", "changed")

agents = typer.Typer(name="agents", help="Look at agents; pause them.", no_args_is_help=True)
tenants = typer.Typer(name="tenants", help="Look at tenants; pause them.", no_args_is_help=True)

AgentArgument = Annotated[str, typer.Argument(metavar="AGENT", help="Its name, or the whole resource name.")]
TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="Its name, or the whole resource name.")]


@agents.command("list")
def list_agents(
    limit: LimitOption = 50, tenant: TenantOption = TENANT, output: OutputOption = "table", home: HomeOption = None
) -> None:
    """List the agents of a tenant."""
    wanted, remote = ListAgentsRequest(parent=tenant_named(tenant), page_size=min(limit, PAGE_SIZE)), Remote.of(home)

    async def listed() -> list[Agent]:
        async with remote.agents() as service:
            return await first(limit, every(service.ListAgents, wanted, lambda page: page.agents))

    _tell_agents(run(listed()), output)


@agents.command("pause")
def pause_agent(
    agent: AgentArgument,
    etag: EtagOption = "",
    request: RequestIdOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Begin no more turns of an agent: what runs ends, messages are accepted and wait."""
    wanted = PauseAgentRequest(name=agent_named(agent, tenant), etag=etag, request_id=request_id(request))
    remote = Remote.of(home)

    async def paused() -> Agent:
        async with remote.agents() as service:
            return (await service.PauseAgent(wanted)).agent

    _tell_agents([run(paused())], output, single=True)


@agents.command("resume")
def resume_agent(
    agent: AgentArgument,
    etag: EtagOption = "",
    request: RequestIdOption = None,
    tenant: TenantOption = TENANT,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """End the pause of an agent: what waits begins."""
    wanted = ResumeAgentRequest(name=agent_named(agent, tenant), etag=etag, request_id=request_id(request))
    remote = Remote.of(home)

    async def resumed() -> Agent:
        async with remote.agents() as service:
            return (await service.ResumeAgent(wanted)).agent

    _tell_agents([run(resumed())], output, single=True)


@tenants.command("list")
def list_tenants(limit: LimitOption = 50, output: OutputOption = "table", home: HomeOption = None) -> None:
    """List all tenants."""
    wanted, remote = ListTenantsRequest(page_size=min(limit, PAGE_SIZE)), Remote.of(home)

    async def listed() -> list[Tenant]:
        async with remote.tenants() as service:
            return await first(limit, every(service.ListTenants, wanted, lambda page: page.tenants))

    _tell_tenants(run(listed()), output)


@tenants.command("pause")
def pause_tenant(
    tenant: TenantArgument,
    etag: EtagOption = "",
    request: RequestIdOption = None,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """Begin no more turns of a tenant: what runs ends, messages are accepted and wait."""
    wanted = PauseTenantRequest(name=tenant_named(tenant), etag=etag, request_id=request_id(request))
    remote = Remote.of(home)

    async def paused() -> Tenant:
        async with remote.tenants() as service:
            return (await service.PauseTenant(wanted)).tenant

    _tell_tenants([run(paused())], output, single=True)


@tenants.command("resume")
def resume_tenant(
    tenant: TenantArgument,
    etag: EtagOption = "",
    request: RequestIdOption = None,
    output: OutputOption = "table",
    home: HomeOption = None,
) -> None:
    """End the pause of a tenant: what waits begins."""
    wanted = ResumeTenantRequest(name=tenant_named(tenant), etag=etag, request_id=request_id(request))
    remote = Remote.of(home)

    async def resumed() -> Tenant:
        async with remote.tenants() as service:
            return (await service.ResumeTenant(wanted)).tenant

    _tell_tenants([run(resumed())], output, single=True)


def _tell_agents(found: Sequence[Agent], output: Output, *, single: bool = False) -> None:
    if output == "json":
        print_json(found[0] if single else {"agents": found})
    else:
        for line in as_table(AGENT_COLUMNS, [_agent_row(agent) for agent in found]):
            console.print(line)


def _tell_tenants(found: Sequence[Tenant], output: Output, *, single: bool = False) -> None:
    if output == "json":
        print_json(found[0] if single else {"tenants": found})
    else:
        for line in as_table(TENANT_COLUMNS, [_tenant_row(tenant) for tenant in found]):
            console.print(line)


def _agent_row(agent: Agent) -> list[str]:
    """An agent in the columns of AGENT_COLUMNS."""
    policy = agent.spec.arrival_policy or ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE
    return [
        last(agent.name),
        _state(suspended=agent.spec.suspended, paused=agent.paused),
        agent.spec.model,
        policy_name(policy),
        str(agent.spec.max_running_turns or NOTHING),
        agent.revision,
        since(agent.update_time),
    ]


def _tenant_row(tenant: Tenant) -> list[str]:
    """A tenant in the columns of TENANT_COLUMNS."""
    return [
        last(tenant.name),
        _state(suspended=tenant.suspended, paused=tenant.paused),
        str(tenant.weight or NOTHING),
        str(tenant.max_running_turns or NOTHING),
        since(tenant.update_time),
    ]


def _state(*, suspended: bool, paused: bool) -> str:
    """What keeps messages from being answered; `active`: nothing."""
    return ", ".join(word for word, holds in (("suspended", suspended), ("paused", paused)) if holds) or "active"
