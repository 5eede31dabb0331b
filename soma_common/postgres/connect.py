"""One way to connect to PostgreSQL: no wait without an end, errors in the words of the error tree."""

import asyncio
from typing import Any, TypeAlias

import asyncpg
from soma.common.v1 import error_reason_pb2

from soma_common.errors import Unavailable

CONNECT_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 10.0
"""Longest wait for the answer to one statement, unless the call or `connect` says another."""

TCP_USER_TIMEOUT_MS = 3000
"""The server drops a connection whose client acknowledges nothing for so long: a blackholed client holds no lock
for minutes.
"""

CONNECTION_LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    # An idle connection that the server ended: asyncpg has read the farewell and not yet the end of the socket.
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
"""What a statement raises when the connection, not the statement, is at fault: connect again; the outcome is
unknown.
"""

# As text: asyncpg's classes are generic for the type checker only.
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


async def connect(
    dsn: str,
    *,
    application_name: str = "somastack",
    command_timeout_s: float = COMMAND_TIMEOUT_S,
    **server_settings: str,
) -> Connection:
    """Return a connection, or raise Unavailable when none is made within `CONNECT_TIMEOUT_S`.

    `server_settings` are PostgreSQL parameters of the session, such as `idle_in_transaction_session_timeout="1000"`.
    """
    try:
        return await asyncpg.connect(
            dsn,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=command_timeout_s,
            server_settings=_session(application_name, server_settings),
        )
    except (*CONNECTION_LOST, asyncpg.PostgresError, ValueError) as error:
        raise unavailable(error) from error


async def create_pool(
    dsn: str,
    *,
    min_size: int = 1,
    max_size: int = 4,
    application_name: str = "somastack",
    command_timeout_s: float = COMMAND_TIMEOUT_S,
    **server_settings: str,
) -> Pool:
    """Return a pool of such connections, at most `max_size` at once; raises Unavailable like `connect`."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S + 1):
            return await asyncpg.create_pool(
                dsn,
                min_size=min_size,
                max_size=max_size,
                timeout=CONNECT_TIMEOUT_S,
                command_timeout=command_timeout_s,
                server_settings=_session(application_name, server_settings),
            )
    except (*CONNECTION_LOST, asyncpg.PostgresError, ValueError) as error:
        raise unavailable(error) from error


def unavailable(error: BaseException, what: str = "the database does not answer") -> Unavailable:
    """Return the error that a caller gets when `error` cut off a statement. The text names no address: it goes to
    callers.
    """
    return Unavailable(
        error_reason_pb2.ERROR_REASON_STORE_UNAVAILABLE, f"{what} ({type(error).__name__}): retry", retry_delay_s=1.0
    )


def _session(application_name: str, server_settings: dict[str, str]) -> dict[str, Any]:
    return {
        "application_name": application_name,
        "tcp_user_timeout": str(TCP_USER_TIMEOUT_MS),
        **server_settings,
    }
