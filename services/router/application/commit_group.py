"""Group commit: one writer, one connection, everything that has gathered in one call.

While a group is being written the next one gathers. A group is one transaction: the fence rows of all partitions in
it are moved first; if one of them is not ours any more, nothing is written, that partition is given up and the rest
is tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog
from soma.common.v1.error_reason_pb2 import ErrorReason

from services.router.application.group import CommitItem, FenceLost, Group, GroupRejected, GroupResult, StoreLost
from services.router.application.items import DeadItem, IngestItem
from services.router.application.ports import GroupWriter
from soma_common.gather import Gather
from soma_common.telemetry.metrics import SIZE_BUCKETS, counter, histogram

_GROUP_LIMIT: Final = 1024
_GROUP_WEIGHT: Final = 2048
"""Most rows a group asks answers about, unless a single item has more: the answer has to fit the connection's buffer.
The server waits with the transaction open for a client that does not read a longer one, so a frozen router would hold
its partitions' rows.
"""
_LINGER_S: Final = 0.001
_LINGER_AFTER: Final = 8
_LINGER_BELOW: Final = 24
"""Under load a little patience makes groups larger: transactions cost, items are nearly free. More of it costs sessions
that wait for an echo more than it saves.
"""
_LATER_S: Final = 0.05

log = structlog.get_logger(__name__)

GROUP_ITEMS = histogram("soma_router_group_items", "Items per group commit.", buckets=SIZE_BUCKETS)
GROUP_SECONDS = histogram("soma_router_group_seconds", "Duration of a group commit in seconds.")
FENCED = counter("soma_router_fenced_total", "Partitions found lost at a commit.")


class GroupCommitter:
    """Takes items from every use case and writes them in groups.

    `compose` is called with each group's items just before it is written and may add more: the scheduler starts turns
    there, so that a message and the start of its turn share a transaction. `on_sent` is called with them when they are
    on their way, again if they are sent again. `on_fenced` and `on_store_lost` end terms.
    """

    def __init__(
        self,
        writer: GroupWriter,
        compose: Callable[[list[CommitItem]], None],
        on_fenced: Callable[[frozenset[int]], None],
        on_store_lost: Callable[[], None],
        on_sent: Callable[[list[CommitItem]], None] = lambda _: None,
        bound: int = 200_000,
    ) -> None:
        self._writer = writer
        self._compose = compose
        self._on_fenced = on_fenced
        self._on_store_lost = on_store_lost
        self._on_sent = on_sent
        self._gather: Gather[CommitItem | None] = Gather(bound)
        self._nudged = False
        self._later: list[CommitItem] = []
        self._later_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._gather) + len(self._later)

    def put(self, item: CommitItem) -> None:
        """Has an item written with the next group; at once abandoned if its partition is lost already."""
        if item.partition.lost:
            item.abandoned()
            return
        self._gather.put(item)

    def put_later(self, item: CommitItem) -> None:
        """Has an item written with the next group that there is anyway, or after `_LATER_S`: nobody waits for it."""
        if item.partition.lost:
            item.abandoned()
            return
        if not self._later:
            self._later_timer = asyncio.get_running_loop().call_later(_LATER_S, self.nudge)
        self._later.append(item)

    def nudge(self) -> None:
        """Makes a group even if there is nothing but what `compose` adds."""
        if not self._nudged:
            self._nudged = True
            self._gather.put(None)

    async def run(self) -> None:
        """Writes groups until cancelled."""
        previous = 0
        while True:
            taken = await self._gather.take(_GROUP_LIMIT)
            if previous >= _LINGER_AFTER and len(taken) < _LINGER_BELOW:
                await asyncio.sleep(_LINGER_S)
                taken += self._gather.take_now(_GROUP_LIMIT)
            self._nudged = False
            items = [item for item in taken if item is not None]
            previous = len(items)
            if self._later:
                items += self._later
                self._later = []
                if self._later_timer is not None:
                    self._later_timer.cancel()
            for group in _cut(items):
                self._compose(group)
                if group:
                    GROUP_ITEMS.observe(len(group))
                    await self._write(group)

    async def _write(self, items: list[CommitItem]) -> None:
        """Writes items in one group; without those of partitions that turn out to be lost, until none is or all are."""
        while live := self._still_held(items):
            try:
                result = await self._try(live)
            except FenceLost as lost:
                FENCED.inc(len(lost.partitions))
                log.warning("router.fenced", partitions=sorted(lost.partitions))
                self._on_fenced(lost.partitions)
                items = live
                continue
            except GroupRejected as error:
                await self._isolate(live, error)
                return
            except StoreLost as error:
                log.warning("router.store_lost", error=str(error))
                self._on_store_lost()
                for item in live:
                    item.abandoned()
                return
            for item in live:
                # A term that ended while the group was written: it is in the store, and for the new owner to act on.
                if item.partition.lost:
                    item.abandoned()
                else:
                    item.committed(result)
            return

    def _still_held(self, items: list[CommitItem]) -> list[CommitItem]:
        """Items whose partition is ours; the others are abandoned."""
        live = []
        for item in items:
            if item.partition.lost:
                item.abandoned()
            else:
                live.append(item)
        return live

    async def _try(self, items: list[CommitItem]) -> GroupResult:
        group = Group()
        for item in items:
            item.write(group)
        # Called once the writer waits for the store: what is done meanwhile costs the group no time, and who dies of it
        # has nearly always told the store before.
        asyncio.get_running_loop().call_soon(self._on_sent, items)
        with GROUP_SECONDS.time():
            result = await self._writer.commit(group)
        group.settle()
        return result

    async def _isolate(self, items: list[CommitItem], error: GroupRejected) -> None:
        """The database refuses something in the group: finds the item, so that the others do not wait for it."""
        log.error("router.group_rejected", items=len(items), error=str(error))
        if len(items) > 1:
            for each in items:
                await self._write([each])
            return
        item = items[0]
        if isinstance(item, IngestItem) and item.entries:
            await self._set_aside(item, error)
            return
        self._on_fenced(frozenset({item.partition.id}))
        item.abandoned()

    async def _set_aside(self, item: IngestItem, error: GroupRejected) -> None:
        """Ingest is total: of what a lane message holds, what the database refuses becomes a dead letter. Were its
        term ended instead, the partition would read the same message again, for ever.
        """
        if item.cursor is not None or len(item.entries) > 1:
            for part in item.parts():
                await self._write([part])
            return
        entry = item.entries[0]
        refused = DeadItem(
            item.partition,
            entry.tenant,
            entry.message.message_id,
            ErrorReason.ERROR_REASON_ITEM_CORRUPT,
            str(error),
            entry.inbound.SerializeToString(),
        )
        item.abandoned()
        await self._write([refused])


def _cut(items: list[CommitItem]) -> list[list[CommitItem]]:
    """The items in groups that are not too heavy, in order; one empty group if there are none."""
    groups: list[list[CommitItem]] = [[]]
    weight = 0
    for item in items:
        more = len(item.entries) if isinstance(item, IngestItem) else 1
        if groups[-1] and weight + more > _GROUP_WEIGHT:
            groups.append([])
            weight = 0
        groups[-1].append(item)
        weight += more
    return groups
