"""Figures over rounds, and their tables."""

from tests.bench import report
from tests.bench.report import Spread
from tests.unit.bench.results import results, row, whole


def test_a_figure_over_rounds_is_its_median_with_the_range() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert Spread.of([]) is None


def test_a_range_is_told_unless_it_is_none() -> None:
    assert Spread(4.52, 4.0, 5.04).told() == "4.5 (4.0-5.0)"
    assert Spread(4.0, 4.0, 4.0).told(0) == "4"


def test_rounds_of_a_case_become_one_row() -> None:
    run = results(row("echo 64/4", 1, turns_per_s=4000.0), row("echo 64/4", 2, turns_per_s=5000.0))
    [line] = report.turns(run).rows
    assert line[:2] == ("echo 64/4", "4500 (4000-5000)")


def test_a_disturbed_round_is_told_in_its_row() -> None:
    run = results(row("echo 64/4", 1), row("echo 64/4", 2, foreign_cores=0.4), row("echo 64/4", 3, errors=2))
    [line] = report.turns(run).rows
    assert line[-1] == "round 2: others used 0.40 of a core; round 3: 2 errors"


def test_tokens_have_a_table_of_their_own() -> None:
    run = results(row("echo 64/4", 1), row("tokens 500", 1), row("tokens 500 spread", 1))
    assert [line[0] for line in report.turns(run).rows] == ["echo 64/4"]
    assert [line[0] for line in report.tokens(run).rows] == ["500", "500 spread"]


def test_memory_is_summed_over_the_processes() -> None:
    run = results(memory={"idle": {"nats": 20.0, "router-0": 60.4}})
    [line] = report.memory(run).rows
    assert (line[0], line[-1]) == ("idle", "80")


def test_rare_hops_are_left_out_and_the_others_weighed_by_how_many_turns_have_them() -> None:
    hop = {"p50_us": 1.0, "p99_us": 2.0, "mean_us": 100.0}
    shape = {"hops": [{"name": n, "turns": turns, **hop} for n, turns in (("a", 200), ("b", 100), ("c", 9))]}
    assert [(kept["name"], kept["of_turn_us"]) for kept in report.hops(shape)] == [("a", 100.0), ("b", 50.0)]


def test_what_was_not_measured_has_no_table() -> None:
    assert report.tables(results()) == []
    assert len(report.tables(whole())) == 7


def test_a_table_in_markdown() -> None:
    table = report.Table("t", ("a", "b"), [("x|y", "1")])
    assert table.markdown() == "| a | b |\n| --- | ---: |\n| x/y | 1 |"
