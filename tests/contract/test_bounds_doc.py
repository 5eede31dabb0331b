"""Bounds that pages of docs/ name are those of the code."""

from pathlib import Path

import pytest

from services.router.adapters.history_postgres import CONNECTIONS
from services.router.application.own_partitions import TAKES_AT_ONCE
from services.router.application.watch_turns import CATCH_UP_BYTES, CATCH_UP_S
from services.toolgw.adapters.json_schema import MAX_PATTERN_CHARACTERS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("operations.md", f"a router up to {2 + TAKES_AT_ONCE + 3 * CONNECTIONS} (one writes"),
        ("guides/tools.md", f"A `pattern` is tried on strings of at most {MAX_PATTERN_CHARACTERS} characters"),
        (
            "concepts/delivery.md",
            f"at most {CATCH_UP_BYTES // 1024} KiB for all streams of a tenant that come within a second",
        ),
    ],
)
def test_a_page_names_the_bound(page: str, sentence: str) -> None:
    assert sentence in " ".join((DOCS / page).read_text().split())
    assert CATCH_UP_S == 1
