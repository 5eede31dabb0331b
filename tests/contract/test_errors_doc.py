"""docs/errors.md, the enum ErrorReason and the error tree say the same."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.rpc import code_pb2
from soma.common.v1 import error_reason_pb2

from soma_common import errors
from soma_common.errors import SomaError, class_of, reason_name

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"
ROW = re.compile(
    r"^\| `(?P<reason>[A-Z_]+)` \| `(?P<code>[A-Z_]+)` \| (?P<text>.+) \| (?P<retry>[a-z ]+) \|$", re.MULTILINE
)

REASONS = {reason_name(value): value for value in error_reason_pb2.ErrorReason.values() if value}
ROWS = {row["reason"]: row for row in ROW.finditer(PAGE.read_text())}


def test_every_reason_has_exactly_one_row() -> None:
    named = [row["reason"] for row in ROW.finditer(PAGE.read_text())]
    assert sorted(named) == sorted(REASONS)


@pytest.mark.parametrize("reason", REASONS)
def test_a_row_gives_the_code_that_is_sent(reason: str) -> None:
    assert code_pb2.Code.Value(ROWS[reason]["code"]) == class_of(REASONS[reason]).code


@pytest.mark.parametrize("reason", REASONS)
def test_a_row_says_what_to_change_and_whether_to_retry(reason: str) -> None:
    means, change = ROWS[reason]["text"].split(" | ")
    assert means.endswith(".")
    assert change.endswith(".")
    retry = ROWS[reason]["retry"]
    assert retry in {"no", "yes", "same key"}
    if ROWS[reason]["code"] in {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}:
        assert retry != "no"
    if ROWS[reason]["code"] in {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED"}:
        assert retry == "no"


def test_errors_are_raised_in_the_class_of_their_reason() -> None:
    """The class decides who catches an error here, the reason which code it has on the wire: both must agree."""
    misfits = [
        f"{where}: {name}({reason}) should be {class_of(REASONS[reason]).__name__}"
        for where, name, reason in _raised()
        if getattr(errors, name, None) is not class_of(REASONS[reason])
    ]
    assert misfits == []


def _raised() -> Iterator[tuple[str, str, str]]:
    """Yield place, class and reason of every construction of an error in the product's code."""
    for folder in ("soma_common", "services", "somastack"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and node.args:
                    name, reason = _last_name(node.func), _last_name(node.args[0])
                    if _is_subclass(name) and reason.startswith("ERROR_REASON_"):
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", name, reason.removeprefix("ERROR_REASON_")


def _is_subclass(name: str) -> bool:
    found = getattr(errors, name, None)
    return isinstance(found, type) and issubclass(found, SomaError) and found is not SomaError


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
