"""Delays between the lives of a part."""

from somastack.restart import MAX_DELAY_S, STABLE_AFTER_S, RestartPolicy


def test_delays_double_up_to_the_bound() -> None:
    policy = RestartPolicy()
    assert [policy.delay_after(0.0) for _ in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, MAX_DELAY_S, MAX_DELAY_S]


def test_a_stable_life_clears_the_record() -> None:
    policy = RestartPolicy()
    for _ in range(5):
        policy.delay_after(1.0)
    assert policy.delay_after(STABLE_AFTER_S) == 0.2
    assert policy.delay_after(0.0) == 0.4
