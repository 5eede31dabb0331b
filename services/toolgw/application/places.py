"""Places for requests that wait for calls begun before, and looks that they share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from services.toolgw.application.run_tool import Bounds
from services.toolgw.domain import refusals

T = TypeVar("T")


class WaitingPlaces:
    """Who waits, by tenant, within `bounds`."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._by_tenant: Counter[str] = Counter()

    @contextmanager
    def taken(self, tenant: str, key: str) -> Iterator[None]:
        """A place for as long as the block lasts.

        Raises:
            ResourceExhausted: QUEUE_FULL, all places of the tenant or of this process are taken.
        """
        if self._by_tenant[tenant] >= self._bounds.of_tenant:
            raise refusals.too_many_waiting(f"tenant {tenant}", self._bounds.of_tenant, key)
        if self._by_tenant.total() >= self._bounds.of_process:
            raise refusals.too_many_waiting("this instance", self._bounds.of_process, key)
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]


class Shared(Generic[T]):
    """Work that is done once for all who ask for it while it is under way."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[T]] = {}

    async def do(self, what: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The answer of `work`, begun now or by somebody before; raises what it raises. Whoever leaves stops it for
        nobody: it ends by itself."""
        task = self._tasks.get(what)
        # One that has ended is no answer to who asks now. It also gives that answer without a pause, and is not
        # forgotten before there is one: who asks again and again would freeze the process.
        if task is None or task.done():
            task = self._tasks[what] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._forget(what, done))
        return await asyncio.shield(task)

    def _forget(self, what: Hashable, done: asyncio.Task[T]) -> None:
        if self._tasks.get(what) is done:
            del self._tasks[what]
        if not done.cancelled():
            done.exception()  # Seen: whoever asked may have left.
