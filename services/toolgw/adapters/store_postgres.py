"""Tool calls, notes and runners in PostgreSQL, schema `toolgw`.

The primary key (tenant, key) decides every race: of a claim and a tombstone, or of two claims, one is inserted and the
other finds it. A statement that loses waits for the winner's commit, so what it reads next is decided.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any, Final, Literal, TypeAlias

import asyncpg
import orjson
from soma.common.v1.message_pb2 import Error

from services.toolgw.application.hold_lease import LEASE_S
from services.toolgw.application.ports import Finish, Look, Note
from services.toolgw.domain.invocation import Call, Invocation, Runner, State, is_compensation
from services.toolgw.domain.outcome import Failure, Outcome
from services.toolgw.domain.reversal import PastCall, Reversal, StoppedTurn, Undoing
from services.toolgw.domain.tool import Effect, ToolDefinition
from soma_common import clock
from soma_common.postgres.connect import Pool
from soma_common.postgres.errors import store_errors

RETENTION_H: Final = 48
"""How long the end of a call is kept: longer than the longest turn, which may take 24 h."""

FORGET_BATCH: Final = 1000
"""Rows removed in one transaction: with the largest results well below the longest wait for a statement."""
FORGET_FOR_S: Final = 60.0
"""How long one clearing away may take; what is left stays for the next."""

PooledConnection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

# After a restart of the database no lease could be renewed for a while: nobody is held silent before each had the time
# to. A row of `runners` goes only when its process said so, or its successor, or long after its end.
_ROW: Final = f"""
    SELECT i.*, extract(epoch FROM clock_timestamp() - i.cancel_time)::float8 AS asked_to_end_s, CASE
        WHEN r.runner IS NULL THEN 'gone'
        WHEN r.expire_time > clock_timestamp() THEN 'alive'
        WHEN pg_postmaster_start_time() > clock_timestamp() - make_interval(secs => {LEASE_S}) THEN 'alive'
        ELSE 'silent'
    END AS runner_state
    FROM toolgw.invocations i LEFT JOIN toolgw.runners r USING (runner) WHERE i.tenant = $1 AND i.key = $2"""

_DUE: Final = {
    "invocations": f"end_time < clock_timestamp() - interval '{RETENTION_H} hours'",
    "reversals": f"state <> 'undoing' AND create_time < clock_timestamp() - interval '{RETENTION_H} hours'",
    "runners": "expire_time < clock_timestamp() - interval '1 hour'",
}
"""What `forget` removes from each table."""


class PostgresToolStore:
    """The store on a pool of connections of the role `soma_toolgw`, for one process."""

    def __init__(self, pool: Pool, instance: str) -> None:
        self._pool = pool
        self._instance = instance
        self._runner = uuid.uuid4()
        # One connection is left to the lease: however many transactions wait for the others, this process shows that it
        # lives.
        self._others = asyncio.Semaphore(max(1, pool.get_max_size() - 1))

    async def claim(self, call: Call, tool: ToolDefinition, claim: str, dead: Invocation | None) -> Invocation:
        """Make a call RUNNING here under a new claim, and return what is stored under its key afterwards."""
        compensation = tool.compensation if tool.compensation and not call.compensates else None
        may_change = tool.effect is not Effect.NONE and not call.compensates
        lock = _turn_lock(call.session_id, call.turn_id) if may_change and call.turn_id else None
        async with self._transaction(call.tenant, lock, "shared") as connection:
            if dead is None:
                await connection.execute(
                    "INSERT INTO toolgw.invocations"
                    " (tenant, key, session_id, tool, digest, effect, state, claim, runner, attempt, turn_id, step,"
                    " compensation, arguments, end_time)"
                    " SELECT $1, $2, $3, $4, $5, $6, CASE WHEN late THEN 'cancelled' ELSE 'running' END,"
                    " CASE WHEN NOT late THEN $7::uuid END, $8, 1, $9, $10, $11, $12,"
                    " CASE WHEN late THEN clock_timestamp() END"
                    " FROM (SELECT $13 AND EXISTS (SELECT FROM toolgw.reversals"
                    " WHERE tenant = $1 AND session_id = $3 AND turn_id = $9) AS late) AS turn"
                    " ON CONFLICT DO NOTHING",
                    call.tenant,
                    call.key,
                    call.session_id,
                    call.tool,
                    call.digest,
                    tool.effect.value,
                    uuid.UUID(claim),
                    self._runner,
                    call.turn_id,
                    call.step,
                    compensation,
                    orjson.dumps(call.arguments) if compensation is not None else None,
                    lock is not None,
                )
            else:
                await connection.execute(
                    "UPDATE toolgw.invocations SET claim = $4, runner = $5, attempt = attempt + 1"
                    " WHERE tenant = $1 AND key = $2 AND claim = $3 AND state = 'running'",
                    call.tenant,
                    call.key,
                    uuid.UUID(dead.claim),
                    uuid.UUID(claim),
                    self._runner,
                )
            row = await connection.fetchrow(_ROW, call.tenant, call.key)
        if row is None:  # Cleared away between the two statements: its time was over, and so is this call's.
            return Invocation(
                key=call.key,
                session_id=call.session_id,
                tool=call.tool,
                digest=call.digest,
                effect=tool.effect,
                state=State.UNKNOWN,
                claim="",
                attempt=0,
                runner=Runner.GONE,
                outcome=None,
            )
        return _invocation(row)

    async def find(self, tenant: str, key: str) -> Invocation | None:
        """What is stored under a key."""
        async with self._transaction(tenant) as connection:
            row = await connection.fetchrow(_ROW, tenant, key)
        return None if row is None else _invocation(row)

    async def finish(self, call: Call, claim: str, outcome: Outcome) -> Finish:
        """Store the outcome of a claim, and what belongs to it, in one transaction."""
        failure = outcome.failure
        result = orjson.dumps(outcome.value) if failure is None else None
        error = None if failure is None else _failure_bytes(failure)
        which = (call.tenant, call.key, uuid.UUID(claim))
        async with self._transaction(call.tenant) as connection:
            done = await connection.fetchval(
                "UPDATE toolgw.invocations SET state = 'done', result = $4, failure = $5, never_ran = $6,"
                " end_time = clock_timestamp()"
                " WHERE tenant = $1 AND key = $2 AND claim = $3 AND state = 'running' RETURNING true",
                *which,
                result,
                error,
                outcome.never_ran,
            )
            if done:
                await _apply_to_notes(connection, call, outcome)
                return Finish.STORED
            late = await connection.fetchval(
                "UPDATE toolgw.invocations SET late_result = $4, late_failure = $5, late_time = clock_timestamp()"
                " WHERE tenant = $1 AND key = $2 AND claim = $3 AND state = 'unknown' RETURNING true",
                *which,
                result,
                error,
            )
            if late:
                return Finish.LATE
            own = await connection.fetchval(  # Perhaps this very claim ended it and its commit was not heard of.
                "SELECT true FROM toolgw.invocations WHERE tenant = $1 AND key = $2 AND claim = $3 AND state = 'done'",
                *which,
            )
        return Finish.STORED if own else Finish.REFUSED

    async def end_without_result(self, tenant: str, key: str, claim: str, state: State) -> bool:
        """Move the RUNNING call of a claim to CANCELLED or UNKNOWN; False: it was decided otherwise in between."""
        async with self._transaction(tenant) as connection:
            moved = await connection.fetchval(
                "UPDATE toolgw.invocations SET state = $4, end_time = clock_timestamp()"
                " WHERE tenant = $1 AND key = $2 AND claim = $3 AND state = 'running' RETURNING true",
                tenant,
                key,
                uuid.UUID(claim),
                state.value,
            )
        return bool(moved)

    async def abandon(self, tenant: str, key: str, claim: str, *, counts: bool = True) -> None:
        """Say that nobody works on a claim any more: the call stays RUNNING, without a living runner. Repeated, it
        changes nothing."""
        async with self._transaction(tenant) as connection:
            await connection.execute(
                "UPDATE toolgw.invocations SET runner = NULL, attempt = attempt - $4"
                " WHERE tenant = $1 AND key = $2 AND claim = $3 AND state = 'running' AND runner IS NOT NULL",
                tenant,
                key,
                uuid.UUID(claim),
                0 if counts else 1,
            )

    async def cancel(self, tenant: str, session_id: bytes, key: str) -> Invocation | None:
        """Store a tombstone under a new key and return None; or return what is stored under it. A call that runs is
        marked as asked to end, the first time."""
        async with self._transaction(tenant) as connection:
            inserted = await connection.fetchval(
                "INSERT INTO toolgw.invocations"
                " (tenant, key, session_id, tool, effect, state, attempt, turn_id, step, end_time)"
                " VALUES ($1, $2, $3, '', 'none', 'cancelled', 0, '', 0, clock_timestamp())"
                " ON CONFLICT DO NOTHING RETURNING true",
                tenant,
                key,
                session_id,
            )
            if inserted:
                return None
            await connection.execute(
                "UPDATE toolgw.invocations SET cancel_time = clock_timestamp()"
                " WHERE tenant = $1 AND key = $2 AND session_id = $3 AND state = 'running' AND cancel_time IS NULL",
                tenant,
                key,
                session_id,
            )
            row = await connection.fetchrow(_ROW, tenant, key)
        return None if row is None else _invocation(row)

    async def find_reversal(self, turn: StoppedTurn) -> Undoing | None:
        """What was decided about the calls of a turn."""
        async with self._transaction(turn.tenant) as connection:
            return await _reversal(connection, turn)

    async def calls_of(self, turn: StoppedTurn) -> Sequence[PastCall]:
        """The calls of a turn that may have changed something, the last first; no compensations."""
        async with self._transaction(turn.tenant) as connection:
            return await _calls_of(connection, turn)

    async def begin_reversal(self, turn: StoppedTurn, look: Look) -> Undoing:
        """Decide by a look at the calls of a turn, unless somebody has; return what is decided. No call of the turn
        that may change something begins between the look and the decision, or later."""
        async with self._transaction(turn.tenant, _turn_lock(turn.session_id, turn.turn_id), "") as connection:
            decided = await _reversal(connection, turn)
            if decided is not None:
                return decided
            undoing = look(await _calls_of(connection, turn))
            await connection.execute(
                "INSERT INTO toolgw.reversals (tenant, session_id, turn_id, state, effects, kept, end_time)"
                " VALUES ($1, $2, $3, $4, $5, $6, CASE WHEN $4 <> 'undoing' THEN clock_timestamp() END)",
                turn.tenant,
                turn.session_id,
                turn.turn_id,
                undoing.state.value,
                undoing.effects,
                undoing.kept,
            )
        return undoing

    async def end_reversal(self, turn: StoppedTurn, undoing: Undoing) -> Undoing:
        """Store how the compensations ended, unless somebody has; return what is stored."""
        async with self._transaction(turn.tenant) as connection:
            await connection.execute(
                "UPDATE toolgw.reversals SET state = $4, kept = $5, end_time = clock_timestamp()"
                " WHERE tenant = $1 AND session_id = $2 AND turn_id = $3 AND state = 'undoing'",
                turn.tenant,
                turn.session_id,
                turn.turn_id,
                undoing.state.value,
                undoing.kept,
            )
            return await _reversal(connection, turn) or undoing

    async def notes(self, tenant: str, session_id: bytes) -> Sequence[Note]:
        """All notes of a session, oldest first."""
        async with self._transaction(tenant) as connection:
            rows = await connection.fetch(
                "SELECT note, create_time FROM toolgw.notes WHERE tenant = $1 AND session_id = $2"
                " ORDER BY create_time, key",
                tenant,
                session_id,
            )
        return [Note(row["note"], row["create_time"]) for row in rows]

    async def renew(self, lease_s: float) -> None:
        """Say that this process lives for `lease_s` from now on."""
        async with store_errors():
            await self._pool.execute(
                "INSERT INTO toolgw.runners (runner, instance, expire_time)"
                " VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3))"
                " ON CONFLICT (runner) DO UPDATE SET expire_time = EXCLUDED.expire_time",
                self._runner,
                self._instance,
                lease_s,
            )

    async def replace_predecessors(self) -> None:
        """Say that earlier processes of this instance are dead: their calls need not wait for a lease to run out."""
        async with store_errors():
            await self._pool.execute(
                "DELETE FROM toolgw.runners WHERE instance = $1 AND runner <> $2", self._instance, self._runner
            )

    async def release(self) -> None:
        """Say that this process is gone."""
        async with store_errors():
            await self._pool.execute("DELETE FROM toolgw.runners WHERE runner = $1", self._runner)

    async def forget(self) -> None:
        """Remove ended calls and reversals whose time is over, and runners that have long been silent; run now and
        then. Goes batch by batch, so that what is removed stays removed: until nothing is due, or `FORGET_FOR_S` is
        over."""
        until = clock.monotonic() + FORGET_FOR_S
        for table, due in _DUE.items():
            removed = FORGET_BATCH
            while removed == FORGET_BATCH and clock.monotonic() < until:
                async with self._transaction("*") as connection:
                    removed = await connection.fetchval(
                        # Rows that another instance removes at this moment are passed over.
                        f"WITH gone AS (DELETE FROM toolgw.{table} WHERE ctid = ANY (ARRAY("
                        f"SELECT ctid FROM toolgw.{table} WHERE {due} LIMIT $1 FOR UPDATE SKIP LOCKED)) RETURNING 1)"
                        " SELECT count(*) FROM gone",
                        FORGET_BATCH,
                    )

    @asynccontextmanager
    async def _transaction(
        self, tenants: str, lock: int | None = None, mode: Literal["", "shared"] = ""
    ) -> AsyncIterator[PooledConnection]:
        """A transaction that row-level security lets see `tenants` only; it holds an advisory lock, if one is given."""
        async with store_errors(), self._others, self._pool.acquire() as connection, connection.transaction():
            if lock is None:
                await connection.execute("SELECT set_config('soma.tenants', $1, true)", tenants)
            else:
                function = "pg_advisory_xact_lock_shared" if mode else "pg_advisory_xact_lock"
                await connection.execute(f"SELECT set_config('soma.tenants', $1, true), {function}($2)", tenants, lock)
            yield connection


def _invocation(row: asyncpg.Record) -> Invocation:
    state = State(row["state"])
    return Invocation(
        key=row["key"],
        session_id=row["session_id"],
        tool=row["tool"],
        digest=row["digest"],
        effect=Effect(row["effect"]),
        state=state,
        claim=row["claim"].hex if row["claim"] is not None else "",
        attempt=row["attempt"],
        runner=Runner(row["runner_state"]),
        outcome=_outcome(row) if state is State.DONE else None,
        asked_to_end_s=row["asked_to_end_s"] or 0.0,
    )


def _past_call(row: asyncpg.Record) -> PastCall:
    state = State(row["state"])
    return PastCall(
        key=row["key"],
        step=row["step"],
        effect=Effect(row["effect"]),
        state=state,
        outcome=_outcome(row) if state is State.DONE else None,
        compensation=row["compensation"] or "",
        arguments=None if row["arguments"] is None else orjson.loads(row["arguments"]),
    )


def _turn_lock(session_id: bytes, turn_id: str) -> int:
    """The lock that the claims of a turn share, and that the look at its calls has alone."""
    digest = blake2b(session_id + turn_id.encode(), digest_size=8, person=b"soma-turn-lock").digest()
    return int.from_bytes(digest, "big", signed=True)


async def _calls_of(connection: PooledConnection, turn: StoppedTurn) -> Sequence[PastCall]:
    rows = await connection.fetch(
        "SELECT * FROM toolgw.invocations"
        " WHERE tenant = $1 AND turn_id = $2 AND turn_id <> '' AND session_id = $3 AND effect <> 'none'"
        " ORDER BY step DESC, create_time DESC, key DESC",
        turn.tenant,
        turn.turn_id,
        turn.session_id,
    )
    return [_past_call(row) for row in rows if not is_compensation(row["key"])]


async def _reversal(connection: PooledConnection, turn: StoppedTurn) -> Undoing | None:
    row = await connection.fetchrow(
        "SELECT * FROM toolgw.reversals WHERE tenant = $1 AND session_id = $2 AND turn_id = $3",
        turn.tenant,
        turn.session_id,
        turn.turn_id,
    )
    return None if row is None else Undoing(Reversal(row["state"]), tuple(row["effects"]), tuple(row["kept"]))


async def _apply_to_notes(connection: PooledConnection, call: Call, outcome: Outcome) -> None:
    """What the outcome of a call changes in its session's notes."""
    if outcome.note is not None:
        await connection.execute(
            "INSERT INTO toolgw.notes (tenant, key, session_id, note) VALUES ($1, $2, $3, $4)",
            call.tenant,
            call.key,
            call.session_id,
            outcome.note,
        )
    if outcome.forgotten_note is not None:
        await connection.execute(
            "DELETE FROM toolgw.notes WHERE tenant = $1 AND key = $2 AND session_id = $3",
            call.tenant,
            outcome.forgotten_note,
            call.session_id,
        )


def _outcome(row: asyncpg.Record) -> Outcome:
    if row["failure"] is None:
        value: Any = orjson.loads(row["result"])
        return Outcome(value=value)
    error = Error.FromString(row["failure"])
    failure = Failure(error.reason, error.message, dict(error.metadata))
    return Outcome(failure=failure, never_ran=row["never_ran"])


def _failure_bytes(failure: Failure) -> bytes:
    return Error(reason=failure.reason, message=failure.message, metadata=failure.metadata).SerializeToString()
