"""Group commit: one writer, one connection, everything that has gathered in one call.

While a group is being written the next one gathers, and what may be started of it is (`look_ahead`). A group is one
transaction: the fence rows of all partitions in it are moved first; if one of them is not ours any more, nothing is
written, that partition is given up and the rest is tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog
from soma.common.v1.error_reason_pb2 import ErrorReason

from services.router.application.group import (
    CommitItem,
    FenceLost,
    Group,
    GroupRejected,
    GroupResult,
    StoreLost,
    TurnConflict,
)
from services.router.application.items import DeadItem, IngestItem, StartItem
from services.router.application.outcomes import EndItem
from services.router.application.ports import GroupWriter
from soma_common.gather import Gather
from soma_common.telemetry.metrics import SIZE_BUCKETS, counter, histogram

_GROUP_LIMIT: Final = 1024
_GROUP_WEIGHT: Final = 2048
"""Most rows a group asks answers about, unless a single item has more: the answer has to fit the connection's buffer.
The server waits with the transaction open for a client that does not read a longer one, so a frozen router would hold
its partitions' rows.
"""
_LOOP_ROUNDS: Final = 2
"""What came while a group's items were told that it is durable is still in the sockets: it is read before the next
group is taken.
"""
_LATER_S: Final = 0.05

log = structlog.get_logger(__name__)

GROUP_ITEMS = histogram("soma_router_group_items", "Items per group commit.", buckets=SIZE_BUCKETS)
GROUP_SECONDS = histogram("soma_router_group_seconds", "Duration of a group commit in seconds.")
FENCED = counter("soma_router_fenced_total", "Partitions found lost at a commit.")


class GroupCommitter:
    """Takes items from every use case and writes them in groups.

    `compose` is called with each group's items just before it is written and may add more: the scheduler starts turns
    there, so that a message and the start of its turn share a transaction. `look_ahead` is called with messages that
    come while a group is written; what it starts is part of the next one. `on_sent` is called with a group's items when
    they are on their way, again if they are sent again. `on_fenced` and `on_store_lost` end terms.
    """

    def __init__(
        self,
        writer: GroupWriter,
        compose: Callable[[list[CommitItem]], None],
        on_fenced: Callable[[frozenset[int]], None],
        on_store_lost: Callable[[], None],
        on_sent: Callable[[list[CommitItem]], None] = lambda _: None,
        look_ahead: Callable[[list[IngestItem]], list[StartItem]] = lambda _: [],
        bound: int = 200_000,
    ) -> None:
        self._writer = writer
        self._compose = compose
        self._on_fenced = on_fenced
        self._on_store_lost = on_store_lost
        self._on_sent = on_sent
        self._look_ahead = look_ahead
        self._next_is_open = False
        """A group is written, and everything that is not in it has come since."""
        self._came: list[IngestItem] = []
        """Of that, what was not looked at."""
        self._came_weight = 0
        self._look_ahead_failed: Exception | None = None
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
        if self._next_is_open and isinstance(item, IngestItem):
            self._came.append(item)
            if len(self._came) == 1:
                asyncio.get_running_loop().call_soon(self._look_at_next)

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
        while True:
            for _ in range(_LOOP_ROUNDS):
                await asyncio.sleep(0)
            taken = await self._gather.take(_GROUP_LIMIT)
            all_taken = not self._gather
            self._nudged = False
            items = [item for item in taken if item is not None]
            if self._later:
                items += self._later
                self._later = []
                if self._later_timer is not None:
                    self._later_timer.cancel()
            groups = _cut(items)
            for group in groups:
                self._compose(group)
                if group:
                    GROUP_ITEMS.observe(len(group))
                    self._next_is_open = all_taken and len(groups) == 1
                    self._came_weight = 0
                    await self._write(group)
                    self._next_is_open = False
                    self._came.clear()
                    if self._look_ahead_failed is not None:
                        raise self._look_ahead_failed

    def _look_at_next(self) -> None:
        """Looks at what has come while a group is written. All of it is to fit the next group, with what it starts."""
        came, self._came = self._came, []
        if not came:
            return  # the group that they came behind is written
        self._came_weight += sum(len(item.entries) for item in came)
        if self._came_weight + len(self._gather) > _GROUP_LIMIT:
            self._next_is_open = False
        if not self._next_is_open:
            return
        try:
            for start in self._look_ahead(came):
                self._gather.put(start)
        except Exception as error:
            # Boundary: what was started is on no list. As when `compose` fails, the process is not to go on with it.
            log.exception("router.look_ahead_failed")
            self._look_ahead_failed = error

    async def _write(self, items: list[CommitItem]) -> None:
        """Writes items in one group; without those of partitions that turn out to be lost, until none is or all are."""
        while live := self._still_held(items):
            try:
                result = await self._try(live)
            except (FenceLost, GroupRejected) as refused:
                if isinstance(refused, (TurnConflict, GroupRejected)) and await self._without_ends(live):
                    return
                if isinstance(refused, GroupRejected):
                    await self._isolate(live, refused)
                    return
                FENCED.inc(len(refused.partitions))
                log.warning("router.fenced", partitions=sorted(refused.partitions))
                self._on_fenced(refused.partitions)
                items = live
                continue
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

    async def _without_ends(self, items: list[CommitItem]) -> bool:
        """A group was refused. It may be for the end of a turn that was to start in it, and does not as its message is
        a retry: so it is written without such ends, and then those whose turns have started. False if there are none.
        """
        ends: list[CommitItem] = []
        others: list[CommitItem] = []
        for item in items:
            if isinstance(item, EndItem) and item.with_start:
                item.with_start = False
                ends.append(item)
            else:
                others.append(item)
        if not ends:
            return False
        self._next_is_open = False
        log.info("router.ends_apart", ends=len(ends))
        await self._write(others)
        await self._write(ends)
        return True

    def _still_held(self, items: list[CommitItem]) -> list[CommitItem]:
        """Items whose partition is ours, and whose turn has started; the others are abandoned."""
        live = []
        for item in items:
            if item.partition.lost or (isinstance(item, EndItem) and item.void):
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
        self._next_is_open = False
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
        entry.message.fault = ErrorReason.ERROR_REASON_ITEM_CORRUPT  # another may get its place; its turn is none
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
