"""Watches turns and sessions over NATS, from any place on: live events joined with pages of what lies behind it.

    subscribe soma.<tenant>.live.<session>   ->  merge  ->  buffer  ->  the reader
    ask       soma.<tenant>.watch.<partition> (registers interest for ten seconds, answers with a page)

The owner of the session's partition is the only source. It is asked first, page by page while more follows, every
two seconds to renew the interest, and at once when something is missing or the connection was lost. While nobody owns
the partition nobody answers; the watch goes on when somebody does. Watches of one session in a process share a
subscription.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import nats.errors
import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from soma.common.v1.turn_pb2 import LiveEvent, Outcome, WatchPosition
from soma.router.v1.outbound_pb2 import LiveBatch, WatchQuery, WatchSnapshot

from soma_common.errors import SomaError
from soma_common.ids import SessionName, partition_of
from soma_common.live_errors import expired, no_turn, too_many, too_slow, unknown_position
from soma_common.live_merge import Fate, Watched, WatchMerge
from soma_common.nats import subjects
from soma_common.telemetry.metrics import gauge

QUERY_TIMEOUT_S: Final = 0.5
RENEW_S: Final = 2.0
"""Owners forget a watcher after ten seconds."""
RETRY_S: Final = 0.1
"""Pause before the owner is asked again when it did not answer."""
MAX_BUFFERED: Final = 2048
MAX_BUFFERED_BYTES: Final = 4 * 1024 * 1024
PAGE_ROOM_BYTES: Final = 1024 * 1024
"""A further page is asked for when no more than this waits to be read."""
_BEYOND: Final = 2**31
_FIRST_LOOK_S: Final = 0.01
_LAST_LOOK_S: Final = 0.2

_watches = gauge("soma_live_watches", "Watches of turns and sessions that this process serves.")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is watched: a turn, the turn that answers a message, or, with neither, the session."""

    session: SessionName
    turn_id: bytes = b""
    message_id: bytes = b""
    content_hash: bytes = b""
    """Of the message's content, should its key have been used for another one too."""


class LiveHub:
    """The watches of a process. A tenant has at most `tenant_watches` at once."""

    def __init__(self, nc: Client, partitions: int, *, tenant_watches: int, bound: str) -> None:
        """`bound` names the bound on watches in errors."""
        self._nc = nc
        self._partitions = partitions
        self._tenant_watches = tenant_watches
        self._bound = bound
        self._feeds: dict[bytes, _Feed] = {}
        self._count: Counter[str] = Counter()

    def watch(
        self, subject: Subject, *, after: WatchPosition | None = None, lifetime_s: float | None = None
    ) -> LiveWatcher:
        """A watch, to be entered. `after` is the position of the last event that an earlier one has shown; `lifetime_s`
        is how long the caller's token is good.
        """
        return LiveWatcher(self, subject, after, lifetime_s)

    async def fate(self, subject: Subject) -> Fate:
        """Waits until it is known what becomes of a stored message: it waits, a turn has taken it, or was refused."""
        query = WatchQuery(
            session_id=subject.session.id,
            message_id=subject.message_id,
            content_hash=subject.content_hash,
            after=WatchPosition(step=_BEYOND),
        )
        look_s = _FIRST_LOOK_S
        while True:
            answer = await self.ask(subject.session, query)
            if answer is not None and answer.known:
                return _fate(answer)
            await asyncio.sleep(look_s)
            look_s = min(2 * look_s, _LAST_LOOK_S)

    @property
    def reconnects(self) -> int:
        """How often the connection was lost and made again."""
        count: int = self._nc.stats["reconnects"]
        return count

    async def ask(self, session: SessionName, query: WatchQuery) -> WatchSnapshot | None:
        """The owner's answer; None while there is none."""
        subject = subjects.watch(session.tenant, partition_of(query.session_id, self._partitions))
        try:
            answer = await self._nc.request(subject, query.SerializeToString(), timeout=QUERY_TIMEOUT_S)
            return WatchSnapshot.FromString(answer.data)
        except (nats.errors.Error, DecodeError, OSError) as error:
            _log.debug("watch.no_answer", subject=subject, error=repr(error))
            return None

    async def join(self, watcher: LiveWatcher) -> None:
        """Has a watcher hear its session's live events. Raises ResourceExhausted."""
        session = watcher.session
        if self._count[session.tenant] >= self._tenant_watches:
            raise too_many(self._bound, self._tenant_watches)
        self._count[session.tenant] += 1
        _watches.inc()
        feed = self._feeds.get(session.id)
        if feed is None:
            feed = self._feeds[session.id] = _Feed(self._nc, session)
        feed.watchers.append(watcher)
        try:
            await feed.open()
        except BaseException:
            await self.leave(watcher)
            raise

    async def leave(self, watcher: LiveWatcher) -> None:
        """Ends that."""
        session = watcher.session
        feed = self._feeds.get(session.id)
        if feed is None or watcher not in feed.watchers:
            return
        _watches.dec()
        self._count[session.tenant] -= 1
        if not self._count[session.tenant]:
            del self._count[session.tenant]
        feed.watchers.remove(watcher)
        if not feed.watchers:
            del self._feeds[session.id]
            await feed.close()


class _Feed:
    """The live events of one session, for all who watch it here."""

    def __init__(self, nc: Client, session: SessionName) -> None:
        self._nc = nc
        self._session = session
        self._opening: asyncio.Future[Subscription] | None = None
        self.watchers: list[LiveWatcher] = []

    async def open(self) -> None:
        if self._opening is None:
            subject = subjects.live(self._session.tenant, self._session.id)
            self._opening = asyncio.ensure_future(self._nc.subscribe(subject, cb=self._on_live))
        await asyncio.shield(self._opening)

    async def close(self) -> None:
        if self._opening is not None:
            with suppress(nats.errors.Error, OSError):  # the connection may be gone, and the subscription with it
                await (await self._opening).unsubscribe()

    async def _on_live(self, message: Msg) -> None:
        try:
            batch = LiveBatch.FromString(message.data)
        except DecodeError:
            _log.warning("watch.undecodable", subject=message.subject, bytes=len(message.data))
            return
        # The subject is a hash of the session: events of another session under it are not ours.
        ours = [e for e in batch.events if e.session == self._session.session and e.agent == self._session.agent]
        for watcher in tuple(self.watchers):
            watcher.hear(ours)


class LiveWatcher:
    """An async context manager and iterator of events with the positions behind them.

        async with hub.watch(Subject(session, turn_id=turn)) as events:
            async for event, position in events: ...

    Entering returns when the owner has answered, or after `QUERY_TIMEOUT_S`. A watch of a turn ends with the event
    that says how the turn ended; one of a session does not end. Leaving stops nothing.

    Iterating raises SomaError: ResourceExhausted when the reader is so slow that the buffer is full, with the position
    to go on from in its metadata; FailedPrecondition for a position of no turn that is known; NotFound for a turn that
    is not there; Unauthenticated when the lifetime is over.
    """

    def __init__(self, hub: LiveHub, subject: Subject, after: WatchPosition | None, lifetime_s: float | None) -> None:
        self._hub = hub
        self._subject = subject
        self.session = subject.session
        self._session_id = subject.session.id
        self._of_session = not subject.turn_id and not subject.message_id
        self._resumed = after is not None
        self._lifetime_s = lifetime_s
        self._merge = WatchMerge(
            turn_id=subject.turn_id,
            message_id=subject.message_id,
            by_snapshot=bool(subject.content_hash),
            session=self._of_session,
            after=after,
        )
        self._given = after or WatchPosition(turn_id=subject.turn_id)
        self._buffer: deque[tuple[Watched, int]] = deque()
        self._buffered_bytes = 0
        self._failure: SomaError | None = None
        self._left = False
        self._reconnects = hub.reconnects
        """Reconnects of the connection before the last page was asked for."""
        self._more = asyncio.Event()
        self._ask = asyncio.Event()
        self._answered = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._expiry: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AsyncIterator[Watched]:
        loop = asyncio.get_running_loop()
        await self._hub.join(self)
        if self._lifetime_s is not None:
            self._expiry = loop.call_later(self._lifetime_s, self._fail, expired())
        self._task = loop.create_task(self._follow(), name="live-watch")
        with suppress(TimeoutError):
            async with asyncio.timeout(QUERY_TIMEOUT_S):
                await self._answered.wait()
        return self._events()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The flag besides the cancel: `asyncio.wait_for` of Python 3.11, under nats-py's request, loses a cancel
        # that comes together with the answer (cpython#86296).
        self._left = True
        if self._expiry is not None:
            self._expiry.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._hub.leave(self)

    async def _events(self) -> AsyncIterator[Watched]:
        while True:
            while self._buffer and self._failure is None:
                watched, size = self._buffer.popleft()
                self._buffered_bytes -= size
                if self._buffered_bytes <= PAGE_ROOM_BYTES:
                    self._drained.set()
                self._given = watched.position
                yield watched
            if self._failure is not None:
                raise self._failure
            if self._merge.ended:
                return
            self._more.clear()
            await self._more.wait()

    def hear(self, events: list[LiveEvent]) -> None:
        """Live events of the session."""
        if self._over:
            return
        if self._reconnects != self._hub.reconnects:
            self._merge.lost()
        shown = self._merge.live(events)
        self._give(shown)
        # A new dispatch may mean a new owner, who does not know of the interest yet.
        moved = any(watched.event.HasField("restarted") for watched in shown)
        if moved or self._merge.gap or self._merge.named:
            self._ask.set()

    async def _follow(self) -> None:
        """Asks the owner what lies behind the place reached: at first, to renew the interest, and when something is
        missing.
        """
        while not self._over:
            await self._drained.wait()
            reconnects = self._hub.reconnects
            self._merge.named = False
            page = await self._hub.ask(self.session, self._query())
            if self._over:
                return
            if not self._merge.named:  # else the answer may be older than the event that named our message
                self._ask.clear()
            if page is None:
                await asyncio.sleep(RETRY_S)
                continue
            self._reconnects = reconnects
            self._take(page)
            self._answered.set()
            if not self._merge.gap:
                await self._wait_for_need()
            elif not page.more:
                await asyncio.sleep(RETRY_S / 4)  # what is missing may be about to be known

    @property
    def _over(self) -> bool:
        return self._left or self._merge.ended or self._failure is not None

    def _query(self) -> WatchQuery:
        query = WatchQuery(
            session_id=self._session_id,
            agent=self.session.agent,
            after=self._merge.position,
            turn_id=self._merge.position.turn_id,  # for routers of the release before, which know no positions
            session=self._of_session,
            resumed=self._resumed,
        )
        if self._merge.about_message:
            query.message_id, query.content_hash = self._subject.message_id, self._subject.content_hash
        return query

    def _take(self, page: WatchSnapshot) -> None:
        if page.known or page.position_unknown:
            self._give(self._merge.page(page))
        elif self._subject.turn_id:
            self._fail(no_turn(self.session, self._subject.turn_id))
        else:
            # An owner that does not know the message yet has noted the interest: it tells when there is something.
            self._merge.unknown()
        if self._merge.position_unknown:
            self._fail(unknown_position())

    async def _wait_for_need(self) -> None:
        """Returns when the owner is to be asked again."""
        loop = asyncio.get_running_loop()
        renew = loop.time() + RENEW_S * random.uniform(0.75, 1.25)
        while loop.time() < renew and self._hub.reconnects == self._reconnects:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    await self._ask.wait()
                    return

    def _give(self, shown: Iterable[Watched]) -> None:
        for watched in shown:
            size = watched.event.ByteSize()
            full = len(self._buffer) >= MAX_BUFFERED or self._buffered_bytes + size > MAX_BUFFERED_BYTES
            if full and not self._merge.ended:
                self._fail(too_slow(self._given, MAX_BUFFERED))
                return
            self._buffer.append((watched, size))
            self._buffered_bytes += size
        if self._buffered_bytes > PAGE_ROOM_BYTES:
            self._drained.clear()
        if self._buffer:
            self._more.set()

    def _fail(self, failure: SomaError) -> None:
        self._failure = failure
        self._buffer.clear()
        self._drained.set()
        self._answered.set()
        self._more.set()


def _fate(answer: WatchSnapshot) -> Fate:
    event = answer.events[-1] if answer.events else LiveEvent()
    ended = event.ended if event.HasField("ended") else None
    if answer.queued or (ended is not None and ended.outcome == Outcome.OUTCOME_ABSORBED):
        return Fate(ahead=answer.ahead)  # a turn that gave it up has not answered it: it waits for the next
    return Fate(event.turn_id, 0, ended)
