"""Watchers without a database: bounds, order, the end of watches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from soma.controlplane.v1.config_service_pb2 import WatchConfigRequest
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from services.controlplane.application.ports import ConfigPart
from services.controlplane.application.watch_config import (
    MAX_CHANGES_BEHIND,
    MAX_WATCHERS,
    WatchConfig,
    Watchers,
)
from services.controlplane.domain.refusals import stopping
from soma_common.errors import ResourceExhausted, Unavailable


class OneTenant:
    """A copy at version 5; what is published while it is read comes between."""

    version = 5

    def __init__(self, watchers: Watchers) -> None:
        self._watchers = watchers

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[OneTenant]:
        yield self

    async def parts(self) -> AsyncIterator[ConfigPart]:
        for version in (4, 5, 6):
            self._watchers.publish(ConfigPart(version, deleted=[f"tenants/t-{version}"]))
        yield ConfigPart(5, tenants=[Tenant(name="tenants/demo")])


async def test_what_the_copy_holds_is_not_told_again() -> None:
    watchers = Watchers()
    watch = WatchConfig(OneTenant(watchers), watchers)(WatchConfigRequest(instance="x-0"))
    frames = [await anext(watch) for _ in range(3)]
    assert [(frame.snapshot, frame.complete, frame.version) for frame in frames] == [
        (True, False, 5),
        (True, True, 5),
        (False, False, 6),
    ]
    await watch.aclose()
    assert len(watchers) == 0


async def test_silence_is_filled_with_heartbeats() -> None:
    watchers = Watchers()
    watch = WatchConfig(OneTenant(watchers), watchers, heartbeat_s=0.01)(WatchConfigRequest(instance="x-0"))
    frames = [await anext(watch) for _ in range(5)]
    assert [(frame.heartbeat, frame.version) for frame in frames[3:]] == [(True, 6), (True, 6)]
    await watch.aclose()


async def test_a_watcher_too_far_behind_is_ended_and_holds_nothing() -> None:
    watchers = Watchers()
    watch = WatchConfig(OneTenant(watchers), watchers)(WatchConfigRequest(instance="x-0"))
    for _ in range(2):
        await anext(watch)
    for version in range(7, 7 + MAX_CHANGES_BEHIND):
        watchers.publish(ConfigPart(version))
    assert len(watchers) == 0
    with pytest.raises(ResourceExhausted):
        await anext(watch)


async def test_closing_ends_and_refuses_watches() -> None:
    watchers = Watchers()
    watch = WatchConfig(OneTenant(watchers), watchers)(WatchConfigRequest(instance="x-0"))
    for _ in range(3):
        await anext(watch)
    watchers.close(stopping())
    with pytest.raises(Unavailable):
        await anext(watch)
    with pytest.raises(Unavailable), watchers.enrolled("y-0"):
        pass


def test_there_are_only_so_many_watchers() -> None:
    watchers = Watchers()
    places = [watchers.enrolled(f"x-{n}") for n in range(MAX_WATCHERS)]
    for place in places:
        place.__enter__()
    with pytest.raises(ResourceExhausted), watchers.enrolled("one-more"):
        pass
    places[0].__exit__(None, None, None)
    with watchers.enrolled("one-more"):
        pass
