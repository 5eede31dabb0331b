"""A short soak with a new seed in each run, and proof that its checker can fail: guards are taken away."""

import random

import pytest

from tests.chaos.guard_faults import EXPERIMENTS
from tests.chaos.soak import DEFAULT_POLICIES, rounds_of, say, soak
from tests.chaos.soak_guards import try_out

STORM_S = 40.0
QUICK = ("tool_key", "tombstone", pytest.param("dedupe", marks=pytest.mark.soak))
"""Guards whose absence shows within half a minute; that of the last takes most of one."""


@pytest.mark.timeout(400)
async def test_a_storm_breaks_no_promise() -> None:
    """To have the same faults again: python -m tests.chaos.soak --minutes 1 --seconds 40 --replay SEED."""
    seed = random.randrange(10**6)
    tally = await soak(rounds_of(seed, 1, STORM_S, DEFAULT_POLICIES), seed)
    say(tally)
    assert not tally.violations, f"seed {seed}"
    assert tally.outcomes["final"] > 100


async def test_a_seed_is_a_plan() -> None:
    first, again, other = (rounds_of(seed, 3, STORM_S, DEFAULT_POLICIES) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    assert [planned.faults[0] for planned in first] != [first[0].faults[0]] * 3


@pytest.mark.timeout(240)
@pytest.mark.parametrize("guard", QUICK)
async def test_what_breaks_without_a_guard_is_noticed(guard: str) -> None:
    experiment = next(each for each in EXPERIMENTS if each.guards == guard)
    found = await try_out(experiment, within_s=150)
    print(f"\nWITHOUT {found.row()}")
    assert found.violation
