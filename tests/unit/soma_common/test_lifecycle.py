"""A shutdown runs every step once, last started first, and never takes longer than it may."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from soma_common.lifecycle import EXIT_CRASHED, Lifecycle


@pytest.fixture
def ran() -> list[str]:
    return []


def step(
    ran: list[str], name: str, wait_s: float = 0.0, error: Exception | None = None
) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        await asyncio.sleep(wait_s)
        if error is not None:
            raise error
        ran.append(name)

    return run


async def test_steps_run_once_in_reverse(ran: list[str]) -> None:
    lifecycle = Lifecycle()
    for name in ("store", "bus", "intake"):
        lifecycle.on_stop(name, step(ran, name))
    await lifecycle.stop()
    await lifecycle.stop()
    assert ran == ["intake", "bus", "store"]


async def test_a_step_that_fails_or_overruns_does_not_stop_the_next(ran: list[str]) -> None:
    lifecycle = Lifecycle()
    lifecycle.on_stop("store", step(ran, "store"))
    lifecycle.on_stop("stuck", step(ran, "stuck", wait_s=30), timeout_s=0.05)
    lifecycle.on_stop("broken", step(ran, "broken", error=RuntimeError("x")))
    started = time.monotonic()
    await lifecycle.stop()
    assert ran == ["store"]
    assert time.monotonic() - started < 10


async def test_the_whole_shutdown_is_limited(ran: list[str]) -> None:
    lifecycle = Lifecycle(stop_timeout_s=0.2)
    lifecycle.on_stop("skipped", step(ran, "skipped"))
    lifecycle.on_stop("slow", step(ran, "slow", wait_s=30), timeout_s=60)
    started = time.monotonic()
    await lifecycle.stop()
    assert ran == []
    assert time.monotonic() - started < 10


async def test_a_critical_task_that_fails_takes_the_process_down() -> None:
    lifecycle = Lifecycle()

    async def fail() -> None:
        raise RuntimeError("boom")

    lifecycle.spawn("writer", fail())
    async with asyncio.timeout(1):
        await lifecycle.wait_stop()
    assert lifecycle.exit_code == EXIT_CRASHED


async def test_a_critical_task_that_returns_takes_the_process_down() -> None:
    lifecycle = Lifecycle()
    lifecycle.spawn("writer", asyncio.sleep(0))
    async with asyncio.timeout(1):
        await lifecycle.wait_stop()
    assert lifecycle.exit_code == EXIT_CRASHED


async def test_other_tasks_may_end_and_are_cancelled_at_the_stop() -> None:
    lifecycle = Lifecycle()

    async def fail() -> None:
        raise RuntimeError("boom")

    lifecycle.spawn("short", fail(), critical=False)
    long = lifecycle.spawn("long", asyncio.sleep(60))
    await asyncio.sleep(0.01)
    assert not lifecycle.stopping
    await lifecycle.stop()
    assert long.cancelled()
    assert lifecycle.exit_code == 0
