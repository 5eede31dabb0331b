"""Subscriptions whose messages are handed over where they are read.

nats-py puts each message into a queue, from which a task of the subscription calls the handler: 3 us a message and one
more turn of the loop, for handlers that only take a message and never wait. Here the queue is the handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

_log = structlog.get_logger(__name__)


async def subscribe(client: Client, subject: str, handle: Callable[[Msg], None]) -> Subscription:
    """Have `handle` called with each message of `subject`, in order, until the subscription ends. What it raises is
    logged; the message is over.
    """
    subscription = await client.subscribe(subject)
    early = subscription._pending_queue
    subscription._pending_queue = direct = _Handler(subscription, handle)
    while not early.empty():  # came while the subscription was made
        direct.put_nowait(early.get_nowait())
    return subscription


class _Handler(asyncio.Queue[Msg]):
    """A queue in which nothing ever waits, so it is empty to whoever drains the subscription."""

    def __init__(self, subscription: Subscription, handle: Callable[[Msg], None]) -> None:
        super().__init__()
        self._subscription = subscription
        self._handle = handle

    def put_nowait(self, message: Msg) -> None:
        self._subscription._pending_size -= len(message.data)
        try:
            self._handle(message)
        except Exception:  # noqa: BLE001 - boundary: the connection is read on for everybody else
            _log.exception("nats.handler_failed", subject=message.subject)
