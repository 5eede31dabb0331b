"""PostgreSQL: what was said before in sessions that nobody holds in memory.

Everybody who asks while a query runs is answered by the next one, over all tenants: a crowd of turns costs a few
queries, not one each, and its turns go on together. A session that is asked for alone waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from soma.common.v1.turn_pb2 import StepBody

from services.router.application.group import StoreLost

_AT_ONCE: Final = 2
"""Queries in flight."""
_MOST: Final = 64
"""Sessions in a query."""
_NEWEST: Final = 2**62
_TURN, _MESSAGE, _REFUSED = 1, 2, 3

# By key and by ranges of a session, never a probe per message: a session of ten turns is two ranges and ten answers.
# OFFSET 0 keeps what is read by key from becoming a join. `tenant` is asked beside the policy, which here lets rows of
# several tenants through.
CONTEXTS: Final = f"""
WITH said AS MATERIALIZED (
    SELECT a.place, a.tenant, a.session_id, t.*
    FROM unnest($1::text[], $2::bytea[], $3::bigint[], $4::bigint[])
        WITH ORDINALITY AS a(tenant, session_id, below, most, place)
    CROSS JOIN LATERAL (
        SELECT t.turn_id, t.number, t.first_position, t.last_position, t.step_count
        FROM router.turns t
        WHERE t.session_id = a.session_id AND t.tenant = a.tenant AND t.number > 0 AND t.number < a.below
            AND t.status = 3 AND t.outcome <> 6 -- what was rolled back was said again in the turn that took its place
        ORDER BY t.number DESC LIMIT a.most
    ) t
), spans AS MATERIALIZED (
    SELECT place, tenant, session_id, min(first_position) AS low, max(last_position) AS high
    FROM said GROUP BY place, tenant, session_id
)
SELECT {_TURN} AS kind, s.place, s.number, s.first_position AS low, s.last_position AS high,
    (SELECT p.body FROM router.steps p
     WHERE p.turn_id = s.turn_id AND p.step = s.step_count AND p.kind = 3 AND p.tenant = s.tenant) AS body
FROM said s
UNION ALL
SELECT {_MESSAGE}, s.place, 0, m.position, 0, m.content
FROM spans s CROSS JOIN LATERAL (
    SELECT m.position, m.content FROM router.messages m
    WHERE m.session_id = s.session_id AND m.position BETWEEN s.low AND s.high AND m.kind < 2 AND m.tenant = s.tenant
    OFFSET 0
) m
UNION ALL
SELECT {_REFUSED}, s.place, 0, r.first_position, 0, NULL
FROM spans s CROSS JOIN LATERAL (
    SELECT r.first_position FROM router.turns r
    WHERE r.session_id = s.session_id AND r.number BETWEEN -s.high AND -s.low AND r.tenant = s.tenant
    OFFSET 0
) r
"""
"""Ended turns of sessions, newest first, with their answers; the messages in their range, and which of these were
refused (they are no turn's)."""

Fetch = Callable[[str, str, Sequence[object]], Awaitable[Sequence[Any]]]
"""Runs a query for a list of tenants, separated by commas. Raises StoreLost."""


@dataclass(slots=True)
class _Asked:
    """A session that somebody waits for: its newest `most` turns below number `below`."""

    tenant: str
    session_id: bytes
    below: int
    most: int
    answer: asyncio.Future[_Said]


@dataclass(slots=True)
class _Said:
    """What a query found of a session."""

    turns: list[tuple[int, int, int, bytes | None]] = field(default_factory=list)
    """(number, first position, last position, body of the final step), newest first."""
    messages: dict[int, bytes] = field(default_factory=dict)
    """By position."""

    def in_order(self) -> list[bytes]:
        """Serialized messages, oldest first: of each turn its inputs, and its answer if there was one."""
        positions = sorted(self.messages)
        said: list[bytes] = []
        for _, low, high, body in reversed(self.turns):
            said += (self.messages[position] for position in positions if low <= position <= high)
            if body is not None:
                said.append(StepBody.FromString(body).final.message.SerializeToString())
        return said


class ContextReader:
    """Gathers what is asked for and reads it with `fetch`."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._waiting: list[_Asked] = []
        self._readers: set[asyncio.Task[None]] = set()

    async def newest(self, tenant: str, session_id: bytes, limit: int) -> list[bytes]:
        """The newest `limit` messages of a session's ended turns, oldest first. Raises StoreLost."""
        said: list[bytes] = []
        below = _NEWEST
        while len(said) < limit:
            # A turn is mostly a message and its answer.
            most = (limit - len(said) + 1) // 2
            found = await self._ask(tenant, session_id, below, most)
            said = found.in_order() + said
            if len(found.turns) < most:
                break
            below = found.turns[-1][0]
        return said[-limit:]

    async def close(self) -> None:
        """Ends the reads in flight."""
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _ask(self, tenant: str, session_id: bytes, below: int, most: int) -> _Said:
        answer: asyncio.Future[_Said] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(tenant, session_id, below, most, answer))
        if len(self._readers) < _AT_ONCE:
            self._readers.add(asyncio.create_task(self._read(), name="context reader"))
        return await answer

    async def _read(self) -> None:
        try:
            await self._answer_waiting()
        finally:
            # In the same step as the last look: whoever asks from here on must not count on this reader.
            self._readers.discard(asyncio.current_task())

    async def _answer_waiting(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
            try:
                rows = await self._fetch(
                    ",".join(sorted({each.tenant for each in asked})),
                    CONTEXTS,
                    (
                        [each.tenant for each in asked],
                        [each.session_id for each in asked],
                        [each.below for each in asked],
                        [each.most for each in asked],
                    ),
                )
            except StoreLost as error:
                _answer_all(asked, str(error))
            except BaseException:
                _answer_all([*asked, *self._waiting], "the reader has ended")
                self._waiting = []
                raise
            else:
                _answer(asked, rows)


def _answer(asked: list[_Asked], rows: Sequence[Any]) -> None:
    found: dict[int, _Said] = defaultdict(_Said)
    refused: list[tuple[int, int]] = []
    for kind, place, number, low, high, body in rows:
        if kind == _TURN:
            found[place].turns.append((number, low, high, body))
        elif kind == _MESSAGE:
            found[place].messages[low] = body
        else:
            refused.append((place, low))
    for place, position in refused:
        found[place].messages.pop(position, None)
    for place, each in enumerate(asked, start=1):
        said = found[place]
        said.turns.sort(reverse=True)
        if not each.answer.done():
            each.answer.set_result(said)


def _answer_all(asked: list[_Asked], reason: str) -> None:
    for each in asked:
        if not each.answer.done():
            each.answer.set_exception(StoreLost(reason))
