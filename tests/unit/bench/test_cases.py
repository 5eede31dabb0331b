"""What a run takes, how often, and what it says about the time left."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.bench.cases import CASES, QUICK, Plan, Progress


def taken(plan: Plan) -> Counter[str]:
    return Counter(case.name for number in range(plan.rounds) for case in plan.cases(number))


def test_shapes_of_bars_are_taken_in_every_round_and_the_sweep_in_some() -> None:
    plan = Plan(rounds=5, sweep_rounds=2)
    assert taken(plan) == {case.name: 5 if case.bar else 2 for case in CASES}


def test_the_sweep_is_spread_over_the_run() -> None:
    plan = Plan(rounds=5, sweep_rounds=2)
    assert [any(not case.bar for case in plan.cases(number)) for number in range(5)] == [
        True,
        False,
        False,
        True,
        False,
    ]


def test_rounds_take_their_cases_in_one_order() -> None:
    orders = [[case.name for case in Plan().cases(number) if case.bar] for number in range(5)]
    assert all(order == orders[0] for order in orders)


def test_the_quick_run_has_everything_in_it_once() -> None:
    assert taken(QUICK) == {case.name: 1 for case in CASES}
    assert QUICK.kills == 1


@pytest.mark.parametrize(("plan", "limit_s"), [(Plan(), 20 * 60), (QUICK, 150)])
def test_runs_do_not_take_longer_than_they_are_said_to(plan: Plan, limit_s: float) -> None:
    assert plan.total_s < limit_s


def test_some_cases_only() -> None:
    plan = replace(Plan(rounds=3), only=("echo 64/4",))
    assert taken(plan) == {"echo 64/4": 3}
    assert (plan.waterfalls, plan.kills_of_each) == ((), 0)


def test_what_is_left_goes_by_the_pace_so_far() -> None:
    plan = replace(Plan(rounds=1, kills=0), only=("echo 64/4",))
    first, *others = plan.steps()
    progress = Progress(plan)
    assert progress.left_s == pytest.approx(plan.total_s)
    progress.done(2 * first)
    assert progress.left_s == pytest.approx(2 * sum(others))
    for _ in others:
        progress.done(1.0)
    assert progress.left_s == 0
