"""The load: closed-loop sessions over a number of adapter streams, through the client kit's callback mode.

Each session sends a message, waits for the outcome of its turn, and sends the next: C sessions keep C turns in flight.
"""

from __future__ import annotations

import asyncio
import gc
import uuid
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from statistics import quantiles
from time import monotonic, monotonic_ns

from soma.common.v1.message_pb2 import Error, Message, Part, Role
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome
from soma.gateway.v1.channel_service_pb2 import InboundMessage

from soma_common.client.channel_client import ChannelClient
from tests.bench import stack as stacks

_TEXT = "x" * 256
LAST_ANSWERS_S = 30.0
"""What the turns that run at the end get to be answered; those that are not are errors."""
QUANTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99)
"""Percents that describe a distribution well enough to draw it."""


@dataclass(slots=True)
class Result:
    """What one run saw. Times in seconds."""

    sessions: int
    streams: int
    seconds: float = 0.0
    turns: int = 0
    errors: int = 0
    latencies: list[float] = field(default_factory=list)
    accepts: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Turns per second."""
        return self.turns / self.seconds if self.seconds else 0.0


def percentile(values: list[float], percent: int) -> float:
    """A percentile in milliseconds; 0 of nothing."""
    if len(values) < 2:
        return values[0] * 1000 if values else 0.0
    return quantiles(values, n=100, method="inclusive")[percent - 1] * 1000


def distribution(values: list[float]) -> list[float]:
    """The percentiles `QUANTILES`, in milliseconds; nothing of nothing."""
    if len(values) < 2:
        return []
    cuts = quantiles(values, n=100, method="inclusive")
    return [cuts[percent - 1] * 1000 for percent in QUANTILES]


class _Session:
    """One session of the loop."""

    __slots__ = ("agent", "client", "name", "run", "sent_at")

    def __init__(self, client: ChannelClient, agent: str, name: str, run: _Run) -> None:
        self.client, self.agent, self.name, self.run = client, agent, name, run
        self.sent_at = 0.0

    def send(self) -> None:
        item = InboundMessage(
            agent=self.agent,
            session=self.name,
            idempotency_key=uuid.uuid4().hex,
            message=Message(role=Role.ROLE_USER, parts=[Part(text=_TEXT)]),
        )
        self.sent_at = monotonic()
        self.client.post(item, self.answered)

    def answered(self, message_id: bytes, error: Error | None) -> None:
        if error is not None:
            self.run.result.errors += 1
            self.run.left -= 1
        elif self.run.measuring:
            self.run.result.accepts.append(monotonic() - self.sent_at)

    def delivered(self, delivery: Delivery) -> None:
        if self.run.measuring:
            self.run.result.turns += 1
            self.run.result.latencies.append(monotonic() - self.sent_at)
            self.run.result.errors += delivery.outcome != Outcome.OUTCOME_FINAL
        if not self.run.stopping:
            self.send()
        else:
            self.run.left -= 1


class _Run:
    """The state that all sessions of a run share."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.measuring = False
        self.stopping = False
        self.left = result.sessions
        self.by_name: dict[str, _Session] = {}

    def on_delivery(self, delivery: Delivery) -> None:
        session = self.by_name.get(delivery.session)
        if session is not None:
            session.delivered(delivery)

    def on_live(self, event: LiveEvent) -> None:
        now = monotonic_ns()
        if self.measuring and event.HasField("text"):
            self.result.tokens += [(now - int(word)) / 1e9 for word in event.text.text.split()]


async def turns(
    stack: stacks.Stack,
    agent: str,
    sessions: int,
    streams: int,
    seconds: float,
    *,
    live: bool = False,
    warm_s: float = 1.0,
    spread_s: float = 0.0,
    window: AbstractContextManager[object] | None = None,
    kind: type[ChannelClient] | None = None,
) -> Result:
    """Runs `sessions` closed loops over `streams` adapter streams for `seconds`, after a warm-up.

    The sessions send their first messages one after the other within `spread_s`, which is part of the warm-up.
    `window` is entered when the measured time begins and left when it ends: whoever looks at CPU looks at that time.
    `kind` is the class of the clients, if it is not the product's.
    """
    result = Result(sessions, streams)
    run = _Run(result)
    label = uuid.uuid4().hex[:8]
    async with AsyncExitStack() as open_clients:
        clients = [
            await open_clients.enter_async_context(
                (kind or ChannelClient)(
                    stack.gateway,
                    token=stack.token,
                    tenant=stacks.TENANT,
                    channel=f"{stacks.CHANNEL}-{label}-{number}",
                    instance=f"load-{label}-{number}",
                    live=live,
                    credit=1024,
                    on_delivery=run.on_delivery,
                    on_live=run.on_live if live else None,
                )
            )
            for number in range(streams)
        ]
        # As every service does once it is ready, and an adapter that lives for long should: what exists now stays.
        gc.collect()
        gc.freeze()
        began_at = monotonic()
        for number in range(sessions):
            session = _Session(clients[number % streams], agent, f"{label}-{number}", run)
            run.by_name[session.name] = session
            session.send()
            if spread_s:
                await asyncio.sleep(max(0.0, began_at + spread_s * (number + 1) / sessions - monotonic()))
        await asyncio.sleep(max(0.0, began_at + warm_s - monotonic()))
        with window or nullcontext():
            run.measuring, began = True, monotonic()
            await asyncio.sleep(seconds)
            run.measuring, result.seconds = False, monotonic() - began
        run.stopping = True
        deadline = monotonic() + LAST_ANSWERS_S
        while run.left > 0 and monotonic() < deadline:
            await asyncio.sleep(0.02)
        result.errors += run.left
        gc.unfreeze()
    return result
