import asyncio

import pytest
from soma.common.v1 import error_reason_pb2 as reasons

from services.cognition.application.retrying import Backoff, retrying
from soma_common.errors import FailedPrecondition, ResourceExhausted, SomaError, Unavailable

FAST = Backoff(0.001, 0.002)
DOWN = Unavailable(reasons.ERROR_REASON_MODEL_UNAVAILABLE, "down")


def in_s(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


class Flaky:
    """Fails as told, then succeeds."""

    def __init__(self, *errors: SomaError) -> None:
        self.errors = list(errors)
        self.numbers: list[int] = []

    async def __call__(self, number: int) -> str:
        self.numbers.append(number)
        if self.errors:
            raise self.errors.pop(0)
        return "ok"


async def test_what_may_pass_is_tried_again_with_its_number() -> None:
    flaky = Flaky(DOWN, ResourceExhausted(reasons.ERROR_REASON_MODEL_RATE_LIMITED, "slow"))
    assert await retrying(flaky, backoff=FAST, deadline=in_s(5)) == "ok"
    assert flaky.numbers == [1, 2, 3]


async def test_what_will_not_pass_is_raised_at_once() -> None:
    flaky = Flaky(FailedPrecondition(reasons.ERROR_REASON_MODEL_REJECTED, "no"))
    with pytest.raises(FailedPrecondition):
        await retrying(flaky, backoff=FAST, deadline=in_s(5))
    assert flaky.numbers == [1]


@pytest.mark.parametrize("stop", ["attempts", "may_retry", "deadline", "asked_wait"])
async def test_it_gives_up_with_the_last_error(stop: str) -> None:
    errors = [DOWN] * 9
    if stop == "asked_wait":
        errors = [Unavailable(reasons.ERROR_REASON_MODEL_UNAVAILABLE, "later", retry_delay_s=60)]
    flaky = Flaky(*errors)
    with pytest.raises(Unavailable):
        await retrying(
            flaky,
            backoff=Backoff(1.0, 1.0) if stop == "deadline" else FAST,
            deadline=in_s(0.5),
            attempts=3 if stop == "attempts" else None,
            may_retry=lambda: stop != "may_retry",
        )
    assert flaky.numbers == ([1, 2, 3] if stop == "attempts" else [1])


def test_waits_grow_to_their_bound_and_never_undercut_what_was_asked() -> None:
    backoff = Backoff(0.1, 1.0)
    waits = [backoff.wait_s(attempt, DOWN) for attempt in range(1, 40)]
    assert 0.075 <= waits[0] <= 0.125
    assert all(0.75 <= wait <= 1.25 for wait in waits[5:])
    asked = Unavailable(reasons.ERROR_REASON_MODEL_UNAVAILABLE, "later", retry_delay_s=7)
    assert backoff.wait_s(1, asked) == 7
