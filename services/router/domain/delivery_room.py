"""What deliveries that are not acknowledged may take of a router's memory, in items and in bytes.

What is full is never full for those that hold little: adapters that acknowledge nothing cost no other tenant its
deliveries, and a tenant's other channels neither. All of it together keeps within the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_ITEMS: Final = 20_000
"""Most deliveries in memory, over all tenants."""
MAX_BYTES: Final = 64 * 1024 * 1024
"""Most bytes of theirs, serialized."""
CHANNEL_ITEMS: Final = 4096
"""Most deliveries of one channel."""
TENANT_SHARES: Final = 64
"""A tenant that holds less than one in so many of the items or bytes finds room until the bound of all is reached."""
CHANNEL_SHARES: Final = 1024
"""A channel that holds less than one in so many finds room until three quarters of the bound of all are taken, or half
of it by its tenant. Others find room until half of it is taken, or a quarter by their tenant.
"""


@dataclass(slots=True, eq=False)
class TenantShare:
    """What a tenant holds."""

    tenant: str
    items: int = 0
    size: int = 0
    """Bytes."""
    channels: int = 0
    """How many of its channels have a share."""


@dataclass(slots=True, eq=False)
class ChannelShare:
    """What a channel holds, and what it has reserved for pages that are being read."""

    tenant: TenantShare
    items: int = 0
    size: int = 0
    """Bytes."""


class DeliveryRoom:
    """The bounds, and what is held within them."""

    def __init__(
        self, max_items: int = MAX_ITEMS, max_bytes: int = MAX_BYTES, channel_items: int = CHANNEL_ITEMS
    ) -> None:
        self.items = 0
        self.size = 0
        """Bytes."""
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._channel_items = channel_items
        self._tenants: dict[str, TenantShare] = {}

    def share(self, tenant: str) -> ChannelShare:
        """The share of one more channel."""
        of_tenant = self._tenants.get(tenant)
        if of_tenant is None:
            of_tenant = self._tenants[tenant] = TenantShare(tenant)
        of_tenant.channels += 1
        return ChannelShare(of_tenant)

    def end(self, share: ChannelShare) -> None:
        """The channel holds nothing, and its share is not used any more."""
        share.tenant.channels -= 1
        if not share.tenant.channels:
            del self._tenants[share.tenant.tenant]

    def take(self, share: ChannelShare, items: int, size: int) -> None:
        """The channel holds so much more."""
        tenant = share.tenant
        share.items += items
        share.size += size
        tenant.items += items
        tenant.size += size
        self.items += items
        self.size += size

    def give_back(self, share: ChannelShare, items: int, size: int) -> None:
        """The channel holds so much less."""
        tenant = share.tenant
        share.items -= items
        share.size -= size
        tenant.items -= items
        tenant.size -= size
        self.items -= items
        self.size -= size

    def fits(self, share: ChannelShare, size: int) -> bool:
        """Whether the channel may hold one more delivery, of `size` bytes."""
        tenant = share.tenant
        if (
            self.items < self._max_items // 2
            and tenant.items < self._max_items // 4
            and share.items < self._channel_items
            and self.size + size <= self._max_bytes // 2
            and tenant.size + size <= self._max_bytes // 4
        ):
            return True  # nearly always, and asked for each delivery
        if self._free_items(share) >= 1 and self._free_bytes(share) >= size:
            return True
        # Who holds nothing gets one, however large: it would wait for ever for a share that it fits into.
        if not self.items:
            return True
        items, more = self.items + 1, self.size + size
        if not tenant.items:
            return items <= self._max_items and more <= self._max_bytes
        return not share.items and (
            4 * items <= 3 * self._max_items
            and 4 * more <= 3 * self._max_bytes
            and 2 * (tenant.items + 1) <= self._max_items
            and 2 * (tenant.size + size) <= self._max_bytes
        )

    def page(self, share: ChannelShare, each: int, most: int) -> int:
        """How many deliveries of `each` bytes the channel may have read, up to `most`; 0: it is to wait, until there is
        room for all of them or for a quarter of what it holds, so that not every acknowledgement is followed by a read.
        """
        fitting = min(most, self._free_items(share), self._free_bytes(share) // max(each, 1))
        if fitting < 1:
            fitting = int(self.fits(share, each))
        return fitting if fitting >= min(most, 1 + share.items // 4) else 0

    def _free_items(self, share: ChannelShare) -> int:
        free = _free(self._max_items, self.items, share.tenant.items, share.items)
        return min(free, self._channel_items - share.items)

    def _free_bytes(self, share: ChannelShare) -> int:
        return _free(self._max_bytes, self.size, share.tenant.size, share.size)


def _free(bound: int, of_all: int, of_tenant: int, of_channel: int) -> int:
    """How much more a channel may take of what is bounded; less than 1: nothing."""
    return max(
        min(bound // 2 - of_all, bound // 4 - of_tenant),
        min(bound * 3 // 4 - of_all, bound // 2 - of_tenant, bound // CHANNEL_SHARES - of_channel),
        min(bound - of_all, bound // TENANT_SHARES - of_tenant),
    )
