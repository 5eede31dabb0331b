"""What the tool gateway needs to know beside what every service needs (soma_common/settings.py). Environment:
`SOMA_<FIELD>`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from soma_common.settings import ServiceSettings


class ToolgwSettings(ServiceSettings):
    """Settings of one tool gateway process."""

    postgres_dsn: str
    """The database as `soma_toolgw`."""
    controlplane_target: str
    """Address of the control plane, `host:port`: it says which tools an agent may use."""
    auth_service_token_file: Path
    """This service's own bearer token, shown to the control plane."""
    toolgw_http_tools_file: Path | None = None
    """JSON file that describes the HTTP tools (docs/guides/tools.md); unset: only the built-in tools."""
    toolgw_max_runs: int = Field(default=256, ge=1, le=10_000)
    """Tool calls that may run at once in this process."""
    toolgw_max_runs_per_tenant: int = Field(default=64, ge=1, le=10_000)
    """Tool calls of one tenant that may run at once in this process."""
    toolgw_cancel_timeout_s: float = Field(default=30.0, gt=0, le=86_400)
    """How long a cancel waits for a call that runs before its outcome is called unknown, where the cancel does not
    say."""
    postgres_pool_size: int = Field(default=8, ge=2, le=100)
    """Connections to the database at most."""

    @field_validator("toolgw_http_tools_file")
    @classmethod
    def _check_tools_file(cls, value: Path | None) -> Path | None:
        # Taken against the working directory of the service, a relative path names another file than whoever wrote it
        # meant, or none.
        if value is not None and not value.is_absolute():
            raise ValueError(
                f"it is no absolute path, and services run in /: give the whole path, such as $PWD/{value}"
            )
        return value
