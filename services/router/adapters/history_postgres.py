"""PostgreSQL: reads what was committed. A pool; every read sets the tenant it is for, and row-level security holds it
to that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import datetime
from typing import Any, Final

import asyncpg
from soma.common.v1.turn_pb2 import Delivery, StepBody

from services.router.adapters.context_postgres import ContextReader
from services.router.application.group import StoreLost
from services.router.application.ports import StoredDelivery
from services.router.application.read_sessions import MessageRow, SessionRow, StepRow, TurnRow
from services.router.domain.arrival import replacement
from services.router.domain.lane_window import CommittedPlace
from services.router.domain.turn import Outcome, TurnStatus
from soma_common import ids
from soma_common.errors import ResourceExhausted, Unavailable
from soma_common.fair_places import FairPlaces
from soma_common.postgres.connect import CONNECTION_LOST, Connection, Pool, create_pool

CONNECTIONS: Final = 4
"""Most of one pool."""
_CONNECTION_S: Final = 3.0
"""How long a read waits for a connection."""

# Everything is read by key and in pages, in the order of an index. The planner does not know how many rows the policies
# leave and takes them for few: it would read whole tables, or a whole session to sort it.
_READER_SETTINGS: Final[dict[str, Any]] = {
    "jit": "off",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}

# Whether message m was refused: then a turn has its position, negated, for a number. As a join (OFFSET 0 prevents it)
# it would read all turns for each message: where a policy is in force, no index looks for a value computed from a row.
_REFUSED = "EXISTS (SELECT FROM router.turns r WHERE r.session_id = m.session_id AND r.number = -m.position OFFSET 0)"
_SESSION_COLUMNS = (
    "s.session_id, s.tenant, s.agent, s.channel, s.session, s.create_time, s.update_time, s.message_count,"
    " s.turn_count, s.delivery_count, s.done_position, s.last_position, s.paused,"
    " (SELECT t.turn_id FROM router.turns t WHERE t.session_id = s.session_id AND t.number = s.turn_count + 1"
    "  AND t.status <> 3) AS running_turn,"
    " q.queued_count, q.oldest_queued_time,"
    " (SELECT count(*) FROM router.deliveries d WHERE d.session_id = s.session_id) AS undelivered_count"
)
# A message that has no outcome and is in no running turn.
_QUEUED = (
    "m.kind < 2 AND m.position > s.done_position"
    f" AND NOT {_REFUSED}"
    " AND NOT EXISTS (SELECT FROM router.turns r WHERE r.session_id = s.session_id AND r.number = s.turn_count + 1"
    "  AND r.status <> 3 AND m.position BETWEEN r.first_position AND r.last_position)"
)
_QUEUES = (
    "CROSS JOIN LATERAL (SELECT count(*) AS queued_count, min(m.ingest_time) AS oldest_queued_time"
    f" FROM router.messages m WHERE m.session_id = s.session_id AND {_QUEUED}) q"
)
# Sessions of tenant $1 in which something has no outcome, and perhaps some others: every message below its partition's
# floor has ended, so what is looked at is what came since, not what there is.
_OPEN = (
    "SELECT DISTINCT m.session_id FROM router.partitions p CROSS JOIN LATERAL (SELECT m.session_id"
    " FROM router.messages m WHERE m.partition = p.id AND m.position >= p.mail_floor AND m.tenant = $1 OFFSET 0) m"
)
_OPEN_SESSIONS = (
    f"(SELECT s.* FROM ({_OPEN}) o CROSS JOIN LATERAL"
    " (SELECT * FROM router.sessions s WHERE s.session_id = o.session_id OFFSET 0) s)"
)
_OPEN_TURNS = (
    f"(SELECT t.* FROM {_OPEN_SESSIONS} s CROSS JOIN LATERAL (SELECT * FROM router.turns t"
    " WHERE t.session_id = s.session_id AND t.number = s.turn_count + 1 AND t.status <> 3 OFFSET 0) t)"
)
_TURN_COLUMNS = (
    "t.turn_id, t.session_id, greatest(t.number, 0) AS number, t.status, t.outcome, t.dispatch, t.agent_revision,"
    " t.create_time, t.end_time, CASE t.status WHEN 2 THEN CASE t.stop WHEN 0 THEN 4 ELSE t.stop END ELSE 0 END"
    "  AS stopping,"
    " s.tenant, s.agent, s.channel, s.session,"
    " CASE t.status WHEN 3 THEN t.step_count"
    "  ELSE (SELECT count(*)::int FROM router.steps p WHERE p.turn_id = t.turn_id) END AS step_count,"
    " ARRAY(SELECT m.message_id FROM router.messages m WHERE m.session_id = t.session_id"
    f"  AND m.position BETWEEN t.first_position AND t.last_position AND m.kind < 2 AND (t.number < 0 OR NOT {_REFUSED})"
    "  ORDER BY m.position) AS message_ids,"
    " (SELECT p.body FROM router.steps p WHERE p.turn_id = t.turn_id AND p.kind IN (3, 4)) AS last_body"
)

# A page of messages. The place of those that wait is counted up from the page's first: the line is read once.
_MESSAGES = f"""
WITH line AS (
    SELECT s.done_position, r.first_position, r.last_position
    FROM router.sessions s LEFT JOIN LATERAL (
        SELECT r.first_position, r.last_position FROM router.turns r
        WHERE r.session_id = s.session_id AND r.number = s.turn_count + 1 AND r.status <> 3 OFFSET 0
    ) r ON true
    WHERE s.session_id = $1
), page AS MATERIALIZED (
    SELECT m.session_id, m.position, m.message_id, m.accept_ms, m.content, m.policy, m.ingest_time
    FROM router.messages m WHERE m.session_id = $1 AND m.position > $2 AND m.kind < 2 ORDER BY m.position LIMIT $3
), answered AS MATERIALIZED (
    SELECT page.*, router.turn_of_message(page.session_id, page.position) AS answer FROM page
), shown AS (
    SELECT a.*, t.turn_id, t.outcome, a.position > line.done_position AND coalesce(t.number, 1) > 0
        AND coalesce(a.position NOT BETWEEN line.first_position AND line.last_position, true) AS waits
    FROM answered a CROSS JOIN line LEFT JOIN router.turns t ON t.turn_id = a.answer
)
SELECT position, message_id, accept_ms, content, policy, turn_id, outcome,
       CASE WHEN waits THEN (
           SELECT count(*) FROM router.messages m, line
           WHERE m.session_id = $1 AND m.position > line.done_position AND m.position <= $2 AND m.kind < 2
               AND coalesce(m.position NOT BETWEEN line.first_position AND line.last_position, true) AND NOT {_REFUSED}
       ) + count(*) FILTER (WHERE waits) OVER (ORDER BY position) ELSE 0 END AS queue_position,
       (extract(epoch FROM clock_timestamp() - ingest_time) * 1000)::bigint AS age_ms
FROM shown ORDER BY position
"""

# A row without a state is a standby that this role may not look at (it lacks pg_read_all_stats): it may have nothing.
# Subscribers of logical replication are no copies to fail over to.
_COMMITTED_PLACE = """
SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint AS written,
       (SELECT min(CASE WHEN r.state IS NULL THEN 0 ELSE (r.flush_lsn - '0/0'::pg_lsn)::bigint END)
        FROM pg_stat_replication r
        WHERE (r.state IS NULL OR r.state IN ('catchup', 'streaming'))
          AND NOT EXISTS (SELECT FROM pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')
       ) AS flushed
"""


class PostgresHistory:
    """Reads of one router's API and of turns that are taken up again."""

    def __init__(self, pool: Pool, places: FairPlaces | None = None) -> None:
        """`places` has tenants share the connections; None: who comes first is served first."""
        self._pool = pool
        self._places = places
        self._contexts = ContextReader(self._fetch)

    @classmethod
    async def open(
        cls, dsn: str, name: str, ready: int = 1, tenant_reads: int | None = None, bound: str = ""
    ) -> PostgresHistory:
        """Opens the pool with so many connections; more are made when they are needed. With `tenant_reads` the tenants
        share them, and no more reads of one wait (`bound` names that): a further one raises StoreLost because of
        ResourceExhausted. Else whoever comes first is served first. Raises Unavailable.
        """
        pool = await create_pool(
            dsn,
            min_size=ready,
            max_size=CONNECTIONS,
            application_name=f"{name} reader",
            **_READER_SETTINGS,
        )
        if tenant_reads is None:
            return cls(pool)
        # One connection is left to the others, whatever the reads of a tenant take.
        return cls(pool, FairPlaces(CONNECTIONS, of_tenant=CONNECTIONS - 1, waiting=tenant_reads, bound=bound))

    async def close(self) -> None:
        """Closes the pool."""
        await self._contexts.close()
        await self._pool.close()

    async def _fetch(self, tenants: str, query: str, arguments: Sequence[object]) -> list[Any]:
        async with self._as(tenants) as connection:
            return await connection.fetch(query, *arguments)

    @asynccontextmanager
    async def _as(self, tenants: str) -> AsyncIterator[Connection]:
        try:
            async with (
                self._place_of(tenants),
                self._pool.acquire(timeout=_CONNECTION_S) as connection,
                connection.transaction(readonly=True),
            ):
                await connection.execute("SELECT set_config('soma.tenants', $1, true)", tenants)
                yield connection  # type: ignore[misc]
        except (*CONNECTION_LOST, Unavailable, ResourceExhausted, asyncpg.PostgresError) as error:
            raise StoreLost(str(error) or type(error).__name__) from error

    def _place_of(self, tenants: str) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._places is None else self._places.taken(tenants, _CONNECTION_S)

    # ---- for turns

    async def contents(self, tenant: str, partition: int, positions: Sequence[int]) -> dict[int, bytes]:
        """Contents of messages by position."""
        async with self._as(tenant) as connection:
            rows = await connection.fetch(
                "SELECT position, content FROM router.messages WHERE partition = $1 AND position = ANY ($2::bigint[])",
                partition,
                list(positions),
            )
        return {row["position"]: row["content"] for row in rows}

    async def journal(self, tenant: str, turn_id: bytes) -> list[tuple[int, bytes]]:
        """(kind, body) of a turn's steps in order."""
        async with self._as(tenant) as connection:
            rows = await connection.fetch(
                "SELECT kind, body FROM router.steps WHERE turn_id = $1 ORDER BY step", turn_id
            )
        return [(row["kind"], row["body"]) for row in rows]

    async def context(self, tenant: str, session_id: bytes, limit: int) -> list[bytes]:
        """The newest `limit` messages of ended turns, oldest first: inputs, and the answers that there were."""
        return await self._contexts.newest(tenant, session_id, limit)

    async def agent_spec(self, tenant: str, agent: str, revision: str) -> bytes | None:
        """The agent of a revision that some turn was started with."""
        async with self._as(tenant) as connection:
            spec: bytes | None = await connection.fetchval(
                "SELECT spec FROM router.agent_revisions WHERE tenant = $1 AND agent = $2 AND revision = $3",
                tenant,
                agent,
                revision,
            )
        return spec

    async def deliveries(
        self, tenant: str, partition: int, channel: str, after: int, limit: int
    ) -> list[StoredDelivery]:
        """Waiting outcomes of a channel in a partition beyond a position."""
        async with self._as(tenant) as connection:
            rows = await connection.fetch(
                "SELECT position, session_id, payload FROM router.deliveries"
                # `> 0` holds for all, and says that deliveries_waiting (0007) may be used.
                " WHERE partition = $1 AND tenant = $2 AND channel = $3 AND position > $4 AND position > 0"
                " ORDER BY position LIMIT $5",
                partition,
                tenant,
                channel,
                after,
                limit,
            )
        return [StoredDelivery(*row) for row in map(tuple, rows)]

    async def turn_answering(self, tenant: str, message_id: bytes, content_hash: bytes) -> bytes | None:
        """The turn that takes the message with this content."""
        async with self._as(tenant) as connection:
            turn_id: bytes | None = await connection.fetchval(
                "SELECT router.turn_of_message(session_id, position) FROM router.messages"
                " WHERE message_id = $1 AND content_hash = $2",
                message_id,
                content_hash,
            )
        return turn_id

    async def ended_turn(self, tenant: str, turn_id: bytes) -> tuple[Delivery, int, int] | None:
        """The outcome of an ended turn, its last dispatch and its number of steps."""
        turn = await self.turn(tenant, turn_id)
        if turn is None or turn.status != 3:
            return None
        delivery = Delivery(
            delivery_id=turn_id,
            agent=turn.agent,
            session=turn.session,
            turn_id=turn_id,
            outcome=turn.outcome,  # type: ignore[arg-type]
            message_ids=turn.message_ids,
            create_time_ms=int(turn.end_time.timestamp() * 1000) if turn.end_time else 0,
        )
        if turn.outcome == Outcome.ABSORBED and turn.message_ids:
            delivery.absorbed_into = ids.turn_id(turn.session_id, turn.message_ids[0], replacement(turn.number + 1))
        if turn.last_body is not None:
            body = StepBody.FromString(turn.last_body)
            if body.HasField("final"):
                delivery.message.CopyFrom(body.final.message)
            elif body.HasField("failure"):
                delivery.error.CopyFrom(body.failure)
        return delivery, turn.dispatch, turn.step_count

    # ---- for the API

    async def session(self, tenant: str, session_id: bytes) -> SessionRow | None:
        """One session."""
        async with self._as(tenant) as connection:
            row = await connection.fetchrow(
                f"SELECT {_SESSION_COLUMNS} FROM router.sessions s {_QUEUES} WHERE s.session_id = $1", session_id
            )
        return _session(row) if row else None

    async def sessions(
        self,
        tenant: str,
        agent: str | None,
        channel: str | None,
        busy: bool | None,
        after: tuple[str, str, str],
        limit: int,
    ) -> list[SessionRow]:
        """Sessions of a tenant by (agent, channel, session), beyond a place in that order."""
        async with self._as(tenant) as connection:
            rows = await connection.fetch(
                f"SELECT {_SESSION_COLUMNS} FROM {_OPEN_SESSIONS if busy else 'router.sessions'} s {_QUEUES}"
                " WHERE s.tenant = $1 AND ($2::text IS NULL OR s.agent = $2) AND ($3::text IS NULL OR s.channel = $3)"
                " AND (s.agent, s.channel, s.session) > ($4, $5, $6)"
                " AND ($7::boolean IS NULL OR $7 = EXISTS (SELECT FROM router.turns t WHERE t.session_id = s.session_id"
                "      AND t.number = s.turn_count + 1 AND t.status <> 3))"
                " ORDER BY s.agent, s.channel, s.session LIMIT $8",
                tenant,
                agent,
                channel,
                *after,
                busy,
                limit,
            )
        return [_session(row) for row in rows]

    async def messages(self, tenant: str, session_id: bytes, after: int, limit: int) -> list[MessageRow]:
        """Messages of a session beyond a position, in the order accepted."""
        async with self._as(tenant) as connection:
            rows = await connection.fetch(
                _MESSAGES,
                session_id,
                after,
                limit,
            )
        return [MessageRow(*row) for row in map(tuple, rows)]

    async def control_done(self, tenant: str, message_id: bytes) -> bool | None:
        """Whether a control is done with; None if it is not in the mailbox."""
        async with self._as(tenant) as connection:
            done: bool | None = await connection.fetchval(
                "SELECT m.position <= s.control_position"
                " FROM router.messages m JOIN router.sessions s USING (session_id) WHERE m.message_id = $1",
                message_id,
            )
        return done

    async def waits(self, tenant: str, session_id: bytes, turn_id: bytes) -> bool:
        """Whether the turn is that of a message that waits in its session: no turn yet."""
        async with self._as(tenant) as connection:
            rows = await connection.fetch(
                "SELECT m.message_id FROM router.messages m JOIN router.sessions s USING (session_id)"
                f" WHERE m.session_id = $1 AND {_QUEUED}",
                session_id,
            )
        return any(ids.turn_id(session_id, row["message_id"]) == turn_id for row in rows)

    async def turn(self, tenant: str, turn_id: bytes) -> TurnRow | None:
        """One turn."""
        async with self._as(tenant) as connection:
            row = await connection.fetchrow(
                f"SELECT {_TURN_COLUMNS} FROM router.turns t JOIN router.sessions s USING (session_id)"
                " WHERE t.turn_id = $1",
                turn_id,
            )
        return _turn(row) if row else None

    async def session_turns(
        self, tenant: str, session_id: bytes, status: int | None, after: int, limit: int
    ) -> list[TurnRow]:
        """Turns of a session in order, beyond a number."""
        async with self._as(tenant) as connection:
            rows = await connection.fetch(
                # Numbers of messages that were refused are below 0: they ran no turn of the session.
                "WITH t AS MATERIALIZED (SELECT * FROM router.turns t"
                " WHERE t.session_id = $1 AND ($2::int IS NULL OR t.status = $2) AND t.number > $3"
                " ORDER BY t.number LIMIT $4)"
                f" SELECT {_TURN_COLUMNS} FROM t JOIN router.sessions s USING (session_id) ORDER BY t.number",
                session_id,
                status,
                after,
                limit,
            )
        return [_turn(row) for row in rows]

    async def tenant_turns(
        self, tenant: str, status: int | None, before: tuple[datetime, bytes] | None, limit: int
    ) -> list[TurnRow]:
        """Turns of a tenant, newest first, before a place in that order."""
        turns = "router.turns" if status in (None, TurnStatus.ENDED) else _OPEN_TURNS
        async with self._as(tenant) as connection:
            rows = await connection.fetch(
                # The page first: joined before, every turn of the tenant would be read.
                # `>= 0` holds for all, and says that turns_of_tenant (0008) may be used.
                f"WITH t AS MATERIALIZED (SELECT * FROM {turns} t"
                " WHERE t.tenant = $1 AND t.partition >= 0 AND ($2::int IS NULL OR t.status = $2)"
                " AND ($3::timestamptz IS NULL OR (t.create_time, t.turn_id) < ($3, $4::bytea))"
                " ORDER BY t.create_time DESC, t.turn_id DESC LIMIT $5)"
                f" SELECT {_TURN_COLUMNS} FROM t JOIN router.sessions s USING (session_id)"
                " ORDER BY t.create_time DESC, t.turn_id DESC",
                tenant,
                status,
                before[0] if before else None,
                before[1] if before else None,
                limit,
            )
        return [_turn(row) for row in rows]

    async def steps(self, tenant: str, turn_id: bytes, after: int, limit: int) -> list[StepRow]:
        """Steps of a turn in order, beyond a number."""
        async with self._as(tenant) as connection:
            rows = await connection.fetch(
                "SELECT step, dispatch, create_time, body FROM router.steps WHERE turn_id = $1 AND step > $2"
                " ORDER BY step LIMIT $3",
                turn_id,
                after,
                limit,
            )
        return [StepRow(*row) for row in map(tuple, rows)]

    async def lane_floors(self, lanes: int) -> dict[int, tuple[str, int]]:
        """The stream's incarnation and the lowest cursor of all partitions of each lane: what is below it is in the
        mailbox of everybody. Nothing for a lane whose cursors do not yet count one and the same incarnation.
        """
        try:
            async with self._pool.acquire(timeout=_CONNECTION_S) as connection:
                rows = await connection.fetch(
                    "SELECT id % $1 AS lane, min(cursor_stream) AS stream, min(cursor_seq) AS floor"
                    " FROM router.partitions GROUP BY 1 HAVING min(cursor_stream) = max(cursor_stream)",
                    lanes,
                )
        except (*CONNECTION_LOST, asyncpg.PostgresError) as error:
            raise StoreLost(str(error) or type(error).__name__) from error
        return {row["lane"]: (row["stream"], row["floor"]) for row in rows}

    async def committed_place(self) -> CommittedPlace:
        """How far the write-ahead log is, here and on the disks of the standbys."""
        try:
            async with self._pool.acquire(timeout=_CONNECTION_S) as connection:
                [row] = await connection.fetch(_COMMITTED_PLACE)
        except (*CONNECTION_LOST, asyncpg.PostgresError) as error:
            raise StoreLost(str(error) or type(error).__name__) from error
        return CommittedPlace(row["written"], row["flushed"])


def _session(row: Any) -> SessionRow:
    return SessionRow(**dict(row))


def _turn(row: Any) -> TurnRow:
    return TurnRow(**dict(row))
