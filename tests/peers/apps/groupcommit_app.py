"""FastAPI + PostgreSQL: one writer commits what gathered while its last transaction ran, with one statement.

The fastest honest form that fits a page: one process owns all sessions, keeps them in memory, and a turn of a session
waits for the one before. Nothing fences a second process, so there can be none.
"""

# The packages of .peers are not there where types are checked.
# mypy: disable-error-code="import-not-found, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, NamedTuple

import asyncpg
import orjson
from fastapi import FastAPI, Header, Request, Response

from tests.peers.apps import turn
from tests.peers.apps.postgres_app import ANSWERED, READ, open_pool

# A key that was answered before leaves its session's state alone and is not returned.
WRITE = """
WITH item AS (SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[], $4::bytea[]) AS i (session, key, state, body)),
fresh AS (
    INSERT INTO answer (session, key, body) SELECT session, key, body FROM item ON CONFLICT DO NOTHING RETURNING session
),
written AS (
    INSERT INTO session (id, state) SELECT session, state FROM item JOIN fresh USING (session)
    ON CONFLICT (id) DO UPDATE SET state = excluded.state
)
SELECT session FROM fresh
"""


class Turn(NamedTuple):
    """What the writer is to commit; at most one per session is under way."""

    session: str
    key: str
    state: bytes
    body: bytes
    done: asyncio.Future[bool]


pool: asyncpg.Pool[asyncpg.Record]
sessions: dict[str, dict[str, Any] | None] = {}
locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
waiting: list[Turn] = []
work = asyncio.Event()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Open the pool and run the writer."""
    global pool
    pool = await open_pool(2)
    async with pool:
        writer = asyncio.create_task(_write())
        yield
        writer.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/echo/{session}")
async def echo(session: str, request: Request, idempotency_key: Annotated[str, Header()]) -> Response:
    """The brain answers at once."""
    return await _turn(session, idempotency_key, await request.body(), slow=False)


@app.post("/slow/{session}")
async def slow(session: str, request: Request, idempotency_key: Annotated[str, Header()]) -> Response:
    """The brain takes 0 to 20 ms."""
    return await _turn(session, idempotency_key, await request.body(), slow=True)


@app.get("/state/{session}")
async def state(session: str) -> Response:
    """The session's state, for the check after a run."""
    return Response(await pool.fetchval(READ, session), media_type="application/json")


async def _turn(session: str, key: str, request: bytes, *, slow: bool) -> Response:
    async with locks[session]:
        if session not in sessions:
            stored = await pool.fetchval(READ, session)
            sessions[session] = orjson.loads(stored) if stored else None
        if slow:
            await turn.think()
        after, answer = turn.append(sessions[session], orjson.loads(request)["text"])
        item = Turn(session, key, orjson.dumps(after), orjson.dumps(answer), asyncio.Future())
        waiting.append(item)
        work.set()
        body: bytes | None = item.body
        if await item.done:
            sessions[session] = after
        else:
            body = await pool.fetchval(ANSWERED, session, key)
    return Response(body, media_type="application/json")


async def _write() -> None:
    """Commit group after group; a group that fails fails its turns."""
    while True:
        await work.wait()
        work.clear()
        group = waiting[:]
        waiting.clear()
        columns = [[item[field] for item in group] for field in range(4)]
        try:
            fresh = {row["session"] for row in await pool.fetch(WRITE, *columns)}
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            for item in group:
                item.done.set_exception(error)
            continue
        for item in group:
            item.done.set_result(item.session in fresh)
