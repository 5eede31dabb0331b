"""Reads of a session that is long cost as much as they show, not as much as there is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.router.adapters.history_postgres import PostgresHistory
from services.router.domain.arrival import Policy
from services.router.domain.turn import Outcome, TurnStatus
from soma_common import ids
from tests.integration.router.store import Store, end, start
from tests.integration.router.test_commit_group_policies import MINE, arrives, refusal
from tests.unit.router.builders import a_session, a_turn, inbound, ingest

TURNS = 4000
WAITING = 500
SESSION = inbound("long").session_id


def key(name: str) -> bytes:
    return ids.content_hash(name.encode())


async def fill(store: Store) -> None:
    """A session with many turns, after which some messages wait, in tables with many others."""
    rows = range(1, TURNS + WAITING + 1)
    for session, prefix in ((SESSION, "m"), (key("another"), "o")):
        await store.eye.execute(
            "INSERT INTO router.sessions (session_id, partition, tenant, agent, channel, session, done_position,"
            " turn_count) VALUES ($1, 0, $2, 'a', 'c', $3, $4, $4)",
            session, MINE, prefix, TURNS,
        )  # fmt: skip
        await store.eye.execute(
            "INSERT INTO router.messages (partition, position, session_id, message_id, content_hash, tenant, kind,"
            " policy, deliver, fault, accept_ms, traceparent, content)"
            " SELECT $1, p, $2, i, i, $3, 1, 1, true, 0, 1, '', 'hi' FROM unnest($4::bigint[], $5::bytea[]) AS m(p, i)",
            int(prefix == "o"), session, MINE, list(rows), [key(f"{prefix}{n}") for n in rows],
        )  # fmt: skip
        await store.eye.execute(
            "INSERT INTO router.turns (turn_id, session_id, partition, tenant, number, first_position, last_position,"
            " status, outcome, step_count, agent_revision, end_time)"
            " SELECT i, $1, 0, $2, p, p, p, 3, 1, 1, 'r', now() FROM unnest($3::bigint[], $4::bytea[]) AS m(p, i)",
            session, MINE, list(rows)[:TURNS], [key(f"t{prefix}{n}") for n in rows][:TURNS],
        )  # fmt: skip
    await store.eye.execute("UPDATE router.partitions SET mail_floor = $1 WHERE id < 2", TURNS + 1)
    await store.eye.execute("ANALYZE router.sessions, router.messages, router.turns")


async def rows_read(store: Store, read: Callable[[PostgresHistory], Awaitable[object]]) -> int:
    """How many rows of the tables of turns and messages a read looks at."""
    await read(store.history)
    before = await _counted(store)
    await read(store.history)
    return await _counted(store) - before


async def _counted(store: Store) -> int:
    pool: Any = store.history._pool
    for holder in pool._holders:
        if holder._con is not None:
            await holder._con.fetchval("SELECT pg_stat_force_next_flush()")
    await store.eye.execute("SELECT pg_stat_clear_snapshot()")
    count = await store.eye.fetchval(
        "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_all_tables"
        " WHERE relid IN ('router.turns'::regclass, 'router.messages'::regclass)"
    )
    return int(count)


READS: dict[str, tuple[Callable[[PostgresHistory], Awaitable[object]], int]] = {
    "the turn of an old message": (lambda h: h.turn_answering(MINE, key("m7"), key("m7")), 20),
    "the turn of a waiting message": (lambda h: h.turn_answering(MINE, key("m4400"), key("m4400")), 20),
    "a page of messages": (lambda h: h.messages(MINE, SESSION, 2000, 51), 51 * 20),
    "a page of waiting messages": (lambda h: h.messages(MINE, SESSION, TURNS + 100, 51), 51 * 20 + 100),
    "the context of a turn": (lambda h: h.context(MINE, SESSION, 100), 300),
    "a session": (lambda h: h.session(MINE, SESSION), WAITING + 20),
    "turns of a session": (lambda h: h.session_turns(MINE, SESSION, None, 2000, 51), 300),
    "turns of a tenant": (lambda h: h.tenant_turns(MINE, None, None, 51), 300),
    "running turns of a tenant": (lambda h: h.tenant_turns(MINE, TurnStatus.RUNNING, None, 51), 2 * WAITING + 20),
}


async def test_reads_look_at_no_more_than_they_show(store: Store) -> None:
    await fill(store)
    read = {name: await rows_read(store, each) for name, (each, _) in READS.items()}
    assert all(read.values()), "they are counted"
    assert {name: count for name, count in read.items() if count > READS[name][1]} == {}


async def test_messages_of_every_kind_find_their_turn_and_their_place(store: Store) -> None:
    """Answered, refused in between, rolled back and answered again, running, waiting."""
    p = await store.take(0)
    session, first = await store.started(p, inbound("s", "1"), 1)
    refused = await arrives(store, session, "2", 2, Policy.REJECT)
    await store.commit(refusal(session, refused, "2"))
    await store.commit(end(first, Outcome.ABSORBED))
    session.turn_count = 1
    waits = ingest(p, 3, inbound("s", "3"))
    await store.commit(waits)
    again = a_turn(session, first.inputs[0])
    again.id, again.number, again.inputs = key("again"), 2, [first.inputs[0], waits.entries[0].message]
    await store.commit(start(again, fresh=False))
    for seq, name in ((4, "4"), (5, "5")):
        await arrives(store, session, name, seq)
    rows = await store.history.messages(MINE, session.id, 0, 10)
    turn_of_refused = ids.turn_id(session.id, inbound("s", "2").message_id)
    assert [(row.turn_id, row.queue_position) for row in rows] == [
        (again.id, 0), (turn_of_refused, 0), (again.id, 0), (None, 1), (None, 2),
    ]  # fmt: skip
    assert [row.queue_position for row in await store.history.messages(MINE, session.id, rows[-2].position, 10)] == [2]
    for row, name in zip(rows, "12345", strict=True):
        item = inbound("s", name)
        assert await store.history.turn_answering(MINE, item.message_id, item.content_hash) == row.turn_id


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 7, 8])
async def test_each_turn_is_found_however_many_there_are(store: Store, turns: int) -> None:
    p = await store.take(0)
    session = a_session(p, "s")
    for number in range(1, turns + 1):
        mail = ingest(p, number, inbound("s", str(number)))
        turn = a_turn(session, mail.entries[0].message)
        turn.number = number
        await store.commit(mail, start(turn))
        await store.commit(end(turn))
    await store.commit(ingest(p, turns + 1, inbound("s", "waits")))
    rows = await store.history.messages(MINE, session.id, 0, 20)
    expected = [ids.turn_id(session.id, inbound("s", str(number)).message_id) for number in range(1, turns + 1)]
    assert [row.turn_id for row in rows] == [*expected, None]
    assert [row.queue_position for row in rows] == [0] * turns + [1]
