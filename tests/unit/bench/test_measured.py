"""What is made of latencies and of moments."""

import pytest

from tests.bench.load import QUANTILES, distribution, percentile
from tests.bench.recovery import times


def test_percentiles_are_in_milliseconds() -> None:
    taken = [number / 1000 for number in range(101)]
    assert percentile(taken, 50) == pytest.approx(50)
    assert distribution(taken) == pytest.approx(QUANTILES)
    assert distribution([0.1]) == []


def test_a_recovery_counts_messages_sent_after_the_kill_and_the_longest_wait() -> None:
    answers = {
        "in flight at the kill": [(9.0, 9.1), (9.9, 10.2), (10.3, 12.0)],
        "waits longest": [(9.8, 9.9), (10.1, 13.0), (13.1, 13.2)],
        "stalls later": [(10.4, 11.0), (11.1, 13.9)],
    }
    assert times(answers, 10.0) == {"next_answer_s": 1.0, "all_s": 3.0}
