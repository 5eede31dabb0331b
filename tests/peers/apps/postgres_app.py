"""What the FastAPI applications share: the tables and a driver's pool.

`session.state` is one value as in the other peers; `answer` remembers each idempotency key with its answer, written by
the same statement as the state.
"""

from __future__ import annotations

import os

import asyncpg

# Half-empty pages: an update of a state then stays on its page and touches no index.
SCHEMA = """
CREATE TABLE IF NOT EXISTS session (id text PRIMARY KEY, state bytea NOT NULL) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS answer (
    session text NOT NULL, key text NOT NULL, body bytea NOT NULL, PRIMARY KEY (session, key)
);
"""
READ = "SELECT state FROM session WHERE id = $1"
ANSWERED = "SELECT body FROM answer WHERE session = $1 AND key = $2"
EMPTY = b'{"turns": 0, "messages": []}'


async def open_pool(size: int) -> asyncpg.Pool[asyncpg.Record]:
    """A pool of `size` connections over the private Unix socket in PEER_DSN; makes the tables."""
    pool = await asyncpg.create_pool(os.environ["PEER_DSN"], min_size=size, max_size=size)
    await pool.execute(SCHEMA)
    return pool
