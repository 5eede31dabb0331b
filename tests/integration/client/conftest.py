from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from soma_common.testing.embedded import FaultyNats
from tests.integration.gateway.harness import World, running_world


@pytest.fixture
async def world(nats_server: FaultyNats, tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(nats_server, tmp_path) as world:
        yield world
