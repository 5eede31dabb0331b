"""Shared timers: each is called once, in order, not before its time, unless it was cancelled; deadlines end what they
are around and nothing else. Times are compared on the loop's own clock, which counts milliseconds."""

import asyncio
import random

import pytest

from soma_common.timers import Deadline, SharedTimers


def _task() -> "asyncio.Task[object]":
    task = asyncio.current_task()
    assert task is not None
    return task


async def test_timers_are_called_once_in_order_and_not_before_their_time() -> None:
    timers, loop = SharedTimers(), asyncio.get_running_loop()
    chance = random.Random(7)
    called: list[tuple[float, float]] = []
    over = asyncio.Event()
    wanted = sorted(loop.time() + chance.uniform(0, 0.03) for _ in range(300))

    def call(when: float) -> None:
        called.append((when, loop.time()))
        if len(called) == len(wanted):
            over.set()

    for when in chance.sample(wanted, len(wanted)):
        timers.call_at(when, lambda when=when: call(when))  # type: ignore[misc]
    await over.wait()
    assert sorted(when for when, _ in called) == wanted
    assert all(at >= when - 0.0011 for when, at in called)
    moments = [round(at, 4) for _, at in called]
    assert moments == sorted(moments)


async def test_a_cancelled_timer_is_not_called_even_by_one_of_its_own_moment() -> None:
    timers, loop = SharedTimers(0.01), asyncio.get_running_loop()
    moment = loop.time() + 0.005
    called: list[str] = []

    def call_first() -> None:
        called.append("first")
        second.cancel()

    first = timers.call_at(moment, call_first)
    second = timers.call_at(moment, lambda: called.append("second"))
    gone = timers.call_at(moment, lambda: called.append("gone"))
    gone.cancel()
    gone.cancel()
    await timers.sleep(0.03)
    assert called == ["first"]
    first.cancel()
    later = timers.call_at(loop.time(), lambda: called.append("later"))
    await timers.sleep(0.02)
    later.cancel()
    assert called == ["first", "later"]


async def test_sleepers_of_one_moment_can_be_cancelled_apart() -> None:
    timers = SharedTimers()
    sleepers = [asyncio.create_task(timers.sleep(0.02)) for _ in range(20)]
    await asyncio.sleep(0)
    for sleeper in sleepers[::2]:
        sleeper.cancel()
    results = await asyncio.gather(*sleepers, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False] * 10


async def test_a_deadline_ends_its_block_with_a_timeout() -> None:
    timers, loop = SharedTimers(0.01), asyncio.get_running_loop()
    scope = Deadline(timers, loop.time() + 0.01, _task())
    with pytest.raises(TimeoutError), scope:
        await asyncio.Event().wait()
    assert scope.expired
    assert not _task().cancelling()


async def test_a_deadline_that_is_not_reached_leaves_nothing_behind() -> None:
    timers, loop = SharedTimers(0.01), asyncio.get_running_loop()
    with Deadline(timers, loop.time() + 0.01, _task()) as scope:
        await asyncio.sleep(0)
    await asyncio.sleep(0.03)
    assert not scope.expired


async def test_a_cancel_from_outside_stays_a_cancel_also_when_the_time_is_over() -> None:
    timers, loop = SharedTimers(0.01), asyncio.get_running_loop()

    async def work() -> None:
        with Deadline(timers, loop.time() + 0.01, _task()):
            try:
                await asyncio.Event().wait()
            finally:
                _task().cancel()

    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await task
