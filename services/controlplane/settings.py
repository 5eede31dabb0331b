"""What the control plane needs to know beside what every service needs (soma_common/settings.py). Environment:
`SOMA_<FIELD>`."""

from __future__ import annotations

from pydantic import Field

from soma_common.settings import ServiceSettings


class ControlplaneSettings(ServiceSettings):
    """Settings of one control plane process."""

    postgres_dsn: str
    """The database as `soma_controlplane`."""
    postgres_pool_size: int = Field(default=10, ge=6, le=100)
    """Connections to the database at most; complete copies for watchers use up to 4 of them."""
