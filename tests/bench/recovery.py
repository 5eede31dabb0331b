"""How long conversations wait after a part was killed (kill -9, with all its processes) under a light load.

The stack is the one that a user starts, so it is its supervisor that notices the death and starts the part again. The
sessions talk one message at a time, with short pauses, and send again what was refused. Two times are taken from the
moment of the kill:

    next_answer_s   to the first answer to a message that was sent after the kill
    all_s           the longest that any session was without an answer, from the kill until all were answered again
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

from soma.common.v1.turn_pb2 import Delivery

from soma_common.client.channel_client import ChannelClient
from soma_common.testing.eventually import eventually
from tests.bench import processes
from tests.bench import stack as stacks
from tests.bench.cases import PARTS

SESSIONS: Final = 32
STREAMS: Final = 4
PAUSE_S: Final = 0.05
"""Mean pause of a session after an answer."""
ANSWERS_AFTER: Final = 3
"""Answers of each session that make a recovery complete."""
WITHIN_S: Final = 60.0


class Talk:
    """Conversations at an easy pace, whatever happens to the stack. An async context manager."""

    def __init__(self, stack: stacks.Stack, agent: str = "echo") -> None:
        self._stack, self._agent = stack, agent
        self._label = uuid.uuid4().hex[:8]
        self.answers: dict[str, list[tuple[float, float]]] = {f"{self._label}-{n}": [] for n in range(SESSIONS)}
        """By session: when each message was sent, when its answer came (monotonic)."""
        self._answered: dict[str, asyncio.Event] = {name: asyncio.Event() for name in self.answers}
        self._tasks: list[asyncio.Task[None]] = []
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        clients = [await self._exit.enter_async_context(self._client(number)) for number in range(STREAMS)]
        for number, session in enumerate(self.answers):
            self._tasks.append(asyncio.create_task(self._converse(clients[number % STREAMS], session)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._exit.aclose()

    async def flows(self, since: float) -> None:
        """Wait until each session has been answered some more times, with messages sent since then (monotonic)."""

        def all_answered() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()  # a conversation ends only by a failure
            return all(len(told) >= ANSWERS_AFTER and told[-ANSWERS_AFTER][0] > since for told in self.answers.values())

        await eventually(all_answered, WITHIN_S, "all sessions are answered again", interval_s=0.01)

    def _client(self, number: int) -> ChannelClient:
        return ChannelClient(
            self._stack.gateway,
            token=self._stack.token,
            tenant=stacks.TENANT,
            channel=f"{stacks.CHANNEL}-{self._label}-{number}",
            instance=f"talk-{self._label}-{number}",
            credit=256,
            on_delivery=self._delivered,
        )

    def _delivered(self, delivery: Delivery) -> None:
        self._answered[delivery.session].set()

    async def _converse(self, client: ChannelClient, session: str) -> None:
        answered = self._answered[session]
        while True:
            answered.clear()
            sent_at = monotonic()
            await client.send(self._agent, session, "are you there?", patience_s=WITHIN_S)
            await answered.wait()
            self.answers[session].append((sent_at, monotonic()))
            await asyncio.sleep(random.uniform(0.5, 1.5) * PAUSE_S)


async def measure(stack: stacks.Stack, rounds: int, every_s: float) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    """Kills each part in turn, so many rounds of it, at least `every_s` seconds apart.

    Yields when each began (monotonic) and its row: round, part, and the two times in seconds.
    """
    if not rounds:
        return
    async with Talk(stack) as talk:
        for number in range(rounds):
            for part in PARTS:
                began = monotonic()
                await talk.flows(began)
                killed_at = kill9(stack, part)
                await talk.flows(killed_at)
                await eventually(stack.look_again, WITHIN_S, "all parts are ready again")
                yield began, {"round": number + 1, "part": part, **times(talk.answers, killed_at)}
                await asyncio.sleep(max(0.0, began + every_s - monotonic()))


def kill9(stack: stacks.Stack, part: str) -> float:
    """Kills a part with all its processes; returns the moment (monotonic)."""
    members = processes.tree(stack.pids[part])
    killed_at = monotonic()
    for pid in members:
        os.kill(pid, signal.SIGKILL)
    return killed_at


def times(answers: dict[str, list[tuple[float, float]]], killed_at: float) -> dict[str, float]:
    """The two times of a recovery, in seconds, from when each session's messages were sent and answered."""
    first = min(came for told in answers.values() for sent, came in told if sent > killed_at)
    return {
        "next_answer_s": first - killed_at,
        "all_s": max(_longest_wait(told, killed_at) for told in answers.values()),
    }


def _longest_wait(told: list[tuple[float, float]], since: float) -> float:
    moments = [since, *(came for _, came in told if came > since)]
    return max(later - earlier for earlier, later in pairwise(moments))
