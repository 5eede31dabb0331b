"""The generated part of a page is replaced, and nothing else."""

import pytest

from tests.bench import docs
from tests.unit.bench.results import results, whole

PAGE = f"# Title\n\nBefore.\n\n{docs.BEGIN}\nold\n{docs.END}\n\n## Levers\n\nAfter.\n"


def test_only_what_is_between_the_marks_changes() -> None:
    again = docs.rewritten(PAGE, "new\n\n")
    assert again == PAGE.replace("old", "new")
    assert docs.rewritten(again, "new") == again


@pytest.mark.parametrize(
    "page",
    ["no marks", docs.BEGIN, f"{docs.END} {docs.BEGIN}", f"{docs.BEGIN}{docs.END}{docs.BEGIN}{docs.END}"],
    ids=["none", "no end", "turned round", "twice"],
)
def test_a_page_with_other_marks_is_left_alone(page: str) -> None:
    with pytest.raises(ValueError, match="must mark one generated part"):
        docs.rewritten(page, "new")


def test_the_same_run_gives_the_same_text_with_everything_in_it() -> None:
    text = docs.generated(whole(), {"img/bench-cpu.svg": "CPU per turn"})
    assert text == docs.generated(whole(), {"img/bench-cpu.svg": "CPU per turn"})
    for expected in ("- CPU: a fast one", "3 interleaved rounds", "| echo 64/4 |", "MISSED", "router.commit",
                     "![CPU per turn](img/bench-cpu.svg)"):  # fmt: skip
        assert expected in text
    assert docs.BEGIN not in text


def test_a_run_that_was_cut_off_is_called_so() -> None:
    assert "cut off" in docs.generated(results(complete=False), {})
    assert "cut off" not in docs.generated(results(), {})
