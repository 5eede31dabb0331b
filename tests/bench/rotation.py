"""A load that takes turns: so many turns in flight, and each goes to the next session of a rotation.

With as many sessions as turns in flight this is the closed loop of `load.py`; with more of them every session is idle
between two turns, so that many sessions or tenants are in play while the load on the stack stays the same.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Self

from soma.common.v1.message_pb2 import Error, Message, Part, Role
from soma.common.v1.turn_pb2 import Delivery, Outcome
from soma.gateway.v1.channel_service_pb2 import InboundMessage

from soma_common.client.channel_client import ChannelClient
from tests.bench.load import percentile

_TEXT = "x" * 256
_DRAIN_S = 30.0
_TICK_S = 0.005


@dataclass(frozen=True, slots=True)
class Line:
    """An adapter stream: whose it is, and on which channel."""

    tenant: str
    token: str
    channel: str


@dataclass(slots=True)
class Seen:
    """What was seen in a stretch of time. Times in seconds."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """From handing the message to the client kit to the outcome in the callback."""
    accepts: list[float] = field(default_factory=list)
    errors: int = 0

    @property
    def turns(self) -> int:
        """Turns that ended."""
        return len(self.latencies)

    @property
    def rate(self) -> float:
        """Turns per second."""
        return self.turns / self.seconds if self.seconds else 0.0

    def row(self) -> dict[str, float]:
        """For tables and JSON; latencies in milliseconds."""
        return {
            "turns": self.turns,
            "seconds": self.seconds,
            "turns_per_s": self.rate,
            "p50_ms": percentile(self.latencies, 50),
            "p99_ms": percentile(self.latencies, 99),
            "accept_p50_ms": percentile(self.accepts, 50),
            "accept_p99_ms": percentile(self.accepts, 99),
            "errors": self.errors,
        }


class Rotation:
    """Runs from entering to leaving the block. `sessions` are (number of the line, name); none may be there twice.

    `again` puts a session behind the others when its turn has ended; otherwise the load ends with the sessions. After
    `life` turns of a session a new one takes its place; 0: sessions are for ever. `rate` bounds the turns per second;
    0: as fast as they are answered.
    """

    def __init__(
        self,
        gateway: str,
        agent: str,
        lines: Sequence[Line],
        sessions: Iterable[tuple[int, str]],
        in_flight: int,
        *,
        again: bool = True,
        life: int = 0,
        rate: float = 0.0,
    ) -> None:
        self._gateway, self._agent, self._lines = gateway, agent, lines
        self._waiting = deque(sessions)
        self._in_flight, self._again, self._life, self._rate = in_flight, again, life, rate
        self._lived: Counter[tuple[int, str]] = Counter()
        self._sent_at: dict[tuple[int, str], float] = {}
        self._sent = self._held_back = 0
        self._began = 0.0
        self._stopping = False
        self._clients: list[ChannelClient] = []
        self._open = AsyncExitStack()
        self._pacer: asyncio.Task[None] | None = None
        self.seen = Seen()
        self.ended = 0
        """Turns since the beginning."""

    async def __aenter__(self) -> Self:
        label = uuid.uuid4().hex[:8]
        for number, line in enumerate(self._lines):
            client = ChannelClient(
                self._gateway,
                token=line.token,
                tenant=line.tenant,
                channel=line.channel,
                instance=f"rotation-{label}-{number}",
                live=False,
                credit=1024,
                on_delivery=partial(self._delivered, number),
            )
            self._clients.append(await self._open.enter_async_context(client))
        self._began = monotonic()
        if self._rate:
            self._pacer = asyncio.create_task(self._pace())
        for _ in range(self._in_flight):
            self._send_next()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        if self._pacer is not None:
            self._pacer.cancel()
        await self.drained()
        await self._open.aclose()

    async def measure(self, seconds: float) -> Seen:
        """What is seen from now on, for so long."""
        self.seen, began = Seen(), monotonic()
        await asyncio.sleep(seconds)
        seen, self.seen = self.seen, Seen()
        seen.seconds = monotonic() - began
        return seen

    async def drained(self) -> None:
        """All sent messages are answered. Raises TimeoutError."""
        until = monotonic() + _DRAIN_S
        while self._sent_at:
            if monotonic() > until:
                raise TimeoutError(f"{len(self._sent_at)} messages are without an answer")
            await asyncio.sleep(_TICK_S)

    @property
    def over(self) -> bool:
        """Every session had its turn; only without `again`."""
        return not self._waiting and not self._sent_at

    async def _pace(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            while self._held_back and self._is_due():
                self._held_back -= 1
                self._send_next()

    def _is_due(self) -> bool:
        return not self._rate or self._sent < (monotonic() - self._began) * self._rate

    def _send_next(self) -> None:
        if not self._is_due():
            self._held_back += 1
            return
        if not self._waiting:
            return
        number, session = place = self._waiting.popleft()
        self._sent += 1
        self._sent_at[place] = monotonic()
        item = InboundMessage(
            agent=self._agent,
            session=session,
            idempotency_key=uuid.uuid4().hex,
            message=Message(role=Role.ROLE_USER, parts=[Part(text=_TEXT)]),
        )
        self._clients[number].post(item, partial(self._answered, place))

    def _answered(self, place: tuple[int, str], _: bytes, error: Error | None) -> None:
        if error is None:
            self.seen.accepts.append(monotonic() - self._sent_at.get(place, monotonic()))
        else:
            self.seen.errors += 1
            self._over(place)

    def _delivered(self, number: int, delivery: Delivery) -> None:
        place = (number, delivery.session)
        sent_at = self._sent_at.get(place)
        if sent_at is None:
            return
        self.seen.latencies.append(monotonic() - sent_at)
        self.seen.errors += delivery.outcome != Outcome.OUTCOME_FINAL
        self.ended += 1
        self._over(place)

    def _over(self, place: tuple[int, str]) -> None:
        del self._sent_at[place]
        if self._again:
            self._waiting.append(self._next_of(place))
        if not self._stopping:
            self._send_next()

    def _next_of(self, place: tuple[int, str]) -> tuple[int, str]:
        """Whose turn comes after that of a session: its own, until it has had all of them."""
        if not self._life:
            return place
        self._lived[place] += 1
        if self._lived[place] < self._life:
            return place
        del self._lived[place]
        return place[0], uuid.uuid4().hex
