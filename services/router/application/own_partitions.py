"""Owns partitions: takes what is free or left behind, up to a fair share, and lets go when its time is over.

A router that stops frees its partitions and leaves in one statement, and the others are notified: they own them a few
milliseconds later. A router that joins gets its share slowly, and only once it has been there for a while: each move
costs the turns that run in the partition a step, and a router that keeps restarting is to cost nothing.

Leases say when to take over; what may be written is decided by the term in the partition's row alone, so nothing here
needs clocks to agree. A lease is taken over only when the database clock says it ran out *and* this router has itself
seen it unrenewed for a whole lease time: after a stall of the database nobody is robbed by whoever wakes first.
A router that did not renew in time by its own monotonic clock (it was frozen, or cut off) ends its terms by itself
before it says another word.

What is pending in a partition may take much longer to load than a lease lasts. So each partition is taken by a task of
its own, a few at a time, while the leases go on being renewed, its own among them from the first moment. What is loaded
is nobody's until all of it is there, and is given up as soon as the term is lost. Then it is put back in slices; until
that is done the partition's lane is not read, so that nothing overtakes what was there before.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol
from uuid import UUID, uuid4

import structlog

from services.router.application.group import FenceLost, StoreLost
from services.router.application.restore_sessions import Found, restore_sessions
from services.router.domain.partition import Cursor, Partition, Pending
from services.router.domain.spread import shares, turn_of
from soma_common.clock import monotonic
from soma_common.failpoints import failpoint
from soma_common.telemetry.metrics import counter, gauge

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from services.router.application.deliver_outcomes import DeliveryDesk
    from services.router.application.ports import AcquiredRow, LeaseRow, LeaseStore
    from services.router.application.run_turns import TurnRunner
    from services.router.application.state import RouterState

LEASE_S: Final = 3.0
BEAT_S: Final = 1.0
_POLL_S: Final = 0.25
"""How often the leases are looked at when nobody has said that one is free."""
_BLIND_S: Final = 1.5
"""Not having looked at the leases for so long, this router has not seen that nobody renewed them."""
SETTLED_S: Final = LEASE_S
"""A router that has been seen for so long without a break is given partitions that others hold."""
GIVE_UP_EVERY_S: Final = 0.5
"""While partitions are moved to routers that have fewer, one moves so often."""
TAKES_AT_ONCE: Final = 2
"""So many partitions are taken at a time: one with very much to load does not keep the others waiting."""
_FIRST_TAKES_S: Final = 1.0
"""How long a router that starts waits for what it takes at once, before it says that it is ready."""
_LAST_TAKE_S: Final = 1.0
"""How long the shutdown waits for the lease of a partition that is just being taken, to free that too."""

log = structlog.get_logger(__name__)

OWNED = gauge("soma_router_partitions_owned", "Partitions this router owns.")
LOADING = gauge("soma_router_partitions_loading", "Partitions whose lease this router has while it loads them.")
TAKEN = counter("soma_router_partitions_taken_total", "Partitions taken, by why.", ["cause"])
ENDED = counter("soma_router_partitions_ended_total", "Partitions let go or lost, by why.", ["cause"])


class LaneControl(Protocol):
    """The lane readers, as far as ownership is concerned."""

    def attach(self, partition: Partition) -> None:
        """Reads the partition's lane from its cursor on. Checks first that the lane is still the one the cursor was
        made for.
        """

    def detach(self, partition: Partition) -> None:
        """The partition is not ours any more."""


class _Take:
    """A partition that is being taken, under the term that it is to have."""

    __slots__ = ("is_loading", "lost", "task", "term")

    def __init__(self) -> None:
        self.term = uuid4()
        self.is_loading = False
        """This router has the lease, and nothing of the partition is its own yet."""
        self.lost = False
        """The term has ended before the partition was loaded."""
        self.task: asyncio.Task[None]


class OwnPartitions:
    """The lease keeper of this router."""

    def __init__(
        self,
        state: RouterState,
        store: LeaseStore,
        lanes: LaneControl,
        runner: TurnRunner,
        desk: DeliveryDesk,
        router: str,
    ) -> None:
        self._state = state
        self._store = store
        self._lanes = lanes
        self._runner = runner
        self._desk = desk
        self._router = router
        self._deadline = 0.0
        self._beat_at = 0.0
        self._looked_at = 0.0
        self._held_before: set[int] = set()
        """Partitions this process has owned: taking one of them again says nothing bad about its turns."""
        self._owed_strikes: dict[int, bool] = {}
        """Of partitions that were taken, or perhaps were, and not loaded: whether their turns have a strike to come."""
        self._seen: dict[int, tuple[object, float]] = {}
        """The last renewal of each lease that was seen, and since when it has been the last."""
        self._routers: dict[str, float] = {}
        """The routers that live, and since when each has been seen without a break."""
        self._owners: dict[int, str | None] = {}
        self._moved_at = 0.0
        """When a partition was last seen with another owner than before."""
        self._takes: dict[int, _Take] = {}
        """Partitions that are being taken, until what was pending there is put back."""
        self._wanted: deque[LeaseRow] = deque()
        """What is free, as last seen, in the order in which it is to be taken."""
        self._missed: dict[int, float] = {}
        """When the last take of each failed: those are tried behind the others, or they might keep them waiting."""
        self._share = 0
        self._failed: BaseException | None = None
        """What a take failed with that nobody expects."""
        self._releasing = False
        self._looking = asyncio.Lock()
        self._news = asyncio.Event()
        self.ready = asyncio.Event()
        """Set once this router has looked at the leases for the first time and taken what is quickly taken."""

    @property
    def in_time(self) -> bool:
        """Whether the lease was renewed recently enough that nobody else can have taken over: else say nothing."""
        return monotonic() < self._deadline

    async def run(self) -> None:
        """Beats and takes partitions until cancelled."""
        try:
            while True:
                self._news.clear()
                if not self._releasing:
                    await self._look()
                if not self.ready.is_set():
                    await self._first_takes()
                    self.ready.set()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._news.wait()
        finally:
            self._cancel_takes()

    def lease_freed(self) -> None:
        """Another router has let a lease go: looks at once."""
        self._news.set()

    async def _look(self) -> None:
        if self._failed is not None:
            raise self._failed
        async with self._looking:
            try:
                await self._beat_if_due()
                await self._balance()
            except StoreLost as error:
                self._store_lost(error)

    def _store_lost(self, error: StoreLost) -> None:
        log.warning("router.lease_store_lost", error=str(error))
        self._wanted.clear()  # not to be tried at once, but after the next look

    async def _beat_if_due(self) -> None:
        self._end_overdue()
        now = monotonic()
        if now >= self._beat_at and not self._releasing:
            await self._beat()
            self._beat_at = now + BEAT_S

    def _end_overdue(self) -> None:
        """What was said while this router was not in time was held back, so its terms cannot just go on. Those of
        partitions that are being loaded can, if the next beat finds them: nothing was said in them.
        """
        if self._state.partitions and not self.in_time:
            log.warning("router.lease_overdue", partitions=sorted(self._state.partitions))
            self._end_owned("overdue")

    async def _beat(self) -> None:
        # Of what is being taken, too, before it is known to be: the answer may come late, and the lease runs meanwhile.
        terms = self._terms()
        asked = {number: take.term for number, take in self._takes.items() if take.is_loading}
        asked.update((number, partition.term) for number, partition in self._state.partitions.items())
        before = monotonic()
        failpoint("router.before_beat")
        held = await self._store.beat(terms)
        failpoint("router.after_beat")
        self._end_overdue()
        self._deadline = before + LEASE_S
        for number, term in asked.items():
            if number not in held:
                self._lease_gone(number, term)

    def _terms(self) -> list[UUID]:
        """Of all that is this router's, or about to be."""
        terms = {partition.term for partition in self._state.partitions.values()}
        return [*terms.union(take.term for take in self._takes.values())]

    def _lease_gone(self, number: int, term: UUID) -> None:
        partition, take = self._state.partitions.get(number), self._takes.get(number)
        if partition is not None and partition.term == term:
            self.end(partition, "lease_gone")
        elif take is not None and take.term == term:
            self._abandon(number, take, "lease_gone")

    async def _balance(self) -> None:
        leases, routers = await self._store.leases()
        now = monotonic()
        self._see(leases, routers | {self._router}, now)
        self._take_share(leases, now)
        await self._give_up(leases, now)

    def _see(self, leases: Sequence[LeaseRow], routers: frozenset[str], now: float) -> None:
        """Remembers since when each lease is unrenewed, and each router there."""
        if now - self._looked_at > _BLIND_S:
            self._seen.clear()
            self._routers.clear()
        self._looked_at = now
        self._routers = {router: self._routers.get(router, now) for router in routers}
        owners = {lease.partition: lease.owner for lease in leases}
        if owners != self._owners:
            self._owners, self._moved_at = owners, now
        for lease in leases:
            seen = self._seen.get(lease.partition)
            if seen is None or seen[0] != (lease.term, lease.mark):
                self._seen[lease.partition] = ((lease.term, lease.mark), now)

    def _take_share(self, leases: Sequence[LeaseRow], now: float) -> None:
        """Takes what is free, up to this router's share, in its own order: a few at once, then those behind them."""
        held = _held(leases, self._routers)
        self._share = shares(held, len(leases))[self._router]
        first = turn_of(self._router, held, len(leases))
        ours = self._state.partitions.keys() | self._takes.keys()
        in_order = [*leases[first:], *leases[:first]]
        free = [each for each in in_order if each.partition not in ours and self._free(each, now)]
        self._wanted = deque(sorted(free, key=lambda each: self._missed.get(each.partition, 0.0)))
        self._begin_takes()

    def _begin_takes(self) -> None:
        while self._wanted and len(self._takes) < TAKES_AT_ONCE and not self._releasing:
            if len(self._state.partitions.keys() | self._takes.keys()) >= self._share:
                return
            lease = self._wanted.popleft()
            take = self._takes[lease.partition] = _Take()
            take.task = asyncio.get_running_loop().create_task(self._take(lease, take))
            take.task.add_done_callback(partial(self._taken, lease.partition))

    def _taken(self, number: int, task: asyncio.Task[None]) -> None:
        del self._takes[number]
        if number in self._state.partitions:
            self._missed.pop(number, None)
        else:
            self._missed[number] = monotonic()
        self._count()
        if not task.cancelled() and task.exception() is not None:
            self._failed = task.exception()
            self._wanted.clear()
            self._news.set()
        self._begin_takes()

    async def _give_up(self, leases: Sequence[LeaseRow], now: float) -> None:
        """Lets one partition go if routers that are here to stay have fewer, nothing is on its way already, and no
        other router is to let one go before.
        """
        held = _held(leases, self._routers)
        if sum(held.values()) < len(leases):
            return
        settled = {r for r, since in self._routers.items() if now - since >= SETTLED_S} | {self._router}
        newcomers = sum(held.pop(router) for router in set(held) - settled)
        share = shares(held, len(leases) - newcomers)
        too_many = [router for router, count in held.items() if count > share[router]]
        if not too_many or now - self._moved_at < GIVE_UP_EVERY_S:
            return
        if min(too_many, key=lambda router: (share[router] - held[router], router)) != self._router:
            return
        # The one whose move costs the fewest turns a step; one that was just loaded would be loaded for nothing.
        settled_here = [each for number, each in self._state.partitions.items() if number not in self._takes]
        partition = min(settled_here, key=lambda each: each.running_turns, default=None)
        if partition is not None:
            log.info("router.rebalance", partition=partition.id, share=share[self._router], held=held)
            self.end(partition, "rebalance")
            await self._store.release([partition.term])

    def _free(self, lease: LeaseRow, now: float) -> bool:
        if lease.owner is None or lease.owner == self._router:
            return True
        return lease.expired and now - self._seen[lease.partition][1] >= LEASE_S

    async def _take(self, lease: LeaseRow, take: _Take) -> None:
        try:
            row = await self._acquire(lease, take)
            if row is None:
                return
            if self._releasing:
                await self._store.release([take.term])
                return
            take.is_loading = True
            self._count()
            await self._load(lease.partition, take, row)
        except FenceLost:
            log.info("router.load_abandoned", partition=lease.partition, cause="fenced")
        except StoreLost as error:
            self._store_lost(error)
        finally:
            take.is_loading = False

    async def _acquire(self, lease: LeaseRow, take: _Take) -> AcquiredRow | None:
        try:
            return await self._store.acquire(lease.partition, take.term, lease.term)
        except StoreLost:
            if lease.owner != self._router:  # perhaps this router is the former owner now
                self._owed_strikes[lease.partition] = self._strikes(lease.partition, lease.owner)
            raise

    def _strikes(self, number: int, former: str | None) -> bool:
        return former is not None and number not in self._held_before

    async def _load(self, number: int, take: _Take, row: AcquiredRow) -> None:
        """Reads what is pending in a partition whose lease was taken, and goes on with it. While it reads, beats keep
        the lease; whatever ends the term cancels this.
        """
        strike = self._strikes(number, row.former)
        if row.former == self._router:
            strike = self._owed_strikes.get(number, strike)
        self._owed_strikes[number] = strike
        cause = "free" if row.former is None else "own" if row.former == self._router else "takeover"
        began = monotonic()
        # The load comes after the term is in the row: what a former owner committed until then is seen, and nothing
        # comes after.
        found = Found()
        await self._store.load(number, take.term, strike, found.add)
        self._held_before.add(number)  # the strike is stored, whatever follows
        del self._owed_strikes[number]
        channels = await self._store.undelivered_channels(number)
        while not (self.in_time or take.lost or self._releasing):  # a stall: is the lease still there?
            async with self._looking:
                await self._beat_if_due()
        if take.lost or self._releasing:
            return
        take.is_loading = False
        partition = self._restore(number, take.term, row, found)
        self._state.partitions[number] = partition
        self._count()
        TAKEN.labels(cause).inc()
        log.info(
            "router.partition_taken", partition=number, epoch=row.epoch, cause=cause, former=row.former,
            pending=len(found.positions), load_s=round(monotonic() - began, 3),
        )  # fmt: skip
        # Before anything of it ends: what ends has its place behind what is undelivered.
        self._desk.adopt(partition, channels)
        for _ in restore_sessions(self._state, self._runner, partition, found):
            await asyncio.sleep(0)
        if not partition.lost:
            partition.restoring = False
            # In the same breath: the reader may be ahead of this partition's cursor, and what it reads next must not be
            # taken before it has gone back.
            self._lanes.attach(partition)

    def _restore(self, number: int, term: UUID, row: AcquiredRow, found: Found) -> Partition:
        partition = Partition(
            id=number,
            term=term,
            epoch=row.epoch,
            head=row.head,
            mail_head=row.mail_head,
            cursor=Cursor(row.cursor_stream, row.cursor_seq, row.cursor_batch),
            read_seq=row.cursor_seq,
            restoring=True,
        )
        partition.pending = Pending(found.positions)
        return partition

    def _abandon(self, number: int, take: _Take, cause: str) -> None:
        """The term of a partition that is being loaded has ended: nothing that was read of it is used."""
        log.info("router.load_abandoned", partition=number, cause=cause)
        take.lost = True
        take.task.cancel()

    async def _first_takes(self) -> None:
        """Waits until nothing is being taken, and no longer than `_FIRST_TAKES_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_TAKES_S):
                while self._takes:
                    tasks = [take.task for take in self._takes.values()]
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    async def _end_of_takes(self, timeout_s: float) -> None:
        """Waits for the takes that have begun, and no longer than this."""
        tasks = [take.task for take in self._takes.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    def _cancel_takes(self) -> None:
        self._wanted.clear()
        for take in self._takes.values():
            take.task.cancel()

    def _count(self) -> None:
        OWNED.set(len(self._state.partitions))
        LOADING.set(sum(take.is_loading for take in self._takes.values()))

    # ---- letting go

    def end(self, partition: Partition, cause: str) -> None:
        """Ends the term of one partition: nothing of it is written, sent or started any more."""
        if partition.lost:
            return
        log.info("router.partition_ended", partition=partition.id, epoch=partition.epoch, cause=cause)
        ENDED.labels(cause).inc()
        self._lanes.detach(partition)
        self._runner.end_terms(self._state.forget_partition(partition))
        self._desk.drop(partition)
        self._count()

    def end_fenced(self, numbers: frozenset[int]) -> None:
        """A commit found that these partitions are not ours."""
        for number in numbers:
            partition = self._state.partitions.get(number)
            if partition is not None:
                self.end(partition, "fenced")

    def end_all(self, cause: str) -> None:
        """The database connection is gone: every term ends, those of partitions that are being loaded too; they are
        taken again from what the store has.
        """
        self._end_owned(cause)
        for number, take in self._takes.items():
            if take.is_loading:
                self._abandon(number, take, cause)

    def _end_owned(self, cause: str) -> None:
        for partition in list(self._state.partitions.values()):
            self.end(partition, cause)

    async def release_all(self) -> None:
        """Shutdown: the others are told, and need not wait for the leases to run out."""
        self._releasing = True
        terms = self._terms()
        self.end_all("shutdown")
        try:
            await self._store.leave(terms)
            # A lease that was just being asked for may come after all: then it is freed by who asked.
            await self._end_of_takes(_LAST_TAKE_S)
        except StoreLost as error:
            log.warning("router.release_failed", error=str(error))
        else:
            log.info("router.partitions_released", partitions=len(terms))
        self._cancel_takes()


def _held(leases: Sequence[LeaseRow], routers: Collection[str]) -> dict[str, int]:
    """How many leases each of the routers has."""
    counted = Counter(lease.owner for lease in leases)
    return {router: counted[router] for router in routers}
