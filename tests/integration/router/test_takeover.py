"""What a new owner loads: exactly what is open, whatever state a session is in, and at a cost of no more than that."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final
from uuid import UUID

import pytest

from soma_common import ids
from tests.integration.router.store import Store
from tests.integration.router.test_commit_group_policies import MINE

HERE: Final = 3
ENDED: Final = 3
ABSORBED: Final = 6
MESSAGE: Final = 1
CONTROLS: Final = (2, 3, 4)
FAR: Final = 10_000
"""A floor that is so far behind is not walked from."""
COLUMNS: Final = {
    "sessions": "session_id, partition, tenant, agent, channel, session, last_position, done_position,"
    " control_position, turn_count, delivery_count, paused",
    "messages": "partition, position, session_id, message_id, content_hash, tenant, kind, policy, deliver, fault,"
    " accept_ms, traceparent, content",
    "turns": "turn_id, session_id, partition, tenant, number, first_position, last_position, status, outcome, dispatch,"
    " strikes, agent_revision, on_trial",
}


def key(name: str) -> bytes:
    return ids.content_hash(name.encode())


@dataclass(slots=True)
class Tables:
    """Rows as a router may have left them, in columns of COLUMNS."""

    sessions: list[tuple[Any, ...]] = field(default_factory=list)
    messages: list[tuple[Any, ...]] = field(default_factory=list)
    turns: list[tuple[Any, ...]] = field(default_factory=list)

    def message(self, partition: int, position: int, session: bytes, kind: int = MESSAGE) -> None:
        own = key(f"{partition}/{position}")
        content = b"x" * (position % 7)
        self.messages.append(
            (partition, position, session, own, own, MINE, kind, 1 + position % 6, position % 2 == 0, 0, 1, "", content)
        )

    def session(self, partition: int, name: str, last: int, done: int, control: int, turns: int, paused: bool) -> None:
        self.sessions.append(
            (key(name), partition, MINE, "a", "c", name, last, done, control, turns, turns + 1, paused),
        )

    def turn(self, session: bytes, number: int, first: int, last: int, *more: object) -> None:
        """`more`: status, outcome, dispatch, strikes, on_trial."""
        status, outcome, dispatch, strikes, on_trial = more
        name = key(f"{session.hex()}/{number}")
        row = (name, session, HERE, MINE, number, first, last, status, outcome, dispatch, strikes, "r", on_trial)
        self.turns.append(row)

    async def write(self, store: Store, floor: int) -> UUID:
        """Puts the rows there and takes the partition; its term."""
        partition = await store.take(HERE)
        for table, columns in COLUMNS.items():
            await store.eye.copy_records_to_table(
                table, schema_name="router", columns=columns.split(", "), records=getattr(self, table)
            )
        await store.eye.execute(
            "UPDATE router.partitions SET mail_floor = $2,"
            " mail_head = (SELECT max(position) FROM router.messages WHERE partition = $1) WHERE id = $1",
            HERE, floor,
        )  # fmt: skip
        await store.eye.execute("ANALYZE router.sessions, router.messages, router.turns")
        return partition.term


def in_every_state(dice: random.Random, first: int, count: int) -> Tables:
    """Sessions of one partition, whose messages, controls, refusals, turns and rollbacks lie among each other."""
    tables = Tables()
    positions: dict[str, list[int]] = {}
    for position in range(first, first + count):
        name = f"s{dice.randrange(40)}"
        kind = dice.choice(CONTROLS) if dice.random() < 0.15 else MESSAGE
        tables.message(HERE, position, key(name), kind)
        positions.setdefault(name, []).append(position)
    kinds = {row[1]: row[6] for row in tables.messages}
    for name, own in positions.items():
        done = dice.choice([0, own[-1], dice.choice(own), dice.choice(own)])
        count_of_turns = dice.randrange(4)
        control = dice.choice([0, own[-1], dice.choice(own)])
        tables.session(HERE, name, own[-1], done, control, count_of_turns, dice.random() < 0.2)
        behind = [position for position in own if position > done and kinds[position] == MESSAGE]
        for position in behind[1:]:
            if dice.random() < 0.3:
                tables.turn(key(name), -position, position, position, ENDED, 3, 1, 0, False)
        if count_of_turns:
            begin, end = sorted(dice.choices(own, k=2))
            outcome = dice.choice([1, ABSORBED])
            tables.turn(key(name), count_of_turns, begin, end, ENDED, outcome, 1, 0, False)
        if behind and dice.random() < 0.6:
            until = dice.choice(behind)
            more = (dice.choice([1, 2]), 0, dice.randrange(1, 4), dice.randrange(4), dice.random() < 0.3)
            tables.turn(key(name), count_of_turns + 1, behind[0], until, *more)
    return tables


def said_before(tables: Tables, partition: int, count: int) -> None:
    """A long past in which everything has been answered."""
    for number in range(count // 10):
        tables.session(partition, f"past {partition} {number}", number * 10 + 10, number * 10 + 10, 0, 0, False)
    for position in range(1, count + 1):
        tables.message(partition, position, key(f"past {partition} {(position - 1) // 10}"))


async def expected(store: Store, floor: int, strike: int) -> tuple[list[tuple[Any, ...]], set[tuple[Any, ...]]]:
    """What is to be loaded, and the turns as they are to be then: by the rules, from all that is in the tables."""
    sessions = {row["session_id"]: row for row in await store.eye.fetch("SELECT * FROM router.sessions")}
    turns = {(row["session_id"], row["number"]): row for row in await store.eye.fetch("SELECT * FROM router.turns")}
    messages = await store.eye.fetch("SELECT * FROM router.messages WHERE partition = $1 ORDER BY position", HERE)
    loaded: list[tuple[Any, ...]] = []
    raised: set[bytes] = set()
    for row in messages:
        session, position = sessions[row["session_id"]], row["position"]
        running = turns.get((session["session_id"], session["turn_count"] + 1))
        if running is not None and running["status"] == ENDED:
            running = None
        if position < floor:
            continue
        if position > session["done_position"] and running is not None:
            raised.add(running["turn_id"])
        if row["kind"] >= CONTROLS[0]:
            if position <= session["control_position"]:
                continue
        elif position <= session["done_position"] or (session["session_id"], -position) in turns:
            continue
        former = turns.get((session["session_id"], session["turn_count"]))
        dropped = False
        if former is not None and former["outcome"] == ABSORBED:
            dropped = former["first_position"] <= position <= former["last_position"]
        shown = (running["turn_id"], running["first_position"], running["last_position"]) if running else (None,) * 3
        later = running is not None and row["ingest_time"] >= running["create_time"]
        loaded.append(
            (position, row["message_id"], row["kind"], row["policy"], row["deliver"], session["session_id"])
            + (session["turn_count"], session["paused"], dropped, later, len(row["content"]), *shown)
        )
    after: set[tuple[Any, ...]] = set()
    for turn in turns.values():
        struck = turn["strikes"] < 2 or turn["on_trial"]
        own = (turn["dispatch"], turn["strikes"], turn["on_trial"])
        if turn["turn_id"] in raised:
            own = (turn["dispatch"] + 1, turn["strikes"] + strike * struck, False)
        after.add((turn["turn_id"], *own))
    return loaded, after


LOADED: Final = (
    "SELECT position, message_id, kind, policy, deliver, session_id, turn_count, paused, rolled_back, came_later, size,"
    " turn_id, first_position, last_position FROM router.load_partition($1, $2, $3)"
)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("past", [0, FAR + 500], ids=["near", "far"])
async def test_what_is_open_is_loaded_whatever_state_it_is_in(store: Store, past: int, seed: int) -> None:
    dice = random.Random(seed)
    tables = in_every_state(dice, past + 1, 300)
    said_before(tables, HERE, past)
    floor = 1 if past else dice.choice([1, 40])
    term = await tables.write(store, floor)
    for strike in (0, 1, 1, 1):
        loaded, after = await expected(store, floor, strike)
        assert len(loaded) > 50
        rows = await store.eye.fetch(LOADED, HERE, term, strike)
        assert [tuple(row) for row in rows] == loaded
        assert set(await store.rows("turns", "turn_id, dispatch, strikes, on_trial")) == after


async def rows_read(store: Store, term: UUID) -> dict[str, int]:
    """How many rows of each table a load looks at."""
    await store.eye.execute("SELECT pg_stat_force_next_flush()")
    transaction = store.eye.transaction()
    await transaction.start()
    await store.eye.fetch(LOADED, HERE, term, 0)
    rows = await store.eye.fetch(
        "SELECT relname, seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_all_tables"
        " WHERE schemaname = 'router' AND relname = ANY ($1)",
        list(COLUMNS),
    )
    await transaction.rollback()
    return {row[0]: row[1] for row in rows}


async def test_a_load_looks_at_what_is_open_and_not_at_what_was_said_since(store: Store) -> None:
    """One message waits in a paused session and keeps the floor at 1, while all others are answered above it."""
    tables = Tables()
    said_before(tables, HERE, 2 * FAR)
    said_before(tables, HERE + 1, 2 * FAR)
    first = tables.messages[0]
    tables.messages[0] = (*first[:2], key("paused"), *first[3:])
    tables.session(HERE, "paused", 1, 0, 0, 0, True)
    term = await tables.write(store, 1)
    assert [row["position"] for row in await store.eye.fetch(LOADED, HERE, term, 0)] == [1]
    read = await rows_read(store, term)
    sessions = sum(row[1] == HERE for row in tables.sessions)
    assert 0 < read["messages"] < 20
    assert read["turns"] < 20
    assert sessions <= read["sessions"] < sessions + 20, "its own sessions, once"


async def test_a_load_with_a_floor_near_the_head_does_not_look_at_all_sessions(store: Store) -> None:
    tables = Tables()
    said_before(tables, HERE, 2 * FAR)
    tables.message(HERE, 2 * FAR + 1, key("last"))
    tables.session(HERE, "last", 2 * FAR + 1, 0, 0, 0, False)
    term = await tables.write(store, 2 * FAR - 9)
    assert [row["position"] for row in await store.eye.fetch(LOADED, HERE, term, 0)] == [2 * FAR + 1]
    read = await rows_read(store, term)
    assert {table: count for table, count in read.items() if count > 50} == {}


async def test_a_version_of_a_turn_has_room_on_its_page(store: Store) -> None:
    """Groups that start turns, and end all of them at once: no index is written for the ends."""
    partition = await store.take(0)
    names = [f"s{number}" for number in range(200)]
    await fill_and_end(store, partition.id, names)
    await store.eye.execute("SELECT pg_stat_force_next_flush()")
    row = await store.eye.fetchrow(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_all_tables WHERE relid = 'router.turns'::regclass"
    )
    assert row is not None
    updates, without_an_index = row
    assert updates == len(names)
    assert without_an_index > 0.95 * updates, "a version that ends is a little longer: the last of a page may not fit"


async def fill_and_end(store: Store, partition: int, names: list[str]) -> None:
    for half, in_group in groupby(names, lambda name: int(name[1:]) // 50):
        own = [key(name) for name in in_group]
        await store.eye.execute(
            "INSERT INTO router.turns (turn_id, session_id, partition, tenant, number, first_position, last_position,"
            " agent_revision) SELECT i, i, $1, $2, 1, 1, 1, 'r' FROM unnest($3::bytea[]) i",
            partition, f"{MINE}{half}", own,
        )  # fmt: skip
        await store.eye.execute(
            "UPDATE router.turns SET status = 3, outcome = 1, end_time = now() WHERE turn_id = ANY ($1::bytea[])", own
        )
