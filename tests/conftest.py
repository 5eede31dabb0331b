"""What holds for every test: its level is its folder, so `-m unit` and `tests/unit` select the same."""

from pathlib import Path

import pytest

pytest_plugins = ["soma_common.testing.embedded"]

TESTS = Path(__file__).parent
LEVELS = frozenset({"unit", "contract", "integration", "e2e", "chaos", "upgrade", "bench", "model"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each collected test with the level named by the first folder under tests/."""
    for item in items:
        level = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if level in LEVELS:
            item.add_marker(level)
