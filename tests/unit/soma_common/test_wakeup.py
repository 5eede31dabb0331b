"""A wake-up is for who waits now, and for nobody else."""

from __future__ import annotations

import asyncio

import pytest

from soma_common.wakeup import WakeUp


async def test_it_wakes_who_waits_once() -> None:
    wake = WakeUp()
    waiting = asyncio.create_task(wake.wait())
    await asyncio.sleep(0)
    assert wake()
    assert not wake(), "it was woken already and has not run yet"
    await waiting


async def test_it_is_not_kept_for_who_comes_later() -> None:
    wake = WakeUp()
    assert not wake()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await wake.wait()


async def test_who_gave_up_waiting_is_not_woken() -> None:
    wake = WakeUp()
    waiting = asyncio.create_task(wake.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert not wake()
    again = asyncio.create_task(wake.wait())
    await asyncio.sleep(0)
    assert wake()
    await again
