"""One stack for all end-to-end tests: they share its tenants and agents, and use sessions and channels of their own."""

import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.stack import Stack, standing_stack

E2E = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests on the stack's own loop, whose supervisor works on it meanwhile."""
    for item in items:
        if item.path.is_relative_to(E2E):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stack() -> AsyncIterator[Stack]:
    """The stack of this run."""
    with tempfile.TemporaryDirectory(prefix="soma-e2e-", ignore_cleanup_errors=True) as folder:
        async with standing_stack(Path(folder) / "home") as running:
            yield running


@pytest.fixture
def channel() -> str:
    """A channel that no other test uses, so that no other test's adapter gets this one's deliveries."""
    return f"e2e-{uuid.uuid4().hex[:12]}"
