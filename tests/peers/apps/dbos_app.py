"""DBOS in FastAPI: a workflow per turn, whose id is the idempotency key, with one transaction that appends.

PEER_DBOS names how it is called. DBOS orders workflows of a key only through a queue, so the direct ways hold a lock
per session in the process.

    sync    handlers and workflows in threads, a synchronous datasource
    async   handlers and workflows on the event loop, an asynchronous datasource
    queue   as async, but enqueued in a queue partitioned by session with a concurrency of one per partition, as its
            guides order the work of one user; the handler waits for the result
"""

# The packages of .peers are not there where types are checked.
# mypy: disable-error-code="import-not-found, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio.to_thread
import orjson
import sqlalchemy as sa
from dbos import DBOS, AsyncSQLAlchemyDatasource, SetEnqueueOptions, SetWorkflowID, SQLAlchemyDatasource
from fastapi import Body, FastAPI, Header, Response

from tests.peers.apps import turn
from tests.peers.apps.postgres_app import EMPTY, SCHEMA

DSN = os.environ["PEER_DSN"].replace("postgresql://", "postgresql+psycopg://")
WAY = os.environ.get("PEER_DBOS", "sync")
POOL = int(os.environ.get("PEER_POOL", "8"))
POLL_S = float(os.environ.get("PEER_POLL_S", "0.01"))
ENGINE = {"pool_size": POOL, "max_overflow": 0, "pool_pre_ping": False}

LOCK = sa.text("SELECT state FROM session WHERE id = :id FOR UPDATE")
NEW = sa.text("INSERT INTO session (id, state) VALUES (:id, :state)")
WRITE = sa.text("UPDATE session SET state = :state WHERE id = :id")

# Before launch, as the guides say. `read committed` is enough under the row's lock, and costs no retries.
config: Any = {
    "name": "peer",
    "system_database_url": DSN,
    "sys_db_pool_size": POOL,
    "db_engine_kwargs": {"pool_pre_ping": False},
    "log_level": "WARNING",
    "enable_otlp": False,
}
DBOS(config=config)
sync_source = SQLAlchemyDatasource.create(DSN, engine_kwargs={**ENGINE, "isolation_level": "READ COMMITTED"})
async_source = asyncio.run(
    AsyncSQLAlchemyDatasource.create(DSN, engine_kwargs={**ENGINE, "isolation_level": "READ COMMITTED"})
)


def _after(row: bytes | None, text: str) -> tuple[bytes, dict[str, Any]]:
    state, answer = turn.append(orjson.loads(row) if row else None, text)
    return orjson.dumps(state), answer


@sync_source.transaction(isolation_level="READ COMMITTED")
def append(session: str, text: str) -> dict[str, Any]:
    """The turn's transaction, in a thread."""
    database = sync_source.sql_session()
    row = database.execute(LOCK, {"id": session}).scalar()
    state, answer = _after(row, text)
    database.execute(WRITE if row else NEW, {"id": session, "state": state})
    return answer


@async_source.transaction(isolation_level="READ COMMITTED")
async def append_async(session: str, text: str) -> dict[str, Any]:
    """The turn's transaction, on the event loop."""
    database = async_source.sql_session()
    row = (await database.execute(LOCK, {"id": session})).scalar()
    state, answer = _after(row, text)
    await database.execute(WRITE if row else NEW, {"id": session, "state": state})
    return answer


@DBOS.workflow()
def run(session: str, text: str, slow: bool) -> dict[str, Any]:
    """One turn."""
    if slow:
        time.sleep(random.uniform(0.0, 0.020))
    return append(session, text)


@DBOS.workflow()
async def run_async(session: str, text: str, slow: bool) -> dict[str, Any]:
    """One turn."""
    if slow:
        await turn.think()
    return await append_async(session, text)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Launch DBOS and make the table."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 64
    with sync_source.engine.begin() as connection:
        connection.execute(sa.text(SCHEMA))
    DBOS.launch()
    if WAY == "queue":
        await DBOS.register_queue_async("turns", partition_concurrency=1, polling_interval_sec=POLL_S)
    yield
    DBOS.destroy()


app = FastAPI(lifespan=lifespan)
locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
thread_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

Key = Annotated[str, Header(alias="idempotency-key")]
Text = Annotated[str, Body(embed=True)]


def _sync(session: str, text: str, key: str, slow: bool) -> dict[str, Any]:
    with thread_locks[session], SetWorkflowID(key):
        return run(session, text, slow)


async def _async(session: str, text: str, key: str, slow: bool) -> dict[str, Any]:
    async with locks[session]:
        with SetWorkflowID(key):
            return await run_async(session, text, slow)


async def _queued(session: str, text: str, key: str, slow: bool) -> dict[str, Any]:
    with SetWorkflowID(key), SetEnqueueOptions(queue_partition_key=session):
        handle = await DBOS.enqueue_workflow_async("turns", run_async, session, text, slow)
    return await handle.get_result(polling_interval_sec=POLL_S)


if WAY == "sync":

    @app.post("/echo/{session}")
    def echo(session: str, text: Text, key: Key) -> dict[str, Any]:
        """The brain answers at once."""
        return _sync(session, text, key, slow=False)

    @app.post("/slow/{session}")
    def slow(session: str, text: Text, key: Key) -> dict[str, Any]:
        """The brain takes 0 to 20 ms, in the workflow."""
        return _sync(session, text, key, slow=True)

else:
    ask = _queued if WAY == "queue" else _async

    @app.post("/echo/{session}")
    async def echo_async(session: str, text: Text, key: Key) -> dict[str, Any]:
        """The brain answers at once."""
        return await ask(session, text, key, False)

    @app.post("/slow/{session}")
    async def slow_async(session: str, text: Text, key: Key) -> dict[str, Any]:
        """The brain takes 0 to 20 ms, in the workflow."""
        return await ask(session, text, key, True)


@app.get("/state/{session}")
def state(session: str) -> Response:
    """The session's state, for the check after a run."""
    with sync_source.engine.connect() as connection:
        row = connection.execute(sa.text("SELECT state FROM session WHERE id = :id"), {"id": session}).scalar()
    return Response(bytes(row) if row else EMPTY, media_type="application/json")


if __name__ == "__main__":
    turn.serve(app)
