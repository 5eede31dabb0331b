"""Waiting at the start for what a process needs and does not have yet: a database that recovers, a bus that starts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from soma_common.errors import Unavailable

RETRY_S: Final = 0.5
TELL_EVERY_S: Final = 5.0

T = TypeVar("T")
_log = structlog.get_logger(__name__)


async def patiently(attempt: Callable[[], Awaitable[T]], patience_s: float) -> T:
    """Return what `attempt` returns, trying again for `patience_s` while it raises Unavailable; says so in the log.

    Raises:
        Unavailable: of the last try, when the time is over.
    """
    began = time.monotonic()
    told_at = began - TELL_EVERY_S
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            now = time.monotonic()
            if now - began >= patience_s:
                raise
            if now - told_at >= TELL_EVERY_S:
                told_at = now
                left_s = round(began + patience_s - now)
                _log.warning(
                    "service.start_waits", why=error.message, waited_s=round(now - began), gives_up_in_s=left_s
                )
        await asyncio.sleep(RETRY_S)
