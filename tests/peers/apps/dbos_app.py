"""DBOS in FastAPI: a workflow per turn, whose id is the idempotency key, with one transaction that appends.

DBOS orders the workflows of a key only through a queue, which polls. So each process holds a lock per session, and
between processes the lock of the session's row orders.
"""

# The packages of .peers are not there where types are checked.
# mypy: disable-error-code="import-not-found, misc, no-any-return, untyped-decorator"

from __future__ import annotations

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
from dbos import DBOS, SetWorkflowID, SQLAlchemyDatasource
from fastapi import Body, FastAPI, Header, Response

from tests.peers.apps import turn
from tests.peers.apps.postgres_app import SCHEMA

DSN = os.environ["PEER_DSN"].replace("postgresql://", "postgresql+psycopg://")
POOL = int(os.environ["PEER_POOL"])

LOCK = sa.text("SELECT state FROM session WHERE id = :id FOR UPDATE")
NEW = sa.text("INSERT INTO session (id, state) VALUES (:id, :state)")
WRITE = sa.text("UPDATE session SET state = :state WHERE id = :id")
READ = sa.text("SELECT state FROM session WHERE id = :id")

# Connections are not asked whether they live before each use, as they are by default: one round trip less each time.
config: Any = {
    "name": "peer",
    "system_database_url": DSN,
    "sys_db_pool_size": POOL,
    "db_engine_kwargs": {"pool_pre_ping": False},
    "executor_id": str(os.getpid()),
    "log_level": "WARNING",
    "enable_otlp": False,
}
DBOS(config=config)
# `read committed` is enough under the row's lock, and needs no retries; the default is `serializable`.
source = SQLAlchemyDatasource.create(
    DSN, engine_kwargs={"pool_size": POOL, "max_overflow": 0, "isolation_level": "READ COMMITTED"}
)
locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@source.transaction(isolation_level="READ COMMITTED")
def append(session: str, text: str) -> dict[str, Any]:
    """The turn's transaction."""
    database = source.sql_session()
    row = database.execute(LOCK, {"id": session}).scalar()
    state, answer = turn.append(orjson.loads(row) if row else None, text)
    database.execute(WRITE if row else NEW, {"id": session, "state": orjson.dumps(state)})
    return answer


@DBOS.workflow()
def run(session: str, text: str, slow: bool) -> dict[str, Any]:
    """One turn."""
    if slow:
        time.sleep(random.uniform(0.0, 0.020))
    return append(session, text)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Make the table and launch DBOS; a thread for each of 64 requests."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 64
    with source.engine.begin() as connection:
        connection.execute(sa.text(SCHEMA))
    DBOS.launch()
    yield
    DBOS.destroy()


app = FastAPI(lifespan=lifespan)
Key = Annotated[str, Header(alias="idempotency-key")]
Text = Annotated[str, Body(embed=True)]


@app.post("/echo/{session}")
def echo(session: str, text: Text, key: Key) -> dict[str, Any]:
    """The brain answers at once."""
    with locks[session], SetWorkflowID(key):
        return run(session, text, slow=False)


@app.post("/slow/{session}")
def slow(session: str, text: Text, key: Key) -> dict[str, Any]:
    """The brain takes 0 to 20 ms, in the workflow."""
    with locks[session], SetWorkflowID(key):
        return run(session, text, slow=True)


@app.get("/state/{session}")
def state(session: str) -> Response:
    """The session's state, for the check after a run."""
    with source.engine.connect() as connection:
        row = connection.execute(READ, {"id": session}).scalar()
    return Response(row, media_type="application/json")
