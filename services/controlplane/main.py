"""The control plane's process: the only place where its parts are put together. `python -m
services.controlplane.main`."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from soma.controlplane.v1.agent_service_pb2_grpc import add_AgentServiceServicer_to_server
from soma.controlplane.v1.config_service_pb2_grpc import add_ConfigServiceServicer_to_server
from soma.controlplane.v1.tenant_service_pb2_grpc import add_TenantServiceServicer_to_server

from services.controlplane.adapters.api_grpc import (
    AGENT_SERVICE,
    CONFIG_SERVICE,
    TENANT_SERVICE,
    AgentApi,
    ConfigApi,
    TenantApi,
)
from services.controlplane.adapters.feed_postgres import ChangeFollower, PostgresSnapshots
from services.controlplane.adapters.store_postgres import PostgresConfigStore
from services.controlplane.application.watch_config import WatchConfig, Watchers
from services.controlplane.domain.refusals import stopping
from services.controlplane.settings import ControlplaneSettings
from soma_common.authz.authorizer import Authorizer
from soma_common.errors import Unavailable
from soma_common.grpc.server import GrpcServer
from soma_common.lifecycle import Lifecycle, run_service
from soma_common.patience import patiently
from soma_common.postgres.connect import connect, create_pool
from soma_common.postgres.migrations import apply_migrations
from soma_common.settings import load_settings
from soma_common.telemetry.admin import serve_admin

SCHEMA: Final = "controlplane"
MIGRATIONS: Final = Path(__file__).parent / "adapters" / "migrations"
LOCK_TIMEOUT_MS: Final = 5000
"""Longest wait for other changes of the configuration; then UNAVAILABLE."""
FORGET_EVERY_S: Final = 600.0

log = structlog.get_logger(__name__)


async def main(lifecycle: Lifecycle, settings: ControlplaneSettings) -> None:
    """Start everything and say so."""
    port, admin_port = await start(lifecycle, settings)
    lifecycle.ready(port=port, admin_port=admin_port)


async def start(lifecycle: Lifecycle, settings: ControlplaneSettings) -> tuple[int, int]:
    """Start everything and register how it stops; returns the gRPC port and the admin port."""
    owner_dsn = settings.postgres_owner_dsn or settings.postgres_dsn
    await patiently(
        lambda: apply_migrations(owner_dsn, SCHEMA, MIGRATIONS, settings.postgres_migrate), settings.start_patience_s
    )
    pool = await create_pool(
        settings.postgres_dsn,
        max_size=settings.postgres_pool_size,
        application_name=settings.service_instance,
        lock_timeout=str(LOCK_TIMEOUT_MS),
    )
    lifecycle.on_stop("database", pool.close, 2.0)
    store = PostgresConfigStore(pool)
    lifecycle.spawn("forget", _forget_now_and_then(store))

    watchers = Watchers()
    follower = ChangeFollower(
        lambda: connect(settings.postgres_dsn, application_name=f"{settings.service_instance} feed"), watchers
    )
    lifecycle.spawn("config changes", follower.run())
    watch = WatchConfig(PostgresSnapshots(pool), watchers)

    server = GrpcServer(
        settings,
        Authorizer.from_settings(settings),
        services=[
            (add_TenantServiceServicer_to_server, TenantApi(store), TENANT_SERVICE),
            (add_AgentServiceServicer_to_server, AgentApi(store), AGENT_SERVICE),
            (add_ConfigServiceServicer_to_server, ConfigApi(watch), CONFIG_SERVICE),
        ],
    )
    await follower.following.wait()  # Watches that begin before would have to begin anew.
    port = await server.start()
    lifecycle.on_stop("grpc", partial(server.stop, settings.drain_timeout_s), settings.drain_timeout_s + 1)
    admin = await serve_admin(settings, lambda: {"config changes": follower.following.is_set()})
    lifecycle.on_stop("admin", admin.stop, 1.0)
    await server.set_serving(True)
    lifecycle.on_stop("watchers", partial(_end_watches, server, watchers), 1.0)
    return port, admin.port


async def _end_watches(server: GrpcServer, watchers: Watchers) -> None:
    """Send watchers elsewhere first: a watch never ends by itself and would hold up the server's stop."""
    await server.set_serving(False)
    watchers.close(stopping())


async def _forget_now_and_then(store: PostgresConfigStore) -> None:
    """Clear away what is kept for a time only."""
    while True:
        await asyncio.sleep(FORGET_EVERY_S)
        try:
            await store.forget()
        except Unavailable as error:
            log.warning("controlplane.forget.failed", error=str(error))


if __name__ == "__main__":
    _settings = load_settings(ControlplaneSettings)
    run_service(lambda lifecycle: main(lifecycle, _settings), _settings)
