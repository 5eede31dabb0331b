"""Which process carries out the undoing of a turn, in PostgreSQL: columns of `toolgw.reversals`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from services.toolgw.adapters.store_postgres import PostgresToolStore
from services.toolgw.application.hold_lease import LEASE_S
from services.toolgw.application.run_tool import Bounds
from services.toolgw.domain.reversal import StoppedTurn

# One look is enough, unlike for calls: where two processes undo one turn no compensation runs twice, as each is a call
# with a claim of its own. After a restart of the database nobody is held dead before each had time for a heartbeat.
_HAS_RUNNER: Final = f"""EXISTS (SELECT FROM toolgw.runners l WHERE l.runner = r.runner
    AND (l.expire_time > clock_timestamp()
        OR pg_postmaster_start_time() > clock_timestamp() - make_interval(secs => {LEASE_S})))"""


class PostgresReversalClaims(PostgresToolStore):
    """The tool store with the claims of reversals: both speak of the same process and its lease."""

    async def claim_reversal(self, turn: StoppedTurn) -> bool:
        """Make this process the one that undoes `turn`; False: another one that lives does, or it is decided."""
        async with self._transaction(turn.tenant) as connection:
            claimed = await connection.fetchval(
                "UPDATE toolgw.reversals r SET runner = $4, agent = $5, channel = $6, session = $7"
                " WHERE tenant = $1 AND session_id = $2 AND turn_id = $3 AND state = 'undoing'"
                f" AND (r.runner = $4 OR NOT {_HAS_RUNNER}) RETURNING true",
                turn.tenant,
                turn.session_id,
                turn.turn_id,
                self._runner,
                turn.agent,
                turn.channel,
                turn.session,
            )
        return bool(claimed)

    async def release_reversal(self, turn: StoppedTurn) -> None:
        """Say that this process no longer undoes `turn`."""
        async with self._transaction(turn.tenant) as connection:
            await connection.execute(
                "UPDATE toolgw.reversals SET runner = NULL"
                " WHERE tenant = $1 AND session_id = $2 AND turn_id = $3 AND runner = $4",
                turn.tenant,
                turn.session_id,
                turn.turn_id,
                self._runner,
            )

    async def left_reversals(self, bounds: Bounds) -> Sequence[StoppedTurn]:
        """Turns that were begun to be undone and that no living process undoes: the oldest of each tenant, within
        `bounds`."""
        async with self._transaction("*") as connection:
            rows = await connection.fetch(
                "SELECT tenant, agent, channel, session, turn_id FROM ("
                " SELECT r.*, row_number() OVER (PARTITION BY r.tenant ORDER BY r.create_time) AS place"
                " FROM toolgw.reversals r"
                f" WHERE r.state = 'undoing' AND r.session IS NOT NULL AND NOT {_HAS_RUNNER}"
                ") AS left_behind WHERE place <= $2 ORDER BY place, create_time LIMIT $1",
                bounds.of_process,
                bounds.of_tenant,
            )
        return [StoppedTurn(**row) for row in rows]
