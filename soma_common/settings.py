"""Settings that every service shares: read once from the environment at start, frozen from then on.

Each service derives its own class in `services/<svc>/settings.py`. Environment variables are the field names in upper
case behind `SOMA_`. Units are part of the names (`_s`, `_ms`, `_bytes`).
"""

import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_PREFIX = "SOMA_"

EXIT_BAD_SETTINGS = 2
"""Exit code of a service that cannot start because of its settings; a restart does not help."""


class StartRefused(Exception):
    """The process cannot work as it is set up: only a change of its settings, or of the release, helps, no restart.

    The message says what to change. `run_service` shows it and ends the process with EXIT_BAD_SETTINGS.
    """


Targets = Annotated[tuple[str, ...], NoDecode]
"""Addresses (`host:port`), separated by commas in the environment."""


class ServiceSettings(BaseSettings):
    """What every service needs to know. Unknown `SOMA_` variables are ignored: they belong to other services."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    service_instance: str = Field(pattern=r"^[a-z][a-z0-9]*-[a-z0-9-]+$")
    """Name of this process, unique in the mesh: `<service>-<anything>`, such as `router-0`."""
    home: Path = Path(".somastack")
    """Folder for files that outlive the process."""
    listen: str = "127.0.0.1:0"
    """Where gRPC is served; port 0 takes a free one."""
    admin_listen: str = "127.0.0.1:0"
    """Where metrics and health are served over HTTP. Loopback unless said otherwise: it asks for no identity."""
    channelz_listen: str | None = None
    """Where gRPC's channelz is served, for debugging; unset: not at all. It shows the calls that this process makes
    through gRPC's own channels, and asks for no identity: keep it on loopback."""

    nats_url: str = "nats://127.0.0.1:4222"
    """The message bus; several servers are separated by commas."""
    nats_token_file: Path | None = None
    """File with the token that the message bus wants; unset: none."""

    postgres_dsn: str | None = None
    """The database as this service's own role, such as `postgresql:///soma?host=/run/pg&port=15432&user=soma_router`."""
    postgres_owner_dsn: str | None = None
    """The database as the owner of the schemas, for migrations; unset: `postgres_dsn`."""
    postgres_migrate: Literal["apply", "verify"] = "apply"
    """`apply` brings the schema up to date at start; `verify` only checks it and refuses to start when it is behind."""

    partitions: int = Field(default=8, ge=1, le=4096)
    """Partitions of the session space. The same in every process, and fixed for the life of a database."""
    lanes: int = Field(default=1, ge=1, le=64)
    """Inbound streams that the partitions share. The same in every process."""

    controlplane_target: str | None = None
    """Address of the control plane, `host:port`."""
    gateway_target: str | None = None
    """Address of a gateway, `host:port`."""
    toolgw_target: str | None = None
    """Address of the tool gateway, `host:port`."""
    router_targets: Targets = ()
    """Addresses of all routers."""
    cognition_targets: Targets = ()
    """Addresses of all brains."""

    auth_keys_file: Path | None = None
    """Public keys (JWKS, Ed25519) that bearer tokens are verified with. Read again when it changes."""
    auth_service_token_file: Path | None = None
    """This service's own bearer token. Read again when it changes."""

    log_file: Path | None = None
    """Where JSON log lines go; unset: standard error."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below this level are dropped."""
    failpoints: str = ""
    """Faults to inject, for chaos tests only; see soma_common/failpoints.py."""

    grpc_max_message_bytes: int = Field(default=16 * 1024 * 1024, ge=64 * 1024)
    """Largest gRPC message that is sent or received."""
    start_patience_s: float = Field(default=45.0, ge=0)
    """How long a starting process waits for the database and the message bus before it gives up."""
    drain_timeout_s: float = Field(default=3.0, gt=0)
    """How long calls in flight may go on after the stop signal."""
    stop_timeout_s: float = Field(default=8.0, gt=0)
    """How long the whole shutdown may take before the process ends itself."""

    @property
    def service(self) -> str:
        """Short name of the service, such as `router`: the first part of the instance's name."""
        return self.service_instance.partition("-")[0]

    @field_validator("router_targets", "cognition_targets", mode="before")
    @classmethod
    def _split_targets(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("listen", "admin_listen", "channelz_listen")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value


Settings = TypeVar("Settings", bound=ServiceSettings)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` (an IPv6 host in brackets); raises ValueError saying what is wrong."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port, for example 127.0.0.1:8080 (port 0 takes a free one)")
    return host.removeprefix("[").removesuffix("]"), int(port)


def load_settings(cls: type[Settings]) -> Settings:
    """Return the settings from the environment; bad ones end the process (code 2) with a list of what to change."""
    try:
        return cls()
    except ValidationError as error:
        _refuse(cls, error)


def _refuse(cls: type[ServiceSettings], error: ValidationError) -> NoReturn:
    lines = [f"{cls.__module__.rsplit('.', 1)[0]}: cannot start, these environment variables need a change:"]
    for problem in error.errors(include_url=False, include_context=False):
        if not problem["loc"]:  # Several that do not fit: the message names them. What was given is all, secrets too.
            lines.append(f"  {problem['msg']}")
            continue
        variable = ENV_PREFIX + str(problem["loc"][0]).upper()
        given = "it is not set" if problem["type"] == "missing" else f"it is {problem['input']!r}"
        lines.append(f"  {variable}: {problem['msg']} ({given})")
    sys.stderr.write("\n".join(lines) + "\n")
    raise SystemExit(EXIT_BAD_SETTINGS)
