"""What stands behind the names: each system's set-up and tuning, its durability, and what differs from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.peers.systems import OURS


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reader who knows a system asks first."""

    set_up: str
    on_disk: str
    """Before the client has its answer."""
    differs: str


FACTS: Final = {
    OURS: Facts(
        set_up="as `make up` starts it, nothing changed: five services, NATS and PostgreSQL, each a process of its own",
        on_disk="the message and its idempotency key, synced in NATS before it is accepted; the turn's start, the"
        " brain's step, outcome and answer, committed in PostgreSQL (`fsync` and `synchronous_commit` on) before it is"
        " delivered",
        differs="the brain is a process of its own behind a journal; every message is authorized and validated, tenants"
        " are apart by row-level security, all history is kept, spans are sampled, answers can be watched as they grow",
    ),
    "Restate, 1 partition": Facts(
        set_up="the server of the npm package, one node, its defaults but for `default-num-partitions = 1`, the fastest"
        " on 2 cores; a virtual object per session in one uvicorn process (uvloop, httptools, HTTP/1.1); state is one"
        " value, JSON by orjson instead of the standard library; journals of finished turns are not kept",
        on_disk="invocation, state and answer with the idempotency key, in its log (one copy), whose write-ahead log"
        " is synced before a record is acknowledged, as by default",
        differs="the handler is the brain, one hop from the server. No tenants, no authorization of callers, no tokens"
        " while an answer grows; the last 20 messages are kept",
    ),
    "Restate, default partitions": Facts(
        set_up="the same, with the 24 partitions of its default, which is made for more cores",
        on_disk="the same",
        differs="the same",
    ),
    "FastAPI, row lock": Facts(
        set_up="two uvicorn processes (uvloop, httptools), asyncpg with prepared statements, 8 connections each over"
        " the Unix socket, the product's PostgreSQL with the product's settings; 4 round trips per turn; while a slow"
        " brain thinks nothing is locked, the state is compared afterwards",
        on_disk="state, answer and idempotency key, in one transaction",
        differs="no inbox: the client must retry what a dead process had taken. No tenants, authorization, bus or"
        " process for the brain; the last 20 messages are kept",
    ),
    "FastAPI, group commit": Facts(
        set_up="the same server and driver, one process; one writer commits what gathered while its last statement ran,"
        " in one round trip; sessions are kept in memory",
        on_disk="state, answer and idempotency key, in one statement for the group",
        differs="the same; and one process owns all sessions for good: nothing fences it from a second one",
    ),
    "DBOS": Facts(
        set_up="two uvicorn processes with FastAPI, PostgreSQL as above; a workflow per turn with one transaction of a"
        " datasource (read committed, under the row's lock), in threads; 8 connections for the system tables and 8 for"
        " the state per process, without a liveness check before each use",
        on_disk="the workflow with its input, the state with the step's checkpoint, the workflow's output: a commit"
        " each. The workflow's id is the idempotency key",
        differs="a library inside the application; sessions are ordered by locks of process and row, its queues poll."
        " No tenants or authorization; the last 20 messages are kept",
    ),
}
