"""PostgreSQL's errors in the words of the error tree: what a caller may repeat is Unavailable, the rest is a defect."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import asyncpg

from soma_common.postgres.connect import CONNECTION_LOST, unavailable

OVERLOADED: Final = (
    asyncpg.DeadlockDetectedError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TooManyConnectionsError,
)
"""What the server answers when it is too busy, or is not (yet) the one that may write."""


@asynccontextmanager
async def store_errors() -> AsyncIterator[None]:
    """Turn what a lost connection or an overloaded server raises inside the block into Unavailable
    (STORE_UNAVAILABLE)."""
    try:
        yield
    except (*CONNECTION_LOST, *OVERLOADED) as error:
        raise unavailable(error) from error
