"""Reads deliveries from the table into memory: page by page, as far as there is an adapter and room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from soma.common.v1.turn_pb2 import Delivery

from services.router.application.delivery_lines import Backlog, Channel, ChannelKey, Pending
from services.router.application.group import StoreLost

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Coroutine

    from services.router.application.ports import HistoryStore, StoredDelivery
    from services.router.application.state import RouterState
    from services.router.domain.delivery_room import DeliveryRoom
    from services.router.domain.partition import Partition

_PAGE: Final = 256
"""Most deliveries that are read at once."""
_PAGE_BYTES: Final = 2 * 1024 * 1024
"""What they are to have together, if they are like those that were seen of the backlog."""


class BacklogReader:
    """Pages that are being read, and the channels that wait for room to have one read.

    A page takes its place in memory before it is read, because many may be read at the same time.
    """

    def __init__(
        self,
        state: RouterState,
        history: HistoryStore,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        room: DeliveryRoom,
        served: Container[ChannelKey],
        append: Callable[[Pending], None],
    ) -> None:
        self._state = state
        self._history = history
        self._spawn = spawn
        self._room = room
        self._served = served
        """Channels with an adapter that takes deliveries."""
        self._append = append
        self._starved: dict[ChannelKey, Channel] = {}
        """Those that hold nothing and found no room, the first that came first: no acknowledgement of theirs will have
        their backlogs looked at.
        """

    def read(self, partition: Partition, channel: Channel, backlog: Backlog) -> bool:
        """Has the next deliveries of a backlog read, if there is an adapter and room. Returns whether they are."""
        if backlog.loading or channel.key not in self._served:
            return False
        most = min(_PAGE, max(_PAGE_BYTES // max(backlog.expected, 1), 1))
        limit = self._room.page(channel.share, backlog.expected, most)
        if not limit:
            if not channel.share.items:
                self._starved[channel.key] = channel
            return False
        backlog.loading = True
        size = limit * backlog.expected
        self._room.take(channel.share, limit, size)
        self._spawn(self._load(partition, channel, backlog, limit, size))
        return True

    def read_all(self, channel: Channel) -> None:
        """The same for each backlog of a channel."""
        if channel.key in self._served:
            for _ in range(len(channel.backlogs)):
                self._read_next(channel)

    def room_came(self, channel: Channel | None = None) -> None:
        """There may be room again: for some of those that wait for it, and then for the channel that gave it. Were that
        the first, those would wait until it has nothing left to be read.
        """
        while self._starved:
            starved = self._starved.pop(next(iter(self._starved)))
            if starved.backlogs and not self._read_next(starved):
                break
        if channel is not None and channel.backlogs:
            self._read_next(channel)

    def sweep(self) -> None:
        """Looks at all that wait for room, in their order."""
        for _ in range(len(self._starved)):
            self.room_came()

    def _read_next(self, channel: Channel) -> bool:
        """Has the backlog read whose turn it is."""
        partition_id = next(iter(channel.backlogs))
        backlog = channel.backlogs[partition_id] = channel.backlogs.pop(partition_id)
        partition = self._state.partitions.get(partition_id)
        return partition is not None and self.read(partition, channel, backlog)

    async def _load(self, partition: Partition, channel: Channel, backlog: Backlog, limit: int, size: int) -> None:
        grown = backlog.grown
        tenant, name = channel.key
        try:
            page = await self._history.deliveries(tenant, partition.id, name, backlog.after, limit)
        except StoreLost:
            return
        finally:
            backlog.loading = False
            self._room.give_back(channel.share, limit, size)
        if not partition.lost and channel.backlogs.get(partition.id) is backlog:
            fitted = self._keep(partition, channel, backlog, page)
            if fitted and len(page) < limit and backlog.grown == grown:
                del channel.backlogs[partition.id]
        self.room_came(channel)
        if not partition.lost and channel.backlogs.get(partition.id) is backlog:
            self.read(partition, channel, backlog)

    def _keep(self, partition: Partition, channel: Channel, backlog: Backlog, page: list[StoredDelivery]) -> bool:
        """Takes a page into memory as far as it fits. Returns whether all of it did."""
        backlog.seen([len(stored.payload) for stored in page])
        for stored in page:
            size = len(stored.payload)
            if not self._room.fits(channel.share, size):
                return False
            backlog.after = stored.position
            channel.paged[partition.id] = max(stored.position, channel.paged.get(partition.id, 0))
            delivery = Delivery.FromString(stored.payload)
            self._append(Pending(partition, stored.position, delivery, size, channel, stored.session_id))
        return True
