"""Watches one turn over NATS: live events joined with snapshots, until the turn ends.

    subscribe soma.<tenant>.live.<session>   ->  buffer  ->  merge  ->  the reader
    ask       soma.<tenant>.watch.<partition> (registers interest for ten seconds, answers with a snapshot)

The owner of the session's partition is the only source. It is asked first, every two seconds to renew the interest,
and at once when something is missing or the connection was lost. While nobody owns the partition nobody answers;
the watch goes on when somebody does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Final

import nats.errors
import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import LiveEvent
from soma.router.v1.outbound_pb2 import LiveBatch, WatchQuery, WatchSnapshot

from soma_common.errors import ResourceExhausted
from soma_common.ids import SessionName, partition_of
from soma_common.live_merge import TurnMerge
from soma_common.nats import subjects

QUERY_TIMEOUT_S: Final = 0.5
RENEW_S: Final = 2.0
"""Owners forget a watcher after ten seconds."""
RETRY_S: Final = 0.1
"""Pause before the owner is asked again when it did not answer or something is missing."""
MAX_BUFFERED: Final = 2048
MAX_BUFFERED_BYTES: Final = 4 * 1024 * 1024

_log = structlog.get_logger(__name__)


class LiveWatcher:
    """An async context manager and iterator of LiveEvent; the last event is the one that says how the turn ended.

        async with LiveWatcher(nc, session, partitions=8, message_id=id) as events:
            async for event in events: ...

    Give `message_id` to watch the turn that answers a message, which need not be stored yet, or `turn_id`. With
    `content_hash` it is the message with this content, should its key have been used for another one too. Entering
    returns when the owner has answered, or after `QUERY_TIMEOUT_S`. Leaving stops nothing.

    Iterating raises ResourceExhausted when the reader is so slow that the buffer is full: watch again to go on.
    """

    def __init__(
        self,
        nc: Client,
        session: SessionName,
        *,
        partitions: int,
        message_id: bytes = b"",
        content_hash: bytes = b"",
        turn_id: bytes = b"",
    ) -> None:
        self._nc = nc
        self._session = session
        session_id = session.id
        self._live_subject = subjects.live(session.tenant, session_id)
        self._watch_subject = subjects.watch(session.tenant, partition_of(session_id, partitions))
        self._query = WatchQuery(
            session_id=session_id,
            message_id=message_id,
            content_hash=content_hash,
            turn_id=turn_id,
            agent=session.agent,
        ).SerializeToString()
        self._merge = TurnMerge(message_id=message_id, turn_id=turn_id, by_snapshot=bool(content_hash))
        self._buffer: deque[tuple[LiveEvent, int]] = deque()
        self._buffered_bytes = 0
        self._overrun = False
        self._left = False
        self._reconnects: int = nc.stats["reconnects"]
        """Reconnects of the connection before the last snapshot was asked for."""
        self._more = asyncio.Event()
        self._ask = asyncio.Event()
        self._answered = asyncio.Event()
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AsyncIterator[LiveEvent]:
        self._subscription = await self._nc.subscribe(self._live_subject, cb=self._on_live)
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="live-watch")
        with suppress(TimeoutError):
            async with asyncio.timeout(QUERY_TIMEOUT_S):
                await self._answered.wait()
        return self._events()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            # The flag besides the cancel: `asyncio.wait_for` of Python 3.11, under nats-py's request, loses a cancel
            # that comes together with the answer (cpython#86296).
            self._left = True
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._subscription is not None:
            with suppress(nats.errors.Error):  # the connection may be gone, and the subscription with it
                await self._subscription.unsubscribe()

    async def _events(self) -> AsyncIterator[LiveEvent]:
        while True:
            while self._buffer:
                event, size = self._buffer.popleft()
                self._buffered_bytes -= size
                yield event
                if event.WhichOneof("event") == "ended":
                    return
            if self._overrun:
                raise ResourceExhausted(
                    ErrorReason.ERROR_REASON_QUEUE_FULL,
                    "events of this turn are read too slowly: watch again to go on from where it stands",
                    {"bound": "watch.buffer", "value": str(MAX_BUFFERED)},
                    retry_delay_s=0.0,
                )
            self._more.clear()
            await self._more.wait()

    async def _on_live(self, message: Msg) -> None:
        try:
            batch = LiveBatch.FromString(message.data)
        except DecodeError:
            _log.warning("watch.undecodable", subject=message.subject, bytes=len(message.data))
            return
        # The subject is a hash of the session: events of another session under it are not ours.
        ours = [e for e in batch.events if e.session == self._session.session and e.agent == self._session.agent]
        if self._reconnects != self._nc.stats["reconnects"]:
            self._merge.lost()
        self._give(self._merge.live(ours))
        if self._merge.gap or self._merge.named:
            self._ask.set()

    async def _follow(self) -> None:
        """Asks the owner where the turn stands: at first, to renew the interest, and when something is missing."""
        while not (self._merge.ended or self._overrun or self._left):
            reconnects = self._nc.stats["reconnects"]
            self._merge.named = False
            snapshot = await self._snapshot()
            if self._left:
                return
            if not self._merge.named:  # else the answer may be older than the event that named our message
                self._ask.clear()
            if snapshot is not None:
                self._reconnects = reconnects
                if snapshot.known:
                    self._give(self._merge.snapshot(snapshot.events))
                else:
                    self._merge.unknown()
                self._answered.set()
            # An owner that does not know the message yet has noted the interest: it tells when there is something
            # to tell.
            settled = snapshot is not None and (not snapshot.known or not self._merge.gap)
            if not settled:
                await asyncio.sleep(RETRY_S)
                continue
            await self._wait_for_need()

    async def _wait_for_need(self) -> None:
        """Returns when the owner is to be asked again."""
        loop = asyncio.get_running_loop()
        renew = loop.time() + RENEW_S
        while loop.time() < renew and self._nc.stats["reconnects"] == self._reconnects:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    await self._ask.wait()
                    if not self._merge.named:
                        await asyncio.sleep(RETRY_S / 4)  # what is missing may be on its way
                    return

    async def _snapshot(self) -> WatchSnapshot | None:
        """The owner's answer; None while there is none."""
        try:
            answer = await self._nc.request(self._watch_subject, self._query, timeout=QUERY_TIMEOUT_S)
            return WatchSnapshot.FromString(answer.data)
        except (nats.errors.Error, DecodeError) as error:
            _log.debug("watch.no_answer", subject=self._watch_subject, error=repr(error))
            return None

    def _give(self, events: Iterable[LiveEvent]) -> None:
        for event in events:
            size = event.ByteSize()
            full = len(self._buffer) >= MAX_BUFFERED or self._buffered_bytes + size > MAX_BUFFERED_BYTES
            if full and event.WhichOneof("event") != "ended":
                self._overrun = True
                break
            self._buffer.append((event, size))
            self._buffered_bytes += size
        if self._buffer or self._overrun:
            self._more.set()
