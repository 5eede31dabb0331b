"""Wires the gateway and runs it: `python -m services.gateway.main`. The only place that knows all its parts."""

from __future__ import annotations

import secrets
import time

from soma.gateway.v1.channel_service_pb2_grpc import add_ChannelServiceServicer_to_server

from services.gateway.adapters.channel_grpc import ChannelServicer
from services.gateway.adapters.directory_feed import FeedDirectory
from services.gateway.adapters.lanes_nats import NatsLanes
from services.gateway.adapters.loads_nats import listen_to_loads, listen_to_progress
from services.gateway.adapters.metrics import observe_batch, observe_state
from services.gateway.adapters.routers_nats import NatsRouters
from services.gateway.adapters.watches_nats import NatsWatches
from services.gateway.application.accept_message import AcceptMessage
from services.gateway.application.return_acks import ReturnAcks
from services.gateway.application.serve_streams import ServeStreams
from services.gateway.application.stream_turn import DecideMessage, SendMessage, StreamTurn
from services.gateway.application.write_lanes import LaneWriters
from services.gateway.domain.ingest_window import LaneProgress
from services.gateway.domain.mailbox_bounds import MailboxBounds
from services.gateway.domain.stream_number import StreamNumbers
from services.gateway.settings import GatewaySettings
from soma_common import clock
from soma_common.authz.authorizer import Authorizer
from soma_common.authz.tokens import load_token
from soma_common.config_feed import ConfigFeed
from soma_common.grpc.channel import open_channel
from soma_common.grpc.server import GrpcServer
from soma_common.layout import LaneLayout
from soma_common.lifecycle import Lifecycle, run_service
from soma_common.live import LiveHub
from soma_common.nats.connection import connect_nats
from soma_common.nats.lanes import find_layout
from soma_common.patience import patiently
from soma_common.settings import StartRefused, load_settings
from soma_common.telemetry.admin import serve_admin

SERVICE = "soma.gateway.v1.ChannelService"


async def main(lifecycle: Lifecycle, settings: GatewaySettings) -> int:
    """Starts the gateway and returns its gRPC port once it serves.

    Raises:
        LaneMismatch: the lanes were made for other numbers of partitions or lanes, or another hash.
        Unavailable: the bus does not answer, or no router has made the lanes yet.
        StartRefused: a setting that the gateway cannot do without is missing, or does not fit the bus.
    """
    if settings.controlplane_target is None:
        raise StartRefused("SOMA_CONTROLPLANE_TARGET is not set: without it no tenant is known")
    nc = await patiently(
        lambda: connect_nats(settings.nats_url, settings.nats_token_file, settings.service_instance),
        settings.start_patience_s,
    )
    lifecycle.on_stop("close nats", nc.close)
    if settings.max_batch_bytes > nc.max_payload:
        raise StartRefused(
            f"SOMA_MAX_BATCH_BYTES is {settings.max_batch_bytes}, the bus takes {nc.max_payload}: lower it, "
            "or raise max_payload of the NATS server"
        )
    wanted = LaneLayout(settings.partitions, settings.lanes)
    layout = await patiently(lambda: find_layout(nc.jetstream(), wanted), settings.start_patience_s)
    lanes = NatsLanes(nc, layout, settings.tenant_lane_batches)
    await lanes.ensure()

    token = load_token(settings.auth_service_token_file) if settings.auth_service_token_file else None
    controlplane = open_channel(settings.controlplane_target, token=token, service="controlplane")
    lifecycle.on_stop("close control plane channel", controlplane.close)
    feed = ConfigFeed(controlplane, settings.service_instance)

    # Another id after each start: routers must see a restart as a new gateway, whose streams are new ones.
    gateway = f"{settings.service_instance}-{secrets.token_hex(4)}"
    routers = NatsRouters(nc, gateway)
    writers = LaneWriters(lanes, settings.lane_bounds, LaneProgress(clock.monotonic), observe=observe_batch)
    directory = FeedDirectory(feed)
    mailboxes = MailboxBounds(
        per_tenant=settings.max_queued_per_tenant, per_session=settings.max_queued_per_session, clock=clock.monotonic
    )
    accept = AcceptMessage(
        directory,
        writers,
        mailboxes,
        layout,
        max_content_bytes=settings.max_content_bytes,
        now_ms=clock.now_ms,
        trace_every=settings.trace_every,
    )
    acks = ReturnAcks(routers, clock.monotonic)
    streams = ServeStreams(
        gateway,
        directory=directory,
        accept=accept,
        acks=acks,
        routers=routers,
        numbers=StreamNumbers(lambda: time.time_ns() // 1000, secrets.randbits),
        bounds=settings.stream_bounds,
        clock=clock.monotonic,
    )
    send = SendMessage(accept)
    hub = LiveHub(nc, settings.partitions, tenant_watches=settings.tenant_watches, bound="gateway.tenant_watches")
    watches = NatsWatches(hub)
    servicer = ChannelServicer(
        streams,
        send,
        DecideMessage(accept, watches),
        StreamTurn(accept, send, watches),
        hub,
        max_content_bytes=settings.max_content_bytes,
    )
    server = GrpcServer(
        settings,
        Authorizer.from_settings(settings),
        services=[(add_ChannelServiceServicer_to_server, servicer, SERVICE)],
    )
    observe_state(lambda: len(streams), lambda: writers.waiting)
    admin = await serve_admin(settings, lambda: {"nats": nc.is_connected, "config": feed.ready.is_set()})

    lifecycle.on_stop("close admin port", admin.stop)
    lifecycle.on_stop("send the last acks", acks.flush, timeout_s=1.0)
    lifecycle.on_stop("say farewell", streams.farewell)
    lifecycle.on_stop("store what was accepted", lambda: writers.drain(settings.drain_timeout_s))
    lifecycle.spawn("config feed", feed.run())
    lifecycle.spawn("streams", streams.run())
    lifecycle.spawn("acks", acks.run())
    await routers.listen(streams.hand_over)
    await listen_to_loads(nc, mailboxes.on_load)
    await listen_to_progress(nc, writers.on_progress)
    port = await server.start()
    lifecycle.on_stop("stop grpc", lambda: server.stop(0.5))
    await feed.ready.wait()
    await server.set_serving(True)

    async def drain() -> None:
        await server.set_serving(False)
        await streams.drain(settings.drain_timeout_s)

    lifecycle.on_stop("drain streams", drain, timeout_s=settings.drain_timeout_s + 1.0)
    lifecycle.ready(port=port, admin_port=admin.port, gateway=gateway)
    return port


if __name__ == "__main__":
    gateway_settings = load_settings(GatewaySettings)

    async def start(lifecycle: Lifecycle) -> None:
        """Runs the gateway with the settings of this process."""
        await main(lifecycle, gateway_settings)

    run_service(start, gateway_settings)
