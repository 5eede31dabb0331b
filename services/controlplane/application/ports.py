"""What the control plane's use cases need from the outside, named by need."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from soma.controlplane.v1.agent_service_pb2 import Agent
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.domain.names import AgentName, TenantName
from services.controlplane.domain.version import Stamp

ALL_TENANTS = "*"


@dataclass(frozen=True, slots=True)
class Ask:
    """Who asks for which change: what the audit log keeps and what makes a retry the same request."""

    actor: str
    """Subject of the caller's token."""
    method: str
    """The RPC, for example `CreateAgent`."""
    scope: str
    """The tenant whose rows the change may touch, or `*`: row-level security holds it to that. Request ids are unique
    in it."""
    request_id: str
    """Chosen by the caller; empty: a retry is a new request."""
    fingerprint: bytes
    """Digest of method and content."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered before."""

    fingerprint: bytes
    response: bytes
    """The serialized response message."""


class Change(Protocol):
    """One open change of the configuration. While it is open nobody else changes anything, so what it reads stays true.

    Each `put_` and `remove_` also writes the audit row and the line of the change log that watchers follow: all of it
    becomes visible at once, under one new version, or not at all.
    """

    @property
    def stamp(self) -> Stamp:
        """The version this change gets if it writes something, and its time."""
        ...

    async def answered(self) -> Answered | None:
        """The answer given under this request id within its life, if there is one."""
        ...

    async def remember(self, response: bytes) -> None:
        """Keep the serialized response under the request id."""
        ...

    async def tenant(self, name: TenantName) -> Tenant | None:
        """A tenant as stored."""
        ...

    async def agent(self, name: AgentName) -> Agent | None:
        """An agent as stored."""
        ...

    async def agents_of(self, name: TenantName) -> Sequence[Agent]:
        """All agents of a tenant."""
        ...

    async def put_tenant(self, before: Tenant | None, tenant: Tenant) -> None:
        """Store a new tenant (`before` None) or a new state of one."""
        ...

    async def remove_tenant(self, before: Tenant) -> None:
        """Remove a tenant that has no agents."""
        ...

    async def put_agent(self, before: Agent | None, agent: Agent) -> None:
        """Store a new agent (`before` None) or a new state of one; its revision is kept for good."""
        ...

    async def remove_agent(self, before: Agent) -> None:
        """Remove an agent; its revisions stay."""
        ...


class ConfigStore(Protocol):
    """Tenants and agents, durable. Every method raises Unavailable (STORE_UNAVAILABLE) when the database does not
    answer."""

    def change(self, ask: Ask) -> AbstractAsyncContextManager[Change]:
        """Open a change; leaving the block commits it, an exception undoes all of it.

        An Unavailable raised by leaving the block means that it is not known whether the change was made: a retry with
        the same request id finds out.
        """
        ...

    async def tenant(self, name: TenantName) -> Tenant | None:
        """A tenant as stored."""
        ...

    async def tenants(self, after: str, limit: int) -> Sequence[Tenant]:
        """At most `limit` tenants whose id sorts after `after`, sorted by id."""
        ...

    async def agent(self, name: AgentName) -> Agent | None:
        """An agent as stored."""
        ...

    async def agents(self, parent: TenantName, after: str, limit: int) -> Sequence[Agent]:
        """At most `limit` agents of a tenant whose id sorts after `after`, sorted by id."""
        ...


@dataclass(frozen=True, slots=True)
class ConfigPart:
    """A piece of the configuration: of a complete copy, or what one version changed."""

    version: int
    tenants: Sequence[Tenant] = ()
    agents: Sequence[Agent] = ()
    deleted: Sequence[str] = ()
    """Resource names."""


class Snapshot(Protocol):
    """A complete, consistent copy of the configuration at one version."""

    @property
    def version(self) -> int:
        """The version of the copy."""
        ...

    def parts(self) -> AsyncIterator[ConfigPart]:
        """The copy in pieces of at most about a megabyte."""
        ...


class SnapshotSource(Protocol):
    """Where complete copies come from."""

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]:
        """Open a copy; it holds a database transaction as long as it is open."""
        ...
