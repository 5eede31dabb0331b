from collections.abc import AsyncIterator

import pytest

from soma_common.testing.embedded import Database
from tests.integration.router.store import Store, open_store


@pytest.fixture
async def store(postgres: Database) -> AsyncIterator[Store]:
    """The router's tables, and a writer as the running service has it."""
    async with open_store(postgres) as store:
        yield store
