"""Failpoints do nothing unless armed, and then exactly what was asked, when it was asked."""

import time
from collections.abc import Iterator

import pytest

from soma_common.failpoints import FailpointHit, arm_failpoints, failpoint, failpoint_async


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm_failpoints("")


async def test_unarmed_points_do_nothing() -> None:
    failpoint("a")
    await failpoint_async("a")


async def test_a_count_hits_only_that_time() -> None:
    arm_failpoints("a=raise@2; b=sleep:1")
    failpoint("a")
    with pytest.raises(FailpointHit, match="a"):
        await failpoint_async("a")
    failpoint("a")


async def test_sleep_waits_each_time() -> None:
    arm_failpoints("a=sleep:30;b=block:30")
    for wait in (failpoint_async("a"), failpoint_async("b")):
        started = time.monotonic()
        await wait
        assert time.monotonic() - started >= 0.029
    started = time.monotonic()
    failpoint("a")
    assert time.monotonic() - started >= 0.029


@pytest.mark.parametrize("spec", ["a", "a=", "=kill", "a=explode", "a=kill@x", "a=kill:5", "a=sleep", "a=sleep:x"])
def test_a_bad_spec_is_refused_by_name(spec: str) -> None:
    with pytest.raises(ValueError, match="failpoint"):
        arm_failpoints(spec)
