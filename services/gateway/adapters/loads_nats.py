"""What the routers tell over core NATS about waiting messages."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from soma.router.v1.outbound_pb2 import MailboxLoad

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
