"""One stack for all tests of a module: each has conversations of its own, and leaves every part running."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.chaos.stack import FaultyStack, faulty_stack

CHAOS = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the tests on the stack's own loop, whose keepers work on it meanwhile. Those marked `soak` are run by
    `make soak` (`-m soak`) only, or when one is named.
    """
    if "soak" not in str(config.getoption("markexpr")) and not any("::" in arg for arg in config.args):
        late = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in late]
    for item in items:
        if item.path.is_relative_to(CHAOS):
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[FaultyStack]:
    """One of each service."""
    async with faulty_stack() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pairs() -> AsyncIterator[FaultyStack]:
    """Two routers and two brains."""
    async with faulty_stack({"router": 2, "cognition": 2}) as running:
        yield running
