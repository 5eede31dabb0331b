"""PauseAgent and ResumeAgent: whether an agent's waiting messages become turns."""

from __future__ import annotations

from soma.controlplane.v1.agent_service_pb2 import (
    Agent,
    PauseAgentRequest,
    PauseAgentResponse,
    ResumeAgentRequest,
    ResumeAgentResponse,
)

from services.controlplane.application.answer_once import answer_once, ask
from services.controlplane.application.ports import Change, ConfigStore
from services.controlplane.domain.agent import paused_agent
from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.refusals import agent_not_found, tenant_not_found


class PauseAgent:
    """Pauses agents in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: PauseAgentRequest, actor: str) -> PauseAgentResponse:
        """Pause the agent; one that is paused stays as it is.

        Raises:
            NotFound: TENANT_NOT_FOUND or AGENT_NOT_FOUND.
            Conflict: ETAG_MISMATCH.
            AlreadyExists: the request id was used for another request.
        """
        name = AgentName.parse(request.name, "name")

        async def apply(change: Change) -> PauseAgentResponse:
            return PauseAgentResponse(agent=await _set(change, name, request.etag, paused=True))

        asked = ask(actor, "PauseAgent", name.tenant, request)
        return await answer_once(self._store, asked, PauseAgentResponse, apply)


class ResumeAgent:
    """Ends the pauses of agents in `store`."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store

    async def __call__(self, request: ResumeAgentRequest, actor: str) -> ResumeAgentResponse:
        """Let the agent go on; one that is not paused stays as it is. Raises what PauseAgent raises."""
        name = AgentName.parse(request.name, "name")

        async def apply(change: Change) -> ResumeAgentResponse:
            return ResumeAgentResponse(agent=await _set(change, name, request.etag, paused=False))

        asked = ask(actor, "ResumeAgent", name.tenant, request)
        return await answer_once(self._store, asked, ResumeAgentResponse, apply)


async def _set(change: Change, name: AgentName, etag: str, *, paused: bool) -> Agent:
    """The agent as the change leaves it."""
    stored = await change.agent(name)
    if stored is None:
        known = await change.tenant(TenantName(name.tenant)) is not None
        raise agent_not_found(name.tenant, name.agent) if known else tenant_not_found(name.tenant)
    changed = paused_agent(stored, etag, change.stamp, paused=paused)
    if changed is not None:
        await change.put_agent(stored, changed)
    return changed or stored
