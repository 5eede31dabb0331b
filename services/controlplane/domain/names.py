"""Resource names of the control plane: `tenants/{tenant}` and `tenants/{tenant}/agents/{agent}`."""

from __future__ import annotations

from dataclasses import dataclass

from services.controlplane.domain.refusals import invalid_field
from soma_common.ids import is_slug


@dataclass(frozen=True, slots=True)
class TenantName:
    """`tenants/{tenant}`."""

    tenant: str

    @classmethod
    def parse(cls, name: str, field: str) -> TenantName:
        """Read `name`, which stood in the request's `field`.

        Raises:
            InvalidRequest: it has another form.
        """
        match name.split("/"):
            case ["tenants", tenant] if is_slug(tenant):
                return cls(tenant)
            case _:
                raise invalid_field(field, f"{name!r} is not of the form tenants/{{tenant}}")

    def __str__(self) -> str:
        return f"tenants/{self.tenant}"


@dataclass(frozen=True, slots=True)
class AgentName:
    """`tenants/{tenant}/agents/{agent}`."""

    tenant: str
    agent: str

    @classmethod
    def parse(cls, name: str, field: str) -> AgentName:
        """Read `name`, which stood in the request's `field`.

        Raises:
            InvalidRequest: it has another form.
        """
        match name.split("/"):
            case ["tenants", tenant, "agents", agent] if is_slug(tenant) and is_slug(agent):
                return cls(tenant, agent)
            case _:
                raise invalid_field(field, f"{name!r} is not of the form tenants/{{tenant}}/agents/{{agent}}")

    def __str__(self) -> str:
        return f"tenants/{self.tenant}/agents/{self.agent}"
