"""Fills a stack's database with history: the rows that the product would have written for so many ended turns.

Every row is as the router's own: ids derived from names, positions dense in their partition, messages of all sessions
in turns (as they would have come), so that the rows of one session lie far apart on the disk. `check` compares a
loaded turn with one that the router wrote, column by column: a migration that changes the rows is noticed.

The router need not stop: when its partitions are moved on it is fenced, and takes them again from what the store has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

import asyncpg
from soma.common.v1.message_pb2 import Message, Part, Role
from soma.common.v1.turn_pb2 import FinalMessage, StepBody

from soma_common import ids
from soma_common.embedded.postgres import PostgresConfig, PostgresServer
from tests.bench.stack import TENANT, Stack

CHANNELS: Final = 4
_TEXT_LENGTH: Final = 256
_DAYS: Final = 30
_TURN_TOOK: Final = timedelta(milliseconds=20)
_TABLES: Final = ("sessions", "messages", "turns", "steps")
_OWN: Final = {
    "session_id", "message_id", "turn_id", "content_hash", "content", "body", "partition", "position", "number",
    "session", "first_position", "last_position", "done_position", "message_count", "turn_count", "delivery_count",
    "accept_ms", "ingest_time", "create_time", "end_time", "update_time", "agent_revision", "channel",
}  # fmt: skip
"""Columns whose values differ from turn to turn."""

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@dataclass(frozen=True, slots=True)
class History:
    """What is loaded: `turns` ended turns of each of `sessions` sessions of an agent."""

    agent: str
    sessions: int
    turns: int

    @property
    def messages(self) -> int:
        """Messages of users in all."""
        return self.sessions * self.turns

    def session(self, number: int) -> tuple[int, str]:
        """(number of the channel, name) of a session."""
        return number % CHANNELS, f"known-{number}"


def channel(number: int) -> str:
    """The name of a channel of the history."""
    return f"history-{number}"


class Template:
    """Bytes with a text of fixed length in them."""

    def __init__(self, serialized: bytes, text: str) -> None:
        self._before, self._after = serialized.split(text.encode())

    def with_text(self, text: str) -> bytes:
        """The same with another text of the same length."""
        return b"".join((self._before, text.encode(), self._after))


def said(session: str, number: int) -> str:
    """What message `number` of a session says."""
    return f"message {number} of {session} ".ljust(_TEXT_LENGTH, "x")


def templates(model: str = "echo/echo") -> tuple[Template, Template]:
    """A user's message, and the body of the final step that echoes it."""
    text = "t" * _TEXT_LENGTH
    question = Message(role=Role.ROLE_USER, parts=[Part(text=text)])
    answer = Message(role=Role.ROLE_ASSISTANT, parts=[Part(text=text)])
    final = StepBody(format=1, final=FinalMessage(message=answer, model=model, inputs_seen=1))
    return Template(question.SerializeToString(), text), Template(final.SerializeToString(), text)


class Rows:
    """The rows of a history, turn after turn over all sessions."""

    def __init__(self, history: History, revision: str, partitions: int, heads: dict[int, tuple[int, int]]) -> None:
        """`heads` are (mail_head, head) of each partition as they are now."""
        self._history, self._revision = history, revision
        self._question, self._answer = templates()
        self._heads = dict(heads)
        self._began = datetime.now(UTC) - timedelta(days=_DAYS)
        self._gap = timedelta(days=_DAYS) / history.messages
        self._sessions = []
        """(id, partition, channel, name)."""
        for number in range(history.sessions):
            at, name = history.session(number)
            id_ = ids.session_id(TENANT, history.agent, channel(at), name)
            self._sessions.append((id_, ids.partition_of(id_, partitions), channel(at), name))
        self._last = [0] * history.sessions
        """Position of each session's last message."""

    @property
    def heads(self) -> dict[int, tuple[int, int]]:
        """(mail_head, head) of each partition after what was given out."""
        return self._heads

    def turn(self, number: int) -> dict[str, list[tuple[Any, ...]]]:
        """Rows by table of the turn `number` (from 1) of every session."""
        messages, turns, steps = [], [], []
        agent, revision = self._history.agent, self._revision
        at = self._began + (number - 1) * self._history.sessions * self._gap
        for place, (session_id, partition, on, name) in enumerate(self._sessions):
            at += self._gap
            mail, head = self._heads[partition]
            self._heads[partition] = mail + 1, head + 1
            self._last[place] = position = mail + 1
            text = said(name, number)
            content = self._question.with_text(text)
            message_id = ids.message_id(TENANT, agent, on, name, str(number))
            turn_id = ids.turn_id(session_id, message_id)
            messages.append((
                partition, position, session_id, message_id, ids.content_hash(content), TENANT, 1, 1, True, 0,
                int(at.timestamp() * 1000), None, "", content, 0, 0, at,
            ))  # fmt: skip
            end = at + _TURN_TOOK
            turns.append((
                turn_id, session_id, partition, TENANT, number, position, position, 3, 1, 1, 0, 1, revision, at, end,
            ))  # fmt: skip
            steps.append((turn_id, 1, TENANT, 3, 1, end, self._answer.with_text(text)))
        return {"messages": messages, "turns": turns, "steps": steps}

    def sessions(self) -> Iterator[tuple[Any, ...]]:
        """The rows of the sessions, after their turns."""
        turns, now = self._history.turns, datetime.now(UTC)
        for (id_, partition, on, name), last in zip(self._sessions, self._last, strict=True):
            yield (
                id_, partition, TENANT, self._history.agent, on, name, self._began, now, turns, last, last, 0, turns,
                turns, False,
            )  # fmt: skip


_COLUMNS: Final = {
    "messages": (
        "partition", "position", "session_id", "message_id", "content_hash", "tenant", "kind", "policy", "deliver",
        "fault", "accept_ms", "target_turn", "traceparent", "content", "debounce_ms", "debounce_max_ms", "ingest_time",
    ),
    "turns": (
        "turn_id", "session_id", "partition", "tenant", "number", "first_position", "last_position", "status",
        "outcome", "dispatch", "strikes", "step_count", "agent_revision", "create_time", "end_time",
    ),
    "steps": ("turn_id", "step", "tenant", "kind", "dispatch", "create_time", "body"),
    "sessions": (
        "session_id", "partition", "tenant", "agent", "channel", "session", "create_time", "update_time",
        "message_count", "last_position", "done_position", "control_position", "turn_count", "delivery_count", "paused",
    ),
}  # fmt: skip


def dsn_of(stack: Stack, user: str = "soma") -> str:
    """Where a stack's database is."""
    return PostgresServer(PostgresConfig(stack.home / "postgres")).dsn(user)


async def load(stack: Stack, history: History) -> None:
    """Puts a history into the database of a stack in which the agent has answered something and nothing runs."""
    connections = {table: await asyncpg.connect(dsn_of(stack)) for table in ("messages", "turns", "steps")}
    try:
        main = connections["messages"]
        revision = await main.fetchval("SELECT revision FROM router.agent_revisions WHERE agent = $1", history.agent)
        assert revision is not None, f"{history.agent} has not answered anything yet"
        heads = {
            row[0]: (row[1], row[2]) for row in await main.fetch("SELECT id, mail_head, head FROM router.partitions")
        }
        rows = Rows(history, revision, len(heads), heads)
        for number in range(1, history.turns + 1):
            batch = rows.turn(number)
            await asyncio.gather(*(_copy(connections[table], table, batch[table]) for table in connections))
        await _copy(main, "sessions", rows.sessions())
        # The router's next commit is fenced by this, and it takes the partitions again as they are now.
        await main.executemany(
            "UPDATE router.partitions SET mail_head = $2, head = $3, mail_floor = $2::bigint + 1 WHERE id = $1",
            [(partition, mail, head) for partition, (mail, head) in rows.heads.items()],
        )
        await settle(main)
    finally:
        for connection in connections.values():
            await connection.close()


async def settle(connection: Connection) -> None:
    """Brings the database to where autovacuum and checkpoints have nothing left to do from the load."""
    for table in (*_TABLES, "partitions", "deliveries"):
        await connection.execute(f"VACUUM (ANALYZE) router.{table}")
    await connection.execute("CHECKPOINT")


async def _copy(connection: Connection, table: str, records: Any) -> None:
    await connection.copy_records_to_table(table, schema_name="router", columns=_COLUMNS[table], records=records)


async def check(stack: Stack, history: History) -> None:
    """A turn of the history is like one that the router wrote for one of its sessions, column by column.

    Raises AssertionError with what differs.
    """
    connection = await asyncpg.connect(dsn_of(stack))
    try:
        grown = await connection.fetchrow(
            "SELECT * FROM router.turns WHERE number = $1 ORDER BY create_time DESC LIMIT 1", history.turns + 1
        )
        assert grown is not None, "the router has written no turn for a session of the history"
        loaded = await connection.fetchrow(
            "SELECT * FROM router.turns WHERE session_id = $1 AND number = $2", grown["session_id"], history.turns
        )
        assert loaded is not None
        _alike("turns", grown, loaded)
        for table, key, column in (("steps", "turn_id", "turn_id"), ("messages", "position", "first_position")):
            pair = [
                await connection.fetchrow(
                    f"SELECT x.* FROM router.{table} x JOIN router.turns t USING ({_joined(table)})"
                    f" WHERE t.turn_id = $1 AND x.{key} = t.{column}",
                    turn["turn_id"],
                )
                for turn in (grown, loaded)
            ]
            _alike(table, *pair)
    finally:
        await connection.close()


def _joined(table: str) -> str:
    return "turn_id" if table == "steps" else "session_id"


def _alike(table: str, grown: asyncpg.Record | None, loaded: asyncpg.Record | None) -> None:
    assert grown is not None, f"the router has written no row to {table}"
    assert loaded is not None, f"nothing was loaded into {table}"
    differ = {
        column: (value, loaded[column])
        for column, value in grown.items()
        if column not in _OWN and value != loaded[column]
    }
    assert not differ, f"rows of {table}, the router's and the loader's: {differ}"
    unset = [column for column in _OWN & set(grown.keys()) if (grown[column] is None) != (loaded[column] is None)]
    assert not unset, f"rows of {table}: set in one of them only: {unset}"
