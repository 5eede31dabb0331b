"""What the gateway needs from the outside, named by need."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from soma.common.v1.message_pb2 import Error, SessionKey
from soma.common.v1.turn_pb2 import LiveEvent
from soma.router.v1.inbound_pb2 import Inbound
from soma.router.v1.outbound_pb2 import AckBatch, Presence

from soma_common.live_merge import Fate


class BusSilent(Exception):
    """The bus gave no answer in time: what was sent may or may not have happened."""


class LaneFull(Exception):
    """A bound of a lane is reached; nothing was stored."""

    def __init__(self, bound: str, value: int) -> None:
        super().__init__(f"{bound}={value}")
        self.bound = bound
        self.value = value


class BatchUnacceptable(Exception):
    """The bus can never take this batch; nothing was stored."""


class Directory(Protocol):
    """What is known of tenants and agents."""

    def check_tenant(self, tenant: str) -> None:
        """Raises Refused when the tenant is unknown or suspended, or when nothing is known yet."""

    def check_agent(self, tenant: str, agent: str) -> None:
        """Raises Refused when tenant or agent is unknown or suspended, or when nothing is known yet."""


class Lanes(Protocol):
    """The durable inbound lanes."""

    async def store(self, tenant: str, lane: int, batch_id: str, items: Sequence[Inbound], timeout_s: float) -> int:
        """Returns the batch's place in the lane when it is durable; places grow. Sent again with the same id within
        two minutes it is stored once.

        Raises:
            BusSilent: no answer; send again with the same id.
            LaneFull: not stored, in this try or an earlier one.
            BatchUnacceptable: not stored, and never will be.
        """


class Routers(Protocol):
    """The way to the routers, without guarantee: what is sent may get lost when the connection does."""

    @property
    def losses(self) -> int:
        """How often the connection was lost and made again."""

    async def send_acks(self, tenant: str, router: str, batch: AckBatch) -> None:
        """Tells a router what became of its deliveries. Raises BusSilent: it was not sent."""

    async def announce(self, tenant: str, presence: Presence) -> None:
        """Tells all routers which adapter streams of a tenant are here. Raises BusSilent: it was not sent."""


class Watches(Protocol):
    """Looking at running turns."""

    def watch(
        self, key: SessionKey, message_id: bytes, content_hash: bytes, lifetime_s: float
    ) -> AbstractAsyncContextManager[AsyncIterator[LiveEvent]]:
        """The events of the turn that answers a message, gap-free, last the one that says how it ended.

        `content_hash` tells the message from another one that was sent under its key. The message need not be stored
        yet. A message that goes over to another turn is followed there. Entering returns once the turn's owner knows
        of the interest, or a moment later, and raises ResourceExhausted at the tenant's bound. Iterating raises
        ResourceExhausted when the reader is too slow and Unauthenticated after `lifetime_s`.
        """

    async def fate(self, key: SessionKey, message_id: bytes, content_hash: bytes) -> Fate:
        """Waits until it is known what becomes of a stored message."""


class Sink(Protocol):
    """Who wants to know what became of an item."""

    def accepted(self, ref: int, message_id: bytes, size: int) -> None:
        """The item is durable. `size` is what the item counted for, in bytes."""

    def refused(self, ref: int, error: Error, size: int) -> None:
        """The item is not stored, or it is not known whether it is; the reason says which."""
