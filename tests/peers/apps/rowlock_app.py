"""FastAPI + PostgreSQL: one transaction per turn, which locks the session's row.

With a brain that takes its time nothing is locked and no connection held while it thinks: the turn reads the state,
thinks, then locks the row and looks whether the state is still the one that the brain saw; otherwise it starts over.
"""

# The packages of .peers are not there where types are checked.
# mypy: disable-error-code="import-not-found, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import asyncpg
import orjson
from fastapi import FastAPI, Header, Request, Response

from tests.peers.apps import turn
from tests.peers.apps.postgres_app import ANSWERED, EMPTY, READ, open_pool

LOCK = "SELECT state FROM session WHERE id = $1 FOR UPDATE"
NEW = "INSERT INTO session (id, state) VALUES ($1, $2) ON CONFLICT DO NOTHING"
# Both writes in one round trip; nothing is updated, and nothing returned, for a key that was answered before.
WRITE = """
WITH fresh AS (
    INSERT INTO answer (session, key, body) VALUES ($1, $3, $4) ON CONFLICT DO NOTHING RETURNING session
)
UPDATE session SET state = $2 FROM fresh WHERE id = fresh.session RETURNING true
"""

pool: asyncpg.Pool[asyncpg.Record]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Open the pool before the first request."""
    global pool
    pool = await open_pool(int(os.environ["PEER_POOL"]))
    async with pool:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/echo/{session}")
async def echo(session: str, request: Request, idempotency_key: Annotated[str, Header()]) -> Response:
    """The brain answers at once."""
    text = orjson.loads(await request.body())["text"]
    body = await _commit(session, idempotency_key, text, seen=None)
    return Response(body, media_type="application/json")


@app.post("/slow/{session}")
async def slow(session: str, request: Request, idempotency_key: Annotated[str, Header()]) -> Response:
    """The brain takes 0 to 20 ms; it saw the context that was committed before."""
    text = orjson.loads(await request.body())["text"]
    body = None
    while body is None:
        seen = orjson.loads(await pool.fetchval(READ, session) or EMPTY)
        await turn.think()
        body = await _commit(session, idempotency_key, text, seen=seen["turns"])
    return Response(body, media_type="application/json")


@app.get("/state/{session}")
async def state(session: str) -> Response:
    """The session's state, for the check after a run."""
    return Response(await pool.fetchval(READ, session), media_type="application/json")


async def _commit(session: str, key: str, text: str, seen: int | None) -> bytes | None:
    """Append under the row's lock and return the answer; None when the brain saw another state than there is now."""
    async with pool.acquire() as connection:
        async with connection.transaction():
            row = await connection.fetchval(LOCK, session)
            if row is None:
                await connection.execute(NEW, session, EMPTY)
                row = await connection.fetchval(LOCK, session)
            before = orjson.loads(row)
            after, answer = turn.append(before, text)
            body = orjson.dumps(answer)
            same = seen in (None, before["turns"])
            if same and await connection.fetchval(WRITE, session, orjson.dumps(after), key, body):
                return body
        return await connection.fetchval(ANSWERED, session, key)
