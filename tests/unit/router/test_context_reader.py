"""Who asks what was said before is answered, whenever he asks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from services.router.adapters.context_postgres import ContextReader

TURN = 1
NO_ANSWER = [(TURN, 1, 5, 5, 5, None)]
"""Of the first session that is asked for: a turn of which nothing is left, so that older ones are asked for."""


async def test_who_asks_again_as_all_readers_end_is_answered() -> None:
    queries: list[asyncio.Future[Sequence[Any]]] = []

    async def fetch(_tenants: str, _query: str, _arguments: Sequence[object]) -> Sequence[Any]:
        queries.append(asyncio.get_running_loop().create_future())
        return await queries[-1]

    reader = ContextReader(fetch)
    asked = []
    for session in (b"one", b"two"):
        asked.append(asyncio.create_task(reader.newest("demo", session, 2)))
        while len(queries) < len(asked):
            await asyncio.sleep(0)
    queries[0].set_result(NO_ANSWER)
    queries[1].set_result([])
    async with asyncio.timeout(10):
        while len(queries) < 3:
            await asyncio.sleep(0)
        queries[2].set_result([])
        assert await asyncio.gather(*asked) == [[], []]
    await reader.close()
