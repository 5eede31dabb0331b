"""docs/metrics.md names every metric that the code makes, with its kind and labels, and none beside."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(?P<name>soma_\w+)` \| (?P<kind>\w+) \|(?P<labels>[^|]*)\| (?P<text>.+) \|$", re.MULTILINE)

UNITS = ("_seconds", "_items", "_bytes")


class Metric(NamedTuple):
    """What code and page both say of a metric."""

    name: str
    kind: str
    labels: tuple[str, ...]


def _made() -> Iterator[Metric]:
    """Yield each metric made by a call of `counter`, `gauge` or `histogram` anywhere in the product's code."""
    for folder in ("soma_common", "services", "somastack"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                    kind = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                    first = node.args[0] if node.args else None
                    if kind in {"counter", "gauge", "histogram"} and isinstance(first, ast.Constant):
                        yield Metric(str(first.value), kind, _labels(node))


def _labels(call: ast.Call) -> tuple[str, ...]:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "labels"] or call.args[2:3]
    return tuple(ast.literal_eval(given[0])) if given else ()


MADE = sorted(_made())


def test_every_metric_is_documented() -> None:
    documented = [
        Metric(row["name"], row["kind"], tuple(re.findall(r"`(\w+)`", row["labels"])))
        for row in ROW.finditer(PAGE.read_text())
    ]
    assert sorted(documented) == MADE


@pytest.mark.parametrize("metric", MADE, ids=lambda metric: metric.name)
def test_names_tell_the_kind_and_the_unit(metric: Metric) -> None:
    assert metric.name.startswith("soma_")
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.kind != "histogram" or metric.name.endswith(UNITS)


def test_names_are_made_once() -> None:
    names = [metric.name for metric in MADE]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("metric", MADE, ids=lambda metric: metric.name)
def test_no_label_grows_with_use(metric: Metric) -> None:
    """A label per tenant, session or turn would make the scrape grow with the customers."""
    assert not {"tenant", "agent", "session", "turn", "channel", "user", "subject"} & set(metric.labels)
