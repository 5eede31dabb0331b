"""The tool gateway's process: the only place where its parts are put together. `python -m services.toolgw.main`."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from soma.toolgw.v1.tool_service_pb2_grpc import add_ToolServiceServicer_to_server

from services.toolgw.adapters.access_config_feed import ConfigFeedAccess
from services.toolgw.adapters.api_grpc import SERVICE, ToolApi
from services.toolgw.adapters.json_schema import JsonSchemaRules
from services.toolgw.adapters.reversal_claims_postgres import PostgresReversalClaims
from services.toolgw.adapters.store_postgres import PostgresToolStore
from services.toolgw.adapters.tools_builtin import Calculate, CurrentTime, ForgetNote, RecallNotes, RememberNote
from services.toolgw.adapters.tools_http import http_client, load_http_tools
from services.toolgw.application.cancel_invocation import CancelInvocation
from services.toolgw.application.catalog import ToolCatalog
from services.toolgw.application.hold_lease import RunnerLease
from services.toolgw.application.invoke_tool import InvokeTool
from services.toolgw.application.list_tools import ListTools
from services.toolgw.application.revert_turn import RevertTurn
from services.toolgw.application.run_once import RunOnce
from services.toolgw.application.run_reversals import ReversalRuns
from services.toolgw.application.run_tool import Bounds, ToolRuns
from services.toolgw.settings import ToolgwSettings
from soma_common.authz.authorizer import Authorizer
from soma_common.authz.tokens import load_token
from soma_common.config_feed import ConfigFeed
from soma_common.errors import Unavailable
from soma_common.grpc.channel import open_channel
from soma_common.grpc.server import GrpcServer
from soma_common.lifecycle import Lifecycle, run_service
from soma_common.patience import patiently
from soma_common.postgres.connect import create_pool
from soma_common.postgres.migrations import apply_migrations
from soma_common.settings import load_settings
from soma_common.telemetry.admin import serve_admin

SCHEMA: Final = "toolgw"
MIGRATIONS: Final = Path(__file__).parent / "adapters" / "migrations"
FORGET_EVERY_S: Final = 600.0
REVERSALS: Final = Bounds(of_process=64, of_tenant=16)
"""Turns that may be undone at once; each has one call at a time, so calls of turns that run keep most places."""

log = structlog.get_logger(__name__)


async def main(lifecycle: Lifecycle, settings: ToolgwSettings) -> None:
    """Start everything and say so."""
    port, admin_port = await start(lifecycle, settings)
    lifecycle.ready(port=port, admin_port=admin_port)


async def start(lifecycle: Lifecycle, settings: ToolgwSettings) -> tuple[int, int]:
    """Start everything and register how it stops; returns the gRPC port and the admin port."""
    owner_dsn = settings.postgres_owner_dsn or settings.postgres_dsn
    await patiently(
        lambda: apply_migrations(owner_dsn, SCHEMA, MIGRATIONS, settings.postgres_migrate), settings.start_patience_s
    )
    pool = await create_pool(
        settings.postgres_dsn, max_size=settings.postgres_pool_size, application_name=settings.service_instance
    )
    lifecycle.on_stop("database", pool.close, 2.0)
    store = PostgresReversalClaims(pool, settings.service_instance)
    lease = RunnerLease(store)
    await lease.acquire()
    lifecycle.on_stop("lease", lease.release, 1.0)
    lifecycle.spawn("lease", lease.run())
    lifecycle.spawn("forget", _forget_now_and_then(store))

    channel = open_channel(
        settings.controlplane_target, token=load_token(settings.auth_service_token_file), service="controlplane"
    )
    lifecycle.on_stop("control plane", channel.close, 1.0)
    feed = ConfigFeed(channel, settings.service_instance)
    access = ConfigFeedAccess(feed)
    lifecycle.spawn("config feed", feed.run())

    catalog = _catalog(lifecycle, settings, store)
    bounds = Bounds(of_process=settings.toolgw_max_runs, of_tenant=settings.toolgw_max_runs_per_tenant)
    runs = ToolRuns(store, JsonSchemaRules(), bounds)
    # First callers get a share of the time to wait for their answers, then runs that nobody waits for get the rest.
    calls_s, runs_s = settings.drain_timeout_s * 0.6, settings.drain_timeout_s * 0.4
    lifecycle.on_stop("running tools", partial(runs.drain, runs_s), runs_s + 1)
    run_once = RunOnce(store, runs, lease)
    cancel = CancelInvocation(store, settings.toolgw_cancel_timeout_s)
    reversals = ReversalRuns(store, REVERSALS)
    lifecycle.on_stop("reversals", reversals.drain, 1.0)
    revert = RevertTurn(store, store, catalog, run_once, cancel, reversals)
    lifecycle.spawn("left reversals", revert.take_over())
    api = ToolApi(ListTools(catalog), InvokeTool(store, catalog, access, run_once), cancel, revert)

    server = GrpcServer(
        settings, Authorizer.from_settings(settings), services=[(add_ToolServiceServicer_to_server, api, SERVICE)]
    )
    port = await server.start()
    lifecycle.on_stop("grpc", partial(server.stop, calls_s), calls_s + 1)
    admin = await serve_admin(settings, lambda: {"lease": lease.is_fresh, "config": feed.ready.is_set()})
    lifecycle.on_stop("admin", admin.stop, 1.0)
    await feed.ready.wait()
    await server.set_serving(True)
    lifecycle.on_stop("health", partial(server.set_serving, False), 1.0)
    return port, admin.port


def _catalog(lifecycle: Lifecycle, settings: ToolgwSettings, store: PostgresToolStore) -> ToolCatalog:
    """The built-in tools and those of the file."""
    client = http_client()
    lifecycle.on_stop("http client", client.aclose, 1.0)
    file = settings.toolgw_http_tools_file
    http_tools = load_http_tools(file, client) if file is not None else []
    return ToolCatalog([CurrentTime(), Calculate(), RememberNote(store), ForgetNote(), RecallNotes(store), *http_tools])


async def _forget_now_and_then(store: PostgresToolStore) -> None:
    """Clear away ended calls whose time is over."""
    while True:
        await asyncio.sleep(FORGET_EVERY_S)
        try:
            await store.forget()
        except Unavailable as error:
            log.warning("toolgw.forget.failed", error=str(error))


if __name__ == "__main__":
    _settings = load_settings(ToolgwSettings)
    run_service(lambda lifecycle: main(lifecycle, _settings), _settings)
