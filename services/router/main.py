"""The router: everything is wired here, and only here."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import structlog
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.errors import APIError
from soma.router.v1 import session_service_pb2_grpc, turn_service_pb2_grpc

from services.router.adapters.api_grpc import SessionApi, TurnApi
from services.router.adapters.brain_grpc import BrainConnector
from services.router.adapters.control_lane import ControlLane
from services.router.adapters.exchange_nats import NatsInbox, NatsOutbox
from services.router.adapters.history_postgres import PostgresHistory
from services.router.adapters.inbound_nats import LaneReader, LaneReaders
from services.router.adapters.load_nats import NatsLoads
from services.router.adapters.store_postgres import PostgresGroupWriter, PostgresLeases
from services.router.adapters.tools_grpc import GrpcToolCanceller
from services.router.application.brains import BrainPool
from services.router.application.commit_group import GroupCommitter
from services.router.application.deliver_outcomes import DeliveryDesk
from services.router.application.group import StoreLost
from services.router.application.ingest_messages import Ingest
from services.router.application.own_partitions import OwnPartitions
from services.router.application.report_load import ReportLoad
from services.router.application.report_progress import ReportProgress
from services.router.application.run_turns import TurnRunner
from services.router.application.state import RouterState
from services.router.application.trace_groups import TracedGroups
from services.router.application.watch_turns import LiveDesk
from services.router.domain.lane_window import LaneWindow
from services.router.settings import RouterSettings
from soma_common.authz.authorizer import Authorizer
from soma_common.authz.tokens import load_token
from soma_common.clock import monotonic
from soma_common.config_feed import ConfigFeed
from soma_common.errors import Unavailable
from soma_common.grpc.channel import open_channel
from soma_common.grpc.server import GrpcServer
from soma_common.layout import LaneLayout, LaneMismatch
from soma_common.lifecycle import Lifecycle, run_service
from soma_common.live import LiveHub
from soma_common.nats.connection import connect_nats
from soma_common.nats.lanes import ensure_lanes, find_layout
from soma_common.patience import patiently
from soma_common.postgres.migrations import apply_migrations
from soma_common.settings import load_settings
from soma_common.telemetry.admin import serve_admin

MIGRATIONS: Final = Path(__file__).parent / "adapters" / "migrations"
_SWEEP_S: Final = 0.5
_IDLE_CURSORS_S: Final = 1.0

log = structlog.get_logger(__name__)


class Background:
    """Tasks without an owner of their own; kept so that they are neither lost nor left behind."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs `work`; a failure is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("router.background_failed", exc_info=task.exception())

    async def cancel(self) -> None:
        """Cancels what runs."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def agreed_layout(js: JetStreamContext, leases: PostgresLeases, wanted: LaneLayout) -> LaneLayout:
    """`wanted` with the form of ids that the database has; one that is new gets that of the lanes, whose messages it is
    to take in, or of this release if there are none. Raises LaneMismatch.
    """
    with suppress(Unavailable):  # there are no lanes yet
        wanted = await find_layout(js, wanted)
    stored = await leases.ensure_layout(wanted)
    layout = wanted.kept_as(stored)
    if layout is None:
        raise LaneMismatch(
            f"the database was made for {stored}, this router is set to {wanted.metadata()}:"
            " set SOMA_PARTITIONS and SOMA_LANES to the database's values;"
            " a soma_ids that is not known here is a newer release's"
        )
    return layout


async def main(lifecycle: Lifecycle, settings: RouterSettings) -> None:
    """Starts the router; returns once it serves."""
    router = settings.service_instance
    token = load_token(settings.auth_service_token_file)
    owner_dsn = settings.postgres_owner_dsn or settings.postgres_dsn
    await patiently(
        lambda: apply_migrations(owner_dsn, "router", MIGRATIONS, settings.postgres_migrate), settings.start_patience_s
    )
    client = await patiently(
        lambda: connect_nats(settings.nats_url, settings.nats_token_file, router), settings.start_patience_s
    )
    lifecycle.on_stop("bus", client.close)
    js = client.jetstream(timeout=2.0)
    leases = PostgresLeases(settings.postgres_dsn, router)
    layout = await agreed_layout(js, leases, LaneLayout(settings.partitions, settings.lanes))
    await ensure_lanes(js, layout, settings.tenant_lane_batches)

    background = Background()
    control_channel = open_channel(settings.controlplane_target, token=token, service="controlplane")
    feed = ConfigFeed(control_channel, router)
    tool_channel = open_channel(settings.toolgw_target, token=token, service="toolgw")
    history = await PostgresHistory.open(settings.postgres_dsn, router)
    writer = PostgresGroupWriter(settings.postgres_dsn, router)

    state = RouterState(
        layout,
        feed,
        settings.max_running_turns,
        settings.max_idle_sessions,
        settings.max_queued_per_session,
        settings.max_queued_per_tenant,
    )
    brains = BrainPool()
    ownership: OwnPartitions

    def may_speak() -> bool:
        return ownership.in_time

    outbox = NatsOutbox(client, router, may_speak)
    desk = DeliveryDesk(
        state,
        history,
        outbox,
        background.spawn,
        ack_wait_s=settings.ack_wait_s,
        max_tries=settings.delivery_tries,
        retry_s=settings.delivery_retry_s,
    )
    # Connections of their own: however many watchers read journals and however much is asked of the API, no turn waits
    # for them. Tenants share them.
    reads, bound = settings.tenant_reads, "router.tenant_reads"
    watched_history = await PostgresHistory.open(settings.postgres_dsn, f"{router} watches", 0, reads, bound)
    asked_history = await PostgresHistory.open(settings.postgres_dsn, f"{router} api", 0, reads, bound)
    live = LiveDesk(state, watched_history, outbox, desk.adapter_of)
    desk.on_arrival = live.catch_up
    runner = TurnRunner(
        state,
        brains,
        history,
        GrpcToolCanceller(tool_channel),
        live,
        background.spawn,
        desk.add,
        convergence_timeout_s=settings.convergence_timeout_s,
        max_strikes=settings.max_strikes,
        stuck_margin_s=settings.stuck_margin_s,
        start_ahead=settings.start_ahead,
    )

    ingest = Ingest(state, runner)
    readers = [
        LaneReader(
            client,
            js,
            state,
            ingest,
            lane,
            settings.lane_backlog,
            # Half of what a tenant may have in a lane stays free for what is not taken in.
            LaneWindow(settings.lane_purge_lag_s, settings.tenant_lane_batches // 2, settings.lane_keep_bytes),
            settings.tenant_lane_batches,
        )
        for lane in range(layout.lanes)
    ]
    ownership = OwnPartitions(state, leases, LaneReaders(readers, state), runner, desk, router)
    leases.on_freed = ownership.lease_freed
    groups = TracedGroups(ingest.compose, ingest.look_ahead, writer)
    committer = GroupCommitter(
        groups,
        groups.compose,
        ownership.end_fenced,
        lambda: ownership.end_all("store_lost"),
        runner.group_sent,
        groups.look_ahead,
    )
    runner.use(committer)
    ingest.committer = desk.committer = committer
    for reader in readers:
        reader.committer = committer

    def gates_changed() -> None:
        state.scheduler.gates_changed()
        committer.nudge()

    feed.on_change(gates_changed)
    inbox = NatsInbox(client, router, desk, live.query)

    control_lane = ControlLane(js, layout)
    hub = LiveHub(client, layout.partitions, tenant_watches=settings.tenant_watches, bound="router.tenant_watches")
    server = GrpcServer(
        settings,
        Authorizer.from_settings(settings),
        services=[
            (
                session_service_pb2_grpc.add_SessionServiceServicer_to_server,
                SessionApi(asked_history, control_lane, hub),
                "soma.router.v1.SessionService",
            ),
            (
                turn_service_pb2_grpc.add_TurnServiceServicer_to_server,
                TurnApi(asked_history, control_lane, hub),
                "soma.router.v1.TurnService",
            ),
        ],
    )

    async def stop() -> None:
        # Before all else: others own the partitions and run their turns while this router closes the rest.
        await ownership.release_all()
        await inbox.close()
        await server.stop(settings.drain_timeout_s)
        await background.cancel()

    async def close_stores() -> None:
        for closing in (
            leases.close(),
            writer.close(),
            history.close(),
            watched_history.close(),
            asked_history.close(),
            control_channel.close(),
            tool_channel.close(),
        ):
            await closing

    lifecycle.on_stop("stores", close_stores)
    lifecycle.on_stop("partitions", stop)
    lifecycle.spawn("config feed", feed.run())
    await feed.ready.wait()
    lifecycle.spawn("group commit", committer.run())
    lifecycle.spawn("outbox", outbox.run())
    await inbox.open()
    for target in settings.cognition_targets:
        connector = BrainConnector(target, token, router, brains, runner, may_speak)
        lifecycle.spawn(f"brain {target}", connector.run())
    for reader in readers:
        lifecycle.spawn("lane reader", reader.run())
    lifecycle.spawn("ownership", ownership.run())
    news = NatsLoads(client, router)
    loads = ReportLoad(state, router, news.send, may_speak, tenant_bound=settings.max_queued_per_tenant)
    lifecycle.spawn("load", loads.run())
    progress = ReportProgress(readers, router, news.send_progress, may_speak)
    ingest.on_taken_in = progress.taken_in
    lifecycle.spawn("progress", progress.run())
    lifecycle.spawn("sweep", _sweep(desk, live, runner))
    lifecycle.spawn("lanes", _tend_lanes(history, readers, layout, settings.purge_every_s))
    admin = await serve_admin(settings, lambda: {"leases": ownership.in_time, "bus": client.is_connected})
    lifecycle.on_stop("admin", admin.stop)
    port = await server.start()
    await ownership.ready.wait()
    await server.set_serving(True)
    lifecycle.ready(port=port, admin_port=admin.port)


async def _sweep(desk: DeliveryDesk, live: LiveDesk, runner: TurnRunner) -> None:
    """What has to be looked at from time to time: late acknowledgements, old interest, turns that stand still."""
    while True:
        await asyncio.sleep(_SWEEP_S)
        desk.sweep()
        live.forget_old()
        runner.restart_stuck()


async def _tend_lanes(
    history: PostgresHistory, readers: list[LaneReader], layout: LaneLayout, purge_every_s: float
) -> None:
    """Moves the cursors of partitions for which nothing comes, and purges the lanes of what every partition has."""
    purge_at = monotonic() + purge_every_s
    while True:
        await asyncio.sleep(_IDLE_CURSORS_S)
        for reader in readers:
            await reader.move_idle_cursors()
        if monotonic() < purge_at:
            continue
        purge_at = monotonic() + purge_every_s
        try:
            floors = await history.lane_floors(layout.lanes)
            place = await history.committed_place()
            for lane, reader in enumerate(readers):
                await reader.tend(*floors.get(lane, ("", 0)), place)
        except (StoreLost, NatsError, APIError, OSError, TimeoutError) as error:
            log.warning("router.purge_failed", error=str(error) or type(error).__name__)


if __name__ == "__main__":
    loaded = load_settings(RouterSettings)
    run_service(lambda lifecycle: main(lifecycle, loaded), loaded)
