"""What the routers tell over core NATS: how much waits, and how far they have taken the lanes in."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from soma.router.v1.outbound_pb2 import LaneProgress, MailboxLoad

from soma_common.nats import subjects

_log = structlog.get_logger(__name__)


async def listen_to_loads(nc: Client, on_load: Callable[[str, MailboxLoad], None]) -> Subscription:
    """Gives every router's report of every tenant to `on_load`, with the tenant its subject names."""

    async def on_message(message: Msg) -> None:
        try:
            load = MailboxLoad.FromString(message.data)
        except DecodeError:
            _log.error("load.undecodable", subject=message.subject, bytes=len(message.data))
            return
        on_load(subjects.tenant_of(message.subject), load)

    return await nc.subscribe(subjects.load("*", "*"), cb=on_message)


async def listen_to_progress(nc: Client, on_progress: Callable[[int, str, int], None]) -> Subscription:
    """Gives every router's news of every lane to `on_progress`: lane, router, place."""

    async def on_message(message: Msg) -> None:
        try:
            progress = LaneProgress.FromString(message.data)
        except DecodeError:
            _log.error("load.undecodable", subject=message.subject, bytes=len(message.data))
            return
        on_progress(progress.lane, progress.router, progress.seq)

    return await nc.subscribe(subjects.progress("*"), cb=on_message)
