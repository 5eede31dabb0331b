"""PostgreSQL: the writer of groups, the leases, and the taking of partitions. Each has connections of its own, so that
none waits for another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, TypeVar
from uuid import UUID

import asyncpg

from services.router.application.group import (
    FenceLost,
    Group,
    GroupRejected,
    GroupResult,
    SessionFacts,
    StoreLost,
    TurnConflict,
)
from services.router.application.own_partitions import LEASE_S, TAKES_AT_ONCE
from services.router.application.ports import AcquiredRow, LeaseRow, PendingRow
from soma_common.clock import monotonic
from soma_common.errors import Unavailable
from soma_common.failpoints import FailpointHit, failpoint
from soma_common.layout import LaneLayout
from soma_common.postgres.connect import CONNECTION_LOST, Connection, connect

_T = TypeVar("_T")

FENCED: Final = "SM001"
CONFLICT: Final = "SM002"

_NO_PAST: Final = SessionFacts(0, 0, 0)

_TRANSIENT_CLASSES: Final = frozenset({"08", "40", "53", "55", "57", "58", "XX"})
"""Connection, rollback, resources, lock, shutdown or the server's own trouble (a quota that is used up is `XX000`):
nothing is wrong with the group itself.
"""

_PARAMETERS: Final = 15
_COMMIT: Final = "SELECT * FROM router.commit_group(" + ", ".join(f"${n}" for n in range(1, _PARAMETERS + 1)) + ")"

# Plans are made once, on tables that may be empty then: say what is right for full ones. A bitmap of the one row that
# is looked up costs as much as the look-up.
_WRITER_SETTINGS: Final = {
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "idle_in_transaction_session_timeout": "1000",
    "lock_timeout": "2000",
}
_FREED: Final = "router_lease_freed"
_FREE: Final = (
    "freed AS (UPDATE router.leases SET owner = NULL, expires_at = '-infinity'"
    " WHERE owner = $1 AND term = ANY ($2::uuid[]) RETURNING 1)"
)
_RELEASE: Final = f"WITH {_FREE} SELECT pg_notify('{_FREED}', '') FROM freed LIMIT 1"
_LEAVE: Final = (
    f"WITH {_FREE}, gone AS (DELETE FROM router.routers WHERE router = $1 RETURNING 1)"
    f" SELECT pg_notify('{_FREED}', '') FROM gone LIMIT 1"
)
_LEASE_SETTINGS: Final = {"jit": "off", "idle_in_transaction_session_timeout": "1000", "lock_timeout": "2000"}

LOAD_S: Final = 120.0
"""Longest time in which a partition is loaded, in seconds: millions of pending messages, or a disk that is very slow.
Whether the server lives is for the heartbeats to say; this ends a load whose own connection is dead and says nothing.
"""
_LOAD_PAGE: Final = 500
"""Rows that are read at once: some milliseconds of this process."""
# A load holds the rows of the running turns. A router that freezes between two pages has them until its lease is over.
_LOAD_SETTINGS: Final = {**_LEASE_SETTINGS, "idle_in_transaction_session_timeout": "3000"}
_LOAD: Final = (
    "SELECT position, message_id, kind, deliver, fault, target_turn, traceparent, session_id, tenant, agent, channel,"
    " session, turn_count, delivery_count, turn_id, status, dispatch, strikes, first_position, last_position,"
    " agent_revision, policy, debounce_ms, debounce_max_ms, age_ms, paused, stop, stop_age_ms, rolled_back, came_later,"
    " size FROM router.load_partition($1, $2, $3)"
)
# The function looks at the term before it writes, and may take long in between. From then on it holds the rows that it
# has written: whoever takes the partition after this answer waits for them.
_STILL_OURS: Final = "SELECT EXISTS (SELECT FROM router.partitions WHERE id = $1 AND term = $2)"
_STALE_S: Final = 30.0
"""A connection that was not used for so long may be one that the network has forgotten: nothing says so, and finding it
out takes as long as a statement may.
"""


class _Line:
    """One connection that is made when it is needed, and made again after it was lost."""

    def __init__(
        self,
        dsn: str,
        name: str,
        settings: dict[str, str],
        on_connect: Callable[[Connection], Awaitable[None]] | None = None,
    ) -> None:
        self._on_connect = on_connect
        self._dsn = dsn
        self._name = name
        self._settings = settings
        self._connection: Connection | None = None
        self._used_at = 0.0
        self._lock = asyncio.Lock()

    async def use(self, work: Callable[[Connection], Awaitable[_T]], *, anew: bool = False) -> _T:
        """Runs `work` with the connection. Raises StoreLost when it is gone or cannot be made.

        A connection that was lost unused is a lost store too: what answers behind the next one may be a standby that
        has not everything, and terms must not go on there as if nothing had been; `anew`: none goes on. Then one that
        was not used for `_STALE_S` is not used again either.
        """
        async with self._lock:
            if anew and monotonic() - self._used_at > _STALE_S:
                self.drop()
            if self._connection is not None and self._connection.is_closed():
                self.drop()
                if not anew:
                    raise StoreLost("the connection was closed")
            try:
                if self._connection is None:
                    self._connection = await connect(self._dsn, application_name=self._name, **self._settings)  # type: ignore[arg-type]
                    if self._on_connect is not None:
                        await self._on_connect(self._connection)
                return await work(self._connection)
            except (*CONNECTION_LOST, Unavailable) as error:
                self.drop()
                raise StoreLost(str(error) or type(error).__name__) from error
            except asyncpg.PostgresError as error:
                if _is_transient(error):
                    raise StoreLost(str(error)) from error
                raise
            except asyncio.CancelledError:
                self.drop()  # the statement may still run: nothing may follow it on this connection
                raise
            finally:
                self._used_at = monotonic()

    def drop(self) -> None:
        """Gives the connection up at once."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def close(self) -> None:
        """Closes the connection in good order."""
        if self._connection is not None and not self._connection.is_closed():
            await self._connection.close(timeout=1.0)


class _Lines:
    """As many connections as are in use at once; what was used last is used next."""

    def __init__(self, lines: Sequence[_Line]) -> None:
        self._free = list(lines)
        self._places = asyncio.Semaphore(len(lines))

    async def use(self, work: Callable[[Connection], Awaitable[_T]], *, anew: bool = False) -> _T:
        """Runs `work` with one of the connections, once one is free. Raises StoreLost like `_Line.use`."""
        async with self._places:
            line = self._free.pop()
            try:
                return await line.use(work, anew=anew)
            finally:
                self._free.append(line)

    async def close(self) -> None:
        """Closes those that are not in use."""
        for line in self._free:
            await line.close()


class PostgresGroupWriter:
    """Writes groups with one prepared call on one connection."""

    def __init__(self, dsn: str, name: str) -> None:
        self._line = _Line(dsn, f"{name} writer", _WRITER_SETTINGS)
        self._prepared: tuple[Connection, Any] | None = None

    async def commit(self, group: Group) -> GroupResult:
        """Writes the group. Raises FenceLost or GroupRejected if nothing was written, StoreLost if it is unknown."""
        parameters = [
            ",".join(group.tenants),
            group.fence(), group.messages, group.turns, group.revisions, group.dispatches, group.controls, group.inputs,
            group.refusals, group.steps, group.journaled, group.ends, group.deliveries, group.acks, group.dead,
        ]  # fmt: skip

        async def call(connection: Connection) -> GroupResult:
            statement = await self._statement(connection)
            failpoint("router.before_commit")
            try:
                if _cut_is_due():
                    return await self._cut(connection, statement, parameters)
                row = await statement.fetchrow(*parameters)
            except CONNECTION_LOST:
                raise  # the server's farewell is an answer too: the line gives the connection up, or it is lost twice
            except asyncpg.PostgresError as error:
                raise _translate(error, group) from error
            return _result(row, group)

        return await self._line.use(call)

    async def _statement(self, connection: Connection) -> Any:
        if self._prepared is None or self._prepared[0] is not connection:
            self._prepared = (connection, await connection.prepare(_COMMIT))
        return self._prepared[1]

    async def _cut(self, connection: Connection, statement: Any, parameters: list[Any]) -> GroupResult:
        """Fault for tests: the call is sent and the connection cut before its answer."""
        sent = asyncio.ensure_future(statement.fetchrow(*parameters))
        await asyncio.sleep(0.05)
        connection.terminate()
        await asyncio.gather(sent, return_exceptions=True)
        raise ConnectionResetError("cut by a failpoint after the call was sent")

    async def close(self) -> None:
        """Closes the connection."""
        await self._line.close()


def _cut_is_due() -> bool:
    """Whether the fault router.commit_cut is armed (action raise): cut the connection after the call is sent."""
    try:
        failpoint("router.commit_cut")
    except FailpointHit:
        return True
    return False


def _is_transient(error: asyncpg.PostgresError) -> bool:
    return (error.sqlstate or "")[:2] in _TRANSIENT_CLASSES


def _translate(error: asyncpg.PostgresError, group: Group) -> Exception:
    if error.sqlstate in (FENCED, CONFLICT):
        detail = getattr(error, "detail", None) or ""
        lost = frozenset(int(part) for part in detail.split(",") if part)
        kind = TurnConflict if error.sqlstate == CONFLICT else FenceLost
        return kind(lost or frozenset(group.moves))
    if _is_transient(error):
        return StoreLost(str(error))
    return GroupRejected(f"{type(error).__name__}: {error}")


def _result(row: Any, group: Group) -> GroupResult:
    inserted, inserted_partition, reused, reused_partition, started, sessions, *facts = row
    places = [(partition, position) for partition, position, *_ in group.messages]
    new = frozenset(places if inserted is None else zip(inserted_partition or (), inserted, strict=True))
    # Of sessions that were not there before the group nothing is told: there is nothing to tell.
    known = {message[2]: _NO_PAST for place, message in zip(places, group.messages, strict=True) if place in new}
    if sessions:
        known.update(zip(sessions, map(SessionFacts, *facts), strict=True))
    return GroupResult(
        new,
        frozenset(zip(reused_partition, reused, strict=True)) if reused else frozenset(),
        known,
        frozenset((turn[0] for turn in group.turns) if started is None else started),
    )


class PostgresLeases:
    """Leases, on a connection of their own, and take-overs, on others. `on_freed` is called when a router lets a lease
    go.
    """

    def __init__(self, dsn: str, router: str) -> None:
        self._line = _Line(dsn, f"{router} leases", _LEASE_SETTINGS, self._listen)
        self._loads = _Lines(
            [_Line(dsn, f"{router} loads", _LOAD_SETTINGS, _notice_our_end) for _ in range(TAKES_AT_ONCE)]
        )
        self.on_freed: Callable[[], None] = lambda: None
        self._router = router
        self._ttl = timedelta(seconds=LEASE_S)

    async def ensure_layout(self, layout: LaneLayout) -> dict[str, str]:
        """Stores the layout's metadata if there is none yet, and a row per partition if it fits; returns what is
        stored.
        """

        async def keep(connection: Connection) -> dict[str, str]:
            async with connection.transaction():
                # All of it or nothing: what a database has is not added to, or it would become another layout's.
                await connection.execute(
                    "INSERT INTO router.layout (name, value) SELECT * FROM unnest($1::text[], $2::text[])"
                    " WHERE NOT EXISTS (SELECT FROM router.layout)",
                    *zip(*sorted(layout.metadata().items()), strict=True),
                )
                stored = {
                    r["name"]: r["value"] for r in await connection.fetch("SELECT name, value FROM router.layout")
                }
                if layout.kept_as(stored) is not None:
                    for table, column in (("partitions", "id"), ("leases", "partition")):
                        await connection.execute(
                            f"INSERT INTO router.{table} ({column}) SELECT generate_series(0, $1::int - 1)"
                            " ON CONFLICT DO NOTHING",
                            layout.partitions,
                        )
            return stored

        async def call(connection: Connection) -> dict[str, str]:
            try:
                return await keep(connection)
            except asyncpg.UniqueViolationError:  # another router was storing its own, which is there now
                return await keep(connection)

        return await self._line.use(call)

    async def beat(self, terms: Sequence[UUID]) -> frozenset[int]:
        """Renews the leases of `terms` and this router's presence; returns the partitions that are still held."""

        async def call(connection: Connection) -> frozenset[int]:
            rows = await connection.fetch(
                "WITH here AS (INSERT INTO router.routers AS r (router, beat_at) VALUES ($1, clock_timestamp())"
                " ON CONFLICT (router) DO UPDATE SET beat_at = clock_timestamp())"
                " UPDATE router.leases SET expires_at = clock_timestamp() + $3"
                " WHERE owner = $1 AND term = ANY ($2::uuid[]) RETURNING partition",
                self._router,
                list(terms),
                self._ttl,
            )
            return frozenset(row["partition"] for row in rows)

        return await self._line.use(call)

    async def _listen(self, connection: Connection) -> None:
        await connection.add_listener(_FREED, lambda *_: self.on_freed())

    async def leases(self) -> tuple[list[LeaseRow], frozenset[str]]:
        """All leases in order, and the routers that were heard lately."""

        async def call(connection: Connection) -> tuple[list[LeaseRow], frozenset[str]]:
            rows = await connection.fetch(
                "SELECT partition, owner, term, expires_at < clock_timestamp() AS expired, expires_at,"
                " ARRAY(SELECT router FROM router.routers WHERE beat_at > clock_timestamp() - $1::interval) AS routers"
                " FROM router.leases ORDER BY partition",
                self._ttl,
            )
            return [LeaseRow(*row[:5]) for row in map(tuple, rows)], frozenset(rows[0]["routers"] if rows else ())

        return await self._line.use(call)

    async def acquire(self, partition: int, term: UUID, seen: UUID | None) -> AcquiredRow | None:
        """Takes a partition under a new term; None if somebody else has it. Waits for a commit in flight, at most 2
        s.
        """

        async def call(connection: Connection) -> AcquiredRow | None:
            try:
                row = await connection.fetchrow(
                    "SELECT * FROM router.acquire_partition($1, $2, $3, $4, $5)",
                    partition,
                    self._router,
                    term,
                    seen,
                    self._ttl,
                )
            except asyncpg.LockNotAvailableError:
                return None
            return AcquiredRow(*tuple(row)) if row is not None else None

        return await self._loads.use(call, anew=True)

    async def load(self, partition: int, term: UUID, strike: bool, found: Callable[[list[PendingRow]], None]) -> None:
        """Tells `found` page by page what is pending in a partition; raises FenceLost when the term is not current.

        The function has computed all rows before the first page: they are of one moment, however slowly they are read.
        """

        async def call(connection: Connection) -> None:
            # Rolled back only if the server has answered: with one that is silent the rollback would be waited for
            # without an end. Whoever gives the load up or has waited for too long gives the connection up, too.
            transaction = connection.transaction()
            try:
                async with asyncio.timeout(LOAD_S):
                    await transaction.start()
                    cursor = await connection.cursor(_LOAD, partition, term, int(strike))
                    rows = await cursor.fetch(_LOAD_PAGE, timeout=LOAD_S)
                    found([PendingRow(*row) for row in map(tuple, rows)])
                    while len(rows) == _LOAD_PAGE:
                        rows = await cursor.fetch(_LOAD_PAGE)
                        found([PendingRow(*row) for row in map(tuple, rows)])
                    is_ours = await connection.fetchval(_STILL_OURS, partition, term)
                    await (transaction.commit() if is_ours else transaction.rollback())
            except asyncpg.PostgresError as error:
                await transaction.rollback()
                if error.sqlstate == FENCED:
                    raise FenceLost(frozenset({partition})) from error
                raise
            if not is_ours:
                raise FenceLost(frozenset({partition}))

        await self._loads.use(call)

    async def undelivered_channels(self, partition: int) -> list[tuple[str, str]]:
        """(tenant, channel) pairs with outcomes waiting."""

        async def call(connection: Connection) -> list[tuple[str, str]]:
            rows = await connection.fetch(
                "SELECT tenant, channel FROM router.undelivered_channels($1)", partition, timeout=LOAD_S
            )
            return [(row["tenant"], row["channel"]) for row in rows]

        return await self._loads.use(call)

    async def release(self, terms: Sequence[UUID]) -> None:
        """Frees the leases of `terms` and tells the other routers."""
        await self._free(_RELEASE, terms)

    async def leave(self, terms: Sequence[UUID]) -> None:
        """The same, and this router is not counted any more: in one statement, or the others would keep what it freed
        for it.
        """
        await self._free(_LEAVE, terms)

    async def _free(self, statement: str, terms: Sequence[UUID]) -> None:
        async def call(connection: Connection) -> None:
            await connection.execute(statement, self._router, list(terms))

        await self._line.use(call)

    async def close(self) -> None:
        """Closes the connections."""
        await self._line.close()
        await self._loads.close()


async def _notice_our_end(connection: Connection) -> None:
    """Has the server end what it computes when this side has hung up, where it can tell: a load that was given up must
    not hold the rows that the next owner's load is about to write.
    """
    with suppress(asyncpg.PostgresError):
        await connection.execute("SET client_connection_check_interval = '500ms'")
