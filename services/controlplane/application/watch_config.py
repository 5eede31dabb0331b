"""WatchConfig: first a complete copy of the configuration, then every change, in order, and heartbeats in between.

`Watchers` hands each change to everybody who watches. Each watcher has a bounded list of its own: one that reads too
slowly is ended, never waited for. A watcher is enrolled before its copy is read, so no change falls between the two;
what the copy holds already is dropped by its version.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Final

from soma.controlplane.v1.config_service_pb2 import WatchConfigRequest, WatchConfigResponse

from services.controlplane.application.ports import ConfigPart, SnapshotSource
from services.controlplane.domain.refusals import too_many_watchers, watcher_too_slow
from soma_common.errors import SomaError
from soma_common.gather import Gather, GatherClosed, GatherFull

HEARTBEAT_S: Final = 2.0
"""Longest silence on a watch; a watcher that hears nothing for a few of these knows that the control plane is gone."""
MAX_CHANGES_BEHIND: Final = 256
"""Changes held for one watcher."""
MAX_WATCHERS: Final = 1000


class _Watcher:
    """One enrolled watcher: the changes it has not taken yet, and why it was ended."""

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.changes: Gather[ConfigPart] = Gather(MAX_CHANGES_BEHIND)
        self.ended: SomaError | None = None

    def end(self, reason: SomaError) -> None:
        """Let go of what it has not taken; the watch fails with `reason`."""
        self.ended = reason
        self.changes.take_now(MAX_CHANGES_BEHIND)
        self.changes.close()


class Watchers:
    """Everybody who watches the configuration at this instance."""

    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()
        self._closed: SomaError | None = None

    def __len__(self) -> int:
        return len(self._watchers)

    def publish(self, change: ConfigPart) -> None:
        """Hand `change` to every watcher; those that are too far behind are ended with QUEUE_FULL."""
        for watcher in list(self._watchers):
            try:
                watcher.changes.put(change)
            except GatherFull:
                self._end(watcher, watcher_too_slow(watcher.instance, MAX_CHANGES_BEHIND))

    def end_all(self, reason: SomaError) -> None:
        """End every watch with `reason`: they watch again and get a complete copy."""
        for watcher in list(self._watchers):
            self._end(watcher, reason)

    def close(self, reason: SomaError) -> None:
        """End every watch with `reason`, and refuse new ones with it."""
        self._closed = reason
        self.end_all(reason)

    @contextmanager
    def enrolled(self, instance: str) -> Iterator[_Watcher]:
        """A watcher that gets every change published inside the block.

        Raises:
            ResourceExhausted: this instance has as many watchers as it serves.
            SomaError: `close` was called, with its reason.
        """
        if self._closed is not None:
            raise self._closed
        if len(self._watchers) >= MAX_WATCHERS:
            raise too_many_watchers(MAX_WATCHERS)
        watcher = _Watcher(instance)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def _end(self, watcher: _Watcher, reason: SomaError) -> None:
        self._watchers.discard(watcher)
        watcher.end(reason)


class WatchConfig:
    """Serves watches: complete copies from `source`, changes from `watchers`."""

    def __init__(self, source: SnapshotSource, watchers: Watchers, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._source = source
        self._watchers = watchers
        self._heartbeat_s = heartbeat_s

    async def __call__(self, request: WatchConfigRequest) -> AsyncGenerator[WatchConfigResponse, None]:
        """The frames of one watch; it ends only by an error.

        Raises:
            ResourceExhausted: QUEUE_FULL, too many watchers or a watcher that reads too slowly.
            Unavailable: the database does not answer, or the changes could not be followed without a gap.
        """
        with self._watchers.enrolled(request.instance) as watcher:
            async with self._source.snapshot() as snapshot:
                seen = snapshot.version
                async for part in snapshot.parts():
                    yield _frame(part, snapshot=True)
            yield WatchConfigResponse(snapshot=True, complete=True, version=seen)
            while True:
                changes = await self._next(watcher)
                if not changes:
                    yield WatchConfigResponse(heartbeat=True, version=seen)
                for change in changes:
                    if change.version > seen:
                        seen = change.version
                        yield _frame(change, snapshot=False)

    async def _next(self, watcher: _Watcher) -> list[ConfigPart]:
        """Changes that the watcher has not taken yet; none when a heartbeat is due."""
        try:
            return await asyncio.wait_for(watcher.changes.take(), self._heartbeat_s)
        except TimeoutError:
            return []
        except GatherClosed:
            if watcher.ended is None:
                raise
            raise watcher.ended from None


def _frame(part: ConfigPart, *, snapshot: bool) -> WatchConfigResponse:
    return WatchConfigResponse(
        snapshot=snapshot, tenants=part.tenants, agents=part.agents, deleted=part.deleted, version=part.version
    )
