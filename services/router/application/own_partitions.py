"""Owns partitions: takes what is free or left behind, up to a fair share, and lets go when its time is over.

A router that stops frees its partitions and leaves in one statement, and the others are notified: they own them a few
milliseconds later. A router that joins gets its share slowly, and only once it has been there for a while: each move
costs the turns that run in the partition a step, and a router that keeps restarting is to cost nothing.

Leases say when to take over; what may be written is decided by the term in the partition's row alone, so nothing here
needs clocks to agree. A lease is taken over only when the database clock says it ran out *and* this router has itself
seen it unrenewed for a whole lease time: after a stall of the database nobody is robbed by whoever wakes first.
A router that did not renew in time by its own monotonic clock (it was frozen, or cut off) ends its terms by itself
before it says another word.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol
from uuid import UUID, uuid4

import structlog

from services.router.application.group import FenceLost, StoreLost
from services.router.application.restore_sessions import restore_sessions
from services.router.domain.partition import Cursor, Partition, Pending
from services.router.domain.spread import shares, turn_of
from soma_common.clock import monotonic
from soma_common.failpoints import failpoint
from soma_common.telemetry.metrics import counter, gauge

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from services.router.application.deliver_outcomes import DeliveryDesk
    from services.router.application.ports import AcquiredRow, LeaseRow, LeaseStore, PendingRow
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
_LAST_TAKE_S: Final = 1.0
"""How long the shutdown waits for a partition that is just being taken, to free that too."""

log = structlog.get_logger(__name__)

OWNED = gauge("soma_router_partitions_owned", "Partitions this router owns.")
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
        self._seen: dict[int, tuple[object, float]] = {}
        """The last renewal of each lease that was seen, and since when it has been the last."""
        self._routers: dict[str, float] = {}
        """The routers that live, and since when each has been seen without a break."""
        self._owners: dict[int, str | None] = {}
        self._moved_at = 0.0
        """When a partition was last seen with another owner than before."""
        self._releasing = False
        self._looking = asyncio.Lock()
        self._news = asyncio.Event()
        self.ready = asyncio.Event()
        """Set once this router has looked at the leases for the first time."""

    @property
    def in_time(self) -> bool:
        """Whether the lease was renewed recently enough that nobody else can have taken over: else say nothing."""
        return monotonic() < self._deadline

    async def run(self) -> None:
        """Beats and takes partitions until cancelled."""
        while True:
            self._news.clear()
            if not self._releasing:
                await self._look()
            self.ready.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._news.wait()

    def lease_freed(self) -> None:
        """Another router has let a lease go: looks at once."""
        self._news.set()

    async def _look(self) -> None:
        async with self._looking:
            try:
                await self._beat_if_due()
                await self._balance()
            except StoreLost as error:
                log.warning("router.lease_store_lost", error=str(error))

    async def _beat_if_due(self) -> None:
        self._end_overdue()
        now = monotonic()
        if now >= self._beat_at:
            await self._beat()
            self._beat_at = now + BEAT_S

    def _end_overdue(self) -> None:
        """What was said while this router was not in time was held back, so its terms cannot just go on."""
        if self._state.partitions and not self.in_time:
            log.warning("router.lease_overdue", partitions=sorted(self._state.partitions))
            self.end_all("overdue")

    async def _beat(self) -> None:
        terms = [partition.term for partition in self._state.partitions.values()]
        asked = set(self._state.partitions)
        before = monotonic()
        failpoint("router.before_beat")
        held = await self._store.beat(terms)
        failpoint("router.after_beat")
        self._end_overdue()
        self._deadline = before + LEASE_S
        for number in asked - held:
            partition = self._state.partitions.get(number)
            if partition is not None and partition.term in terms:
                self.end(partition, "lease_gone")

    async def _balance(self) -> None:
        leases, routers = await self._store.leases()
        now = monotonic()
        self._see(leases, routers | {self._router}, now)
        await self._take_share(leases, now)
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

    async def _take_share(self, leases: Sequence[LeaseRow], now: float) -> None:
        held = _held(leases, self._routers)
        share = shares(held, len(leases))[self._router]
        first = turn_of(self._router, held, len(leases))
        for lease in [*leases[first:], *leases[:first]]:
            if len(self._state.partitions) >= share or self._releasing:
                return
            if lease.partition not in self._state.partitions and self._free(lease, now):
                # A take-over may wait for a commit in flight: several must not cost this router its own leases.
                await self._beat_if_due()
                await self._take(lease)

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
        # The one whose move costs the fewest turns a step.
        partition = min(self._state.partitions.values(), key=lambda each: each.running_turns, default=None)
        if partition is not None:
            log.info("router.rebalance", partition=partition.id, share=share[self._router], held=held)
            self.end(partition, "rebalance")
            await self._store.release([partition.term])

    def _free(self, lease: LeaseRow, now: float) -> bool:
        if lease.owner is None or lease.owner == self._router:
            return True
        return lease.expired and now - self._seen[lease.partition][1] >= LEASE_S

    async def _take(self, lease: LeaseRow) -> None:
        term = uuid4()
        row = await self._store.acquire(lease.partition, term, lease.term)
        if row is None:
            return
        strike = row.former is not None and lease.partition not in self._held_before
        cause = "free" if row.former is None else "own" if row.former == self._router else "takeover"
        # The load comes after the term is in the row: what a former owner committed until then is seen, and nothing
        # comes after.
        try:
            pending = await self._store.load(lease.partition, term, strike)
            self._held_before.add(lease.partition)  # the strike is stored, whatever follows
            channels = await self._store.undelivered_channels(lease.partition)
        except FenceLost:
            return  # somebody else was faster in the meantime
        if self._releasing:
            await self._store.release([term])
            return
        partition = self._restore(lease.partition, term, row, pending)
        self._state.partitions[partition.id] = partition
        # In the same breath: the reader may be ahead of this partition's cursor, and what it reads next must not be
        # taken before it has gone back.
        self._lanes.attach(partition)
        OWNED.set(len(self._state.partitions))
        TAKEN.labels(cause).inc()
        log.info(
            "router.partition_taken", partition=partition.id, epoch=row.epoch, cause=cause, former=row.former,
            pending=len(pending),
        )  # fmt: skip
        restore_sessions(self._state, self._runner, partition, pending)
        self._desk.adopt(partition, channels)

    def _restore(self, number: int, term: UUID, row: AcquiredRow, pending: Sequence[PendingRow]) -> Partition:
        partition = Partition(
            id=number,
            term=term,
            epoch=row.epoch,
            head=row.head,
            mail_head=row.mail_head,
            cursor=Cursor(row.cursor_stream, row.cursor_seq, row.cursor_batch),
            read_seq=row.cursor_seq,
        )
        partition.pending = Pending(item.position for item in pending)
        return partition

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
        OWNED.set(len(self._state.partitions))

    def end_fenced(self, numbers: frozenset[int]) -> None:
        """A commit found that these partitions are not ours."""
        for number in numbers:
            partition = self._state.partitions.get(number)
            if partition is not None:
                self.end(partition, "fenced")

    def end_all(self, cause: str) -> None:
        """The database connection is gone, or the lease is overdue: every term ends; they are taken again from what
        the store has.
        """
        for partition in list(self._state.partitions.values()):
            self.end(partition, cause)

    async def release_all(self) -> None:
        """Shutdown: the others are told, and need not wait for the leases to run out."""
        self._releasing = True
        terms = [partition.term for partition in self._state.partitions.values()]
        self.end_all("shutdown")
        try:
            await self._store.leave(terms)
            async with asyncio.timeout(_LAST_TAKE_S), self._looking:
                pass
        except (StoreLost, TimeoutError) as error:
            log.warning("router.release_failed", error=str(error) or type(error).__name__)
        else:
            log.info("router.partitions_released", partitions=len(terms))


def _held(leases: Sequence[LeaseRow], routers: Collection[str]) -> dict[str, int]:
    """How many leases each of the routers has."""
    counted = Counter(lease.owner for lease in leases)
    return {router: counted[router] for router in routers}
