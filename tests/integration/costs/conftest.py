"""A stack whose links are counted: one of each service, all of it as it ships."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.integration.costs.counted import CountedStack, counted_stack

COSTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests on the stack's own loop, whose keepers work on it meanwhile."""
    for item in items:
        if item.path.is_relative_to(COSTS):
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def counted() -> AsyncIterator[CountedStack]:
    """The stack of this module."""
    async with counted_stack() as running:
        yield running
