"""The undoing of turns as tasks of this process, whoever still waits for it.

Half a turn must not stay taken back. So what was begun belongs to the process and the store, not to the request: a
caller that leaves stops nothing, its retry joins what runs, and a process that dies leaves a row under its name, which
one that lives takes over.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol, TypeAlias, TypeVar

import structlog
from soma.common.v1.error_reason_pb2 import ErrorReason

from services.toolgw.application.run_tool import Bounds
from services.toolgw.domain import refusals
from services.toolgw.domain.reversal import StoppedTurn, Undoing
from soma_common.errors import ResourceExhausted, Unavailable

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 5.0
"""Pauses before a step is tried again for which there was no place, or no database."""

Reverting: TypeAlias = "asyncio.Task[Undoing | None]"
"""Returns what is stored at the end; None: it is another process's."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class ReversalClaims(Protocol):
    """Which process undoes a turn, durable. Every method raises Unavailable (STORE_UNAVAILABLE) when the database does
    not answer, and may be repeated."""

    async def claim_reversal(self, turn: StoppedTurn) -> bool:
        """Make this process the one that undoes `turn`; False: another one that lives does, or it is decided."""
        ...

    async def release_reversal(self, turn: StoppedTurn) -> None:
        """Say that this process no longer undoes `turn`."""
        ...

    async def left_reversals(self, bounds: Bounds) -> Sequence[StoppedTurn]:
        """Turns that were begun to be undone and that no living process undoes: the oldest of each tenant, within
        `bounds`."""
        ...


class ReversalRuns:
    """The turns that this process undoes, at most one task for each."""

    def __init__(self, claims: ReversalClaims, bounds: Bounds) -> None:
        self._claims = claims
        self._bounds = bounds
        self._tasks: dict[StoppedTurn, Reverting] = {}
        self._by_tenant: Counter[str] = Counter()
        self._draining = False

    def find(self, turn: StoppedTurn) -> Reverting | None:
        """The task that undoes `turn`, if this process does now."""
        return self._tasks.get(turn)

    def begin(self, turn: StoppedTurn, work: Callable[[], Awaitable[Undoing | None]]) -> Reverting:
        """Begin to claim `turn` and to do `work`, which is repeated from its start where it was held up.

        Raises:
            ResourceExhausted: QUEUE_FULL, as many as may be; nothing was begun.
            Unavailable: DRAINING.
        """
        if self._draining:
            raise refusals.draining()
        if len(self._tasks) >= self._bounds.of_process:
            raise _too_many("this instance", self._bounds.of_process)
        if self._by_tenant[turn.tenant] >= self._bounds.of_tenant:
            raise _too_many(f"tenant {turn.tenant}", self._bounds.of_tenant)
        task = asyncio.create_task(self._live(turn, work), name=f"revert {turn.turn_id}")
        self._tasks[turn] = task
        self._by_tenant[turn.tenant] += 1
        task.add_done_callback(lambda done: self._ended(turn, done))
        return task

    async def left_behind(self) -> Sequence[StoppedTurn]:
        """Turns that nobody undoes any more, as many as this process could take. Raises Unavailable."""
        return [turn for turn in await self._claims.left_reversals(self._bounds) if turn not in self._tasks]

    async def drain(self) -> None:
        """Begin nothing new and leave what runs to whoever finds it without a runner: a compensation that runs is a run
        of its own, and all else is in the store."""
        self._draining = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _live(self, turn: StoppedTurn, work: Callable[[], Awaitable[Undoing | None]]) -> Undoing | None:
        """One undoing from the claim to the stored end."""
        try:
            if not await self._until_done(turn, lambda: self._claims.claim_reversal(turn)):
                return None
            return await self._until_done(turn, work)
        except Exception:
            log.exception("toolgw.revert.broken", tenant=turn.tenant, turn=turn.turn_id)
            await self._until_done(turn, lambda: self._claims.release_reversal(turn))
            raise

    async def _until_done(self, turn: StoppedTurn, step: Callable[[], Awaitable[T]]) -> T:
        """The answer of `step`, tried again while the database is away or every place is taken."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await step()
            except (Unavailable, ResourceExhausted) as error:
                log.warning("toolgw.revert.waits", tenant=turn.tenant, turn=turn.turn_id, error=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _ended(self, turn: StoppedTurn, task: Reverting) -> None:
        del self._tasks[turn]
        self._by_tenant[turn.tenant] -= 1
        if not self._by_tenant[turn.tenant]:
            del self._by_tenant[turn.tenant]
        if not task.cancelled():
            task.exception()  # Marks it as seen: nobody may be waiting for it any more.


def _too_many(what: str, bound: int) -> ResourceExhausted:
    """As many turns as may be undone at once."""
    return ResourceExhausted(
        ErrorReason.ERROR_REASON_QUEUE_FULL,
        f"{bound} turns of {what} are being undone already: call again",
        metadata={"bound": str(bound), "scope": what},
        retry_delay_s=0.5,
    )
