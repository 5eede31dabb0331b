"""`make bench ARGS=frozen`: the brain stands still while messages keep coming; nobody's memory may grow with them.

The bounds on waiting messages are set above what is sent, the only brain is stopped (SIGSTOP), and all messages are
sent over a few adapter streams. The memory of every process is sampled on the way. Then the brain goes on, and every
message has to be answered once, in the order its session sent it.

Memory is the proportional set size without shared memory: PostgreSQL's buffers are a cache of a fixed size, which any
load fills.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import linear_regression
from time import monotonic
from typing import Final

import uvloop
from soma.common.v1.message_pb2 import Error, Message, Part, Role
from soma.common.v1.turn_pb2 import Delivery, Outcome
from soma.gateway.v1.channel_service_pb2 import InboundMessage

from soma_common.client.channel_client import ChannelClient
from tests.bench import processes
from tests.chaos.stack import ECHO, FaultyStack, faulty_stack

TENANT: Final = "demo"
MIB: Final = 1024 * 1024
MOST_SLOPE: Final = 5 * MIB
"""Bytes that a process may grow by per 10 000 waiting messages."""
UNANSWERED: Final = 1024
"""Messages of a stream that may be without receipt: below what the gateway allows."""
ABOVE: Final = str(10_000_000)
UNBOUNDED: Final = {
    "gateway": {"SOMA_MAX_QUEUED_PER_SESSION": ABOVE, "SOMA_MAX_QUEUED_PER_TENANT": ABOVE},
    "router": {"SOMA_MAX_QUEUED_PER_SESSION": ABOVE, "SOMA_MAX_QUEUED_PER_TENANT": ABOVE},
}
"""The stack's environment: bounds that are not reached."""


@dataclass(frozen=True)
class Plan:
    """How much is sent. Memory is judged from `settled` accepted messages on."""

    messages: int = 100_000
    sessions: int = 2000
    streams: int = 4
    text_bytes: int = 256
    settled: int = 20_000
    every: int = 2000
    """Messages between two samples."""
    patience_s: float = 1800.0


@dataclass
class Seen:
    """What happened. Times in seconds, memory in bytes."""

    accepted: int = 0
    refused: list[Error] = field(default_factory=list)
    accept_s: float = 0.0
    answer_s: float = 0.0
    samples: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    """By process: (messages accepted, bytes)."""
    shared_mb: float = 0.0
    faults: list[str] = field(default_factory=list)
    """What was not as promised."""

    def slope(self, process: str, settled: int) -> float:
        """Growth of a process in bytes per 10 000 messages, from `settled` messages on."""
        taken = [(count, size) for count, size in self.samples[process] if count >= settled]
        if len(taken) < 3:
            return 0.0
        return linear_regression([c for c, _ in taken], [s for _, s in taken]).slope * 10_000


class _Conversations:
    """All sessions of the run: what was sent of each, and what came back."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.sent: dict[str, deque[bytes]] = defaultdict(deque)
        """Ids of the accepted messages that are not answered, in order."""
        self.positions: dict[str, int] = defaultdict(int)
        self.answered = 0

    def accepted(self, session: str, message_id: bytes, error: Error | None) -> None:
        if error is not None:
            self.seen.refused.append(error)
            return
        self.seen.accepted += 1
        self.sent[session].append(message_id)

    def delivered(self, delivery: Delivery) -> None:
        faults, session = self.seen.faults, delivery.session
        if delivery.outcome != Outcome.OUTCOME_FINAL:
            faults.append(f"{session}: {Outcome.Name(delivery.outcome)} {delivery.error.message}")
        if delivery.position != self.positions[session] + 1:
            faults.append(f"{session}: delivery {delivery.position} after {self.positions[session]}")
        self.positions[session] = delivery.position
        for message_id in delivery.message_ids:
            if not self.sent[session] or self.sent[session].popleft() != message_id:
                faults.append(f"{session}: answered out of order, or twice")
            self.answered += 1


async def run(stack: FaultyStack, plan: Plan, say: Callable[[str], None]) -> Seen:
    """Freezes the brain, sends, thaws, waits for the answers. `say` is told how it goes."""
    seen = Seen()
    talk = _Conversations(seen)
    async with AsyncExitStack() as open_clients:
        clients = [
            await open_clients.enter_async_context(
                ChannelClient(
                    stack.gateways,
                    token=stack.token(TENANT),
                    tenant=TENANT,
                    channel=f"frozen-{number}",
                    instance=f"frozen-{number}",
                    credit=512,
                    on_delivery=talk.delivered,
                )
            )
            for number in range(plan.streams)
        ]
        stack.freeze("cognition-0")
        try:
            began = monotonic()
            await _send_all(clients, talk, stack, plan, say)
            seen.accept_s = monotonic() - began
        finally:
            stack.thaw("cognition-0")
        say(f"{seen.accepted} accepted and taken in in {seen.accept_s:.1f} s; the brain goes on")
        for name in stack.parts:
            first, last = seen.samples[name][0][1], seen.samples[name][-1][1]
            slope = seen.slope(name, plan.settled)
            say(
                f"  {name}: {first / MIB:.0f} -> {last / MIB:.0f} MiB,"
                f" {slope / MIB:+.2f} MiB per 10 000 messages{'' if slope < MOST_SLOPE else ': TOO MUCH'}"
            )
        say(f"  PostgreSQL's shared memory, not counted: {seen.shared_mb:.0f} MiB")
        began = monotonic()
        await _until_answered(talk, plan, say)
        seen.answer_s = monotonic() - began
    left = sum(len(ids) for ids in talk.sent.values())
    if left:
        seen.faults.append(f"{left} accepted messages are not answered")
    return seen


async def _send_all(
    clients: list[ChannelClient], talk: _Conversations, stack: FaultyStack, plan: Plan, say: Callable[[str], None]
) -> None:
    text = "x" * plan.text_bytes
    names = [f"s{number}" for number in range(plan.sessions)]
    next_sample = 0

    def answer_of(session: str) -> Callable[[bytes, Error | None], None]:
        return lambda message_id, error: talk.accepted(session, message_id, error)

    for number in range(plan.messages):
        session = names[number % plan.sessions]
        client = clients[number % plan.sessions % plan.streams]
        while client.unanswered >= UNANSWERED:
            await asyncio.sleep(0.005)
        item = InboundMessage(
            agent=ECHO,
            session=session,
            idempotency_key=uuid.uuid4().hex,
            message=Message(role=Role.ROLE_USER, parts=[Part(text=text)]),
        )
        client.post(item, answer_of(session))
        if talk.seen.accepted >= next_sample:
            await _until_ingested(stack, talk.seen)
            _sample(stack, talk.seen)
            next_sample = talk.seen.accepted + plan.every
            if next_sample % (10 * plan.every) < plan.every:
                say(f"{talk.seen.accepted} accepted")
    while any(client.unanswered for client in clients):
        await asyncio.sleep(0.01)
    await _until_ingested(stack, talk.seen)
    _sample(stack, talk.seen)


async def _until_ingested(stack: FaultyStack, seen: Seen) -> None:
    """Accepting is faster than taking into the mailbox: what is measured is what waits there."""
    while (await stack.metrics("router-0"))["soma_router_messages_total"] < seen.accepted:
        await asyncio.sleep(0.05)


async def _until_answered(talk: _Conversations, plan: Plan, say: Callable[[str], None]) -> None:
    deadline = monotonic() + plan.patience_s
    told = 0
    while talk.answered < talk.seen.accepted and monotonic() < deadline:
        await asyncio.sleep(0.1)
        if talk.answered >= told + 10 * plan.every:
            told = talk.answered
            say(f"{told} answered")


def _sample(stack: FaultyStack, seen: Seen) -> None:
    for name in stack.parts:
        own, shared = processes.memory(stack.process(name).pid)
        seen.samples[name].append((seen.accepted, own))
        if name == "postgres":
            seen.shared_mb = shared / MIB


def growth(seen: Seen, process: str, settled: int) -> float:
    """Bytes that a process has grown by since `settled` messages, at its largest."""
    taken = [size for count, size in seen.samples[process] if count >= settled]
    return max((later - taken[0] for _, later in pairwise(taken)), default=0.0)


def main(arguments: list[str], say: Callable[[str], None]) -> bool:
    """Runs the benchmark with a command's arguments; returns whether the promises hold."""
    parser = argparse.ArgumentParser(prog="tests.bench frozen", description=__doc__)
    parser.add_argument("--messages", type=int, default=Plan.messages)
    parser.add_argument("--sessions", type=int, default=Plan.sessions)
    parser.add_argument("--text-bytes", type=int, default=Plan.text_bytes)
    chosen = parser.parse_args(arguments)
    return uvloop.run(_measure(Plan(chosen.messages, chosen.sessions, text_bytes=chosen.text_bytes), say))


async def _measure(plan: Plan, say: Callable[[str], None]) -> bool:
    async with faulty_stack(environment=UNBOUNDED) as stack:
        seen = await run(stack, plan, say)
        say(f"{seen.accepted} accepted in {seen.accept_s:.1f} s, answered in {seen.answer_s:.1f} s")
        holds = seen.accepted == plan.messages and not seen.faults and not stack.deaths
        holds = holds and all(seen.slope(name, plan.settled) < MOST_SLOPE for name in stack.parts)
        for fault in [*seen.faults[:10], *stack.deaths]:
            say(f"  {fault}")
    say("HOLDS" if holds else "DOES NOT HOLD")
    return holds
