"""`make bench ARGS=history`: whether a turn costs more with a million messages in the database than with few.

Two stacks run side by side, the one with a small history and the other with a large one; rounds of the same load take
turns between them, so that what the machine does meets both. Three loads: `new`, conversations that began a moment ago;
`known`, each turn in another session of the history, which is in nobody's memory, so that its context is read from the
store (the small stack's sessions are more than the router keeps, and are gone round); and `one`, a single session.

Before it measures, the loader's rows are compared with the router's own, the context and the API of loaded sessions
are read, and reads that an operator does are timed on both.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from statistics import median
from time import monotonic
from typing import Any, Final

import asyncpg
import uvloop
from soma.common.v1.message_pb2 import Message

from services.router.adapters.history_postgres import PostgresHistory
from soma_common import ids
from tests.bench import flat, history_load
from tests.bench import stack as stacks
from tests.bench.history_load import CHANNELS, History
from tests.bench.rotation import Line, Rotation

AGENT: Final = "echo"
CONTEXT_MESSAGES: Final = 20
WITHIN: Final = 0.10
SMALL_SESSIONS: Final = 4000
"""More than a router keeps in memory: going round them, each turn finds its session gone."""
_WARM_S: Final = 1.0
_READS: Final = 20


@dataclass(frozen=True)
class Plan:
    """How much history, and how long is measured."""

    sessions: int = 100_000
    turns: int = 10
    rounds: int = 5
    seconds: float = 5.0


@dataclass
class Side:
    """One of the two stacks and its history."""

    stack: stacks.Stack
    history: History
    lines: list[Line]
    load_s: float = 0.0


async def measure(plan: Plan, say: flat.Say) -> bool:
    """Loads both stacks, checks what was loaded, measures."""
    async with AsyncExitStack() as running:
        sides = {}
        for name, sessions in (("small", min(SMALL_SESSIONS, plan.sessions)), ("full", plan.sessions)):
            say(f"{name}: {sessions * plan.turns} messages of {sessions} sessions ...")
            sides[name] = await running.enter_async_context(_side(History(AGENT, sessions, plan.turns)))
            say(f"  loaded in {sides[name].load_s:.1f} s; {await _size(sides[name]):.0f} MB")
            await _prove(sides[name])
        say("loaded rows are like the router's own; context and API of loaded sessions are as they should be")
        reads = {name: await _reads(side) for name, side in sides.items()}
        cases: dict[str, list[dict[str, Any]]] = {}
        for number in range(plan.rounds):
            for case in _CASES:
                # The other way round in every second round: who comes first has no advantage.
                for name in sorted(sides, reverse=number % 2 == 0):
                    seen = await _round(sides[name], case, number, plan.seconds)
                    cases.setdefault(f"{case} {name}", []).append(seen)
                    say(f"round {number + 1}: {case} {name} {seen['turns_per_s']:.0f}/s p50 {seen['p50_ms']:.2f} ms")
        kept = {name: await _housekeeping(side) for name, side in sides.items()}
    say(flat.table(f"{plan.sessions * plan.turns} messages against {SMALL_SESSIONS * plan.turns}", cases))
    for read in reads["full"]:
        say(f"  {read}: {reads['small'][read]:.2f} ms small, {reads['full'][read]:.2f} ms full")
    for name, rows in kept.items():
        say(f"  {name}: " + "; ".join(f"{table} {said}" for table, said in rows.items()))
    result = {"cases": cases, "reads_ms": reads, "housekeeping": kept, "load_s": sides["full"].load_s}
    return flat.conclude("history", result, bars(cases), say)


def bars(cases: Mapping[str, list[dict[str, Any]]]) -> list[flat.Bar]:
    """Full against small, round by round."""
    told = []
    for case in _CASES:
        full, small = cases[f"{case} full"], cases[f"{case} small"]
        told.append(flat.Bar(f"{case}: turns/s full by small", flat.ratio(full, small, "turns_per_s"), 1 - WITHIN))
        told.append(flat.Bar(f"{case}: p50 full by small", flat.ratio(full, small, "p50_ms"), most=1 + WITHIN))
    return told


@asynccontextmanager
async def _side(history: History) -> Any:
    stack = await stacks.start()
    try:
        await stack.agent(AGENT, "echo/echo", CONTEXT_MESSAGES)
        lines = [Line(stacks.TENANT, stack.token, history_load.channel(number)) for number in range(CHANNELS)]
        side = Side(stack, history, lines)
        await _answered(side, [(0, "first")])
        began = monotonic()
        await history_load.load(stack, history)
        side.load_s = monotonic() - began
        yield side
    finally:
        await stacks.stop(stack)


async def _answered(side: Side, sessions: list[tuple[int, str]]) -> None:
    """A turn in each of the sessions."""
    load = Rotation(side.stack.gateway, AGENT, side.lines, sessions, min(len(sessions), 8), again=False)
    async with load:
        await load.drained()
    assert load.over, "a message was not answered"
    assert load.ended == len(sessions), f"{load.ended} of {len(sessions)} messages were answered"


async def _prove(side: Side) -> None:
    """Loaded sessions go on as if they had been talked with: in every partition."""
    history = side.history
    sessions = [history.session(number) for number in range(0, history.sessions, history.sessions // 50)]
    await _answered(side, sessions)
    await history_load.check(side.stack, history)
    reader = await PostgresHistory.open(history_load.dsn_of(side.stack, "soma_router"), "bench")
    try:
        for at, name in sessions:
            session_id = ids.session_id(stacks.TENANT, AGENT, history_load.channel(at), name)
            said = await reader.context(stacks.TENANT, session_id, CONTEXT_MESSAGES)
            texts = [Message.FromString(each).parts[0].text.split(" x")[0] for each in said[:-2]]
            # What was loaded less the oldest, for the turn that came since.
            numbers = [n for n in range(1, history.turns + 1) for _ in "qa"][-(CONTEXT_MESSAGES - 2) :]
            assert texts == [f"message {number} of {name}" for number in numbers], f"the context of {name} is {texts}"
            turns = await reader.session_turns(stacks.TENANT, session_id, None, 0, 1000)
            assert [turn.number for turn in turns] == list(range(1, history.turns + 2)), f"turns of {name}"
            messages = await reader.messages(stacks.TENANT, session_id, 0, 1000)
            assert [each.turn_id for each in messages] == [turn.turn_id for turn in turns], f"messages of {name}"
    finally:
        await reader.close()


async def _reads(side: Side) -> dict[str, float]:
    """Medians in milliseconds of what the API reads."""
    reader = await PostgresHistory.open(history_load.dsn_of(side.stack, "soma_router"), "bench")
    tenant, history = stacks.TENANT, side.history
    known = []
    for _ in range(_READS):
        at, name = history.session(random.randrange(history.sessions))
        known.append(ids.session_id(tenant, AGENT, history_load.channel(at), name))
    first = ("", "", "")
    asked: dict[str, Callable[[bytes], Awaitable[object]]] = {
        "context of a session": lambda id_: reader.context(tenant, id_, CONTEXT_MESSAGES),
        "a session": lambda id_: reader.session(tenant, id_),
        "its messages": lambda id_: reader.messages(tenant, id_, 0, 50),
        "its turns": lambda id_: reader.session_turns(tenant, id_, None, 0, 50),
        "newest turns of the tenant": lambda _: reader.tenant_turns(tenant, None, None, 50),
        "running turns of the tenant": lambda _: reader.tenant_turns(tenant, 1, None, 50),
        "sessions": lambda _: reader.sessions(tenant, None, None, None, first, 50),
        "busy sessions": lambda _: reader.sessions(tenant, None, None, True, first, 50),
    }
    try:
        return {name: await _timed(read, known) for name, read in asked.items()}
    finally:
        await reader.close()


async def _timed(read: Callable[[bytes], Awaitable[object]], known: list[bytes]) -> float:
    await read(known[0])
    taken = []
    for session_id in known:
        began = monotonic()
        await read(session_id)
        taken.append(monotonic() - began)
    return median(taken) * 1000


_CASES: Final = ("new", "known", "one")


async def _round(side: Side, case: str, number: int, seconds: float) -> dict[str, Any]:
    history = side.history
    if case == "known":
        # Every round goes on where the one before has stopped, in an order that is not the one of the rows.
        order = list(range(history.sessions))
        random.Random(history.sessions).shuffle(order)
        start = number * history.sessions // 8
        sessions = [history.session(each) for each in order[start:] + order[:start]]
        in_flight = 64
    else:
        in_flight = 1 if case == "one" else 64
        sessions = [(each % CHANNELS, f"{case}-{number}-{each}") for each in range(in_flight)]
    async with Rotation(side.stack.gateway, AGENT, side.lines, sessions, in_flight) as load:
        await load.measure(_WARM_S)
        return await flat.sample(side.stack, load, seconds)


async def _size(side: Side) -> float:
    connection = await asyncpg.connect(history_load.dsn_of(side.stack))
    try:
        return float(await connection.fetchval("SELECT pg_database_size(current_database())")) / 1e6
    finally:
        await connection.close()


async def _housekeeping(side: Side) -> dict[str, str]:
    """What updates and autovacuum have done to each table."""
    connection = await asyncpg.connect(history_load.dsn_of(side.stack))
    try:
        rows = await connection.fetch(
            "SELECT relname, n_tup_upd, n_tup_hot_upd, n_dead_tup, autovacuum_count, autoanalyze_count"
            " FROM pg_stat_user_tables"
            " WHERE schemaname = 'router' AND n_tup_ins + n_tup_upd + n_tup_del > 100 ORDER BY 1"
        )
    finally:
        await connection.close()
    return {
        row["relname"]: f"{row['n_tup_hot_upd'] / max(row['n_tup_upd'], 1):.1%} of {row['n_tup_upd']} updates HOT,"
        f" {row['n_dead_tup']} dead, vacuumed {row['autovacuum_count']} times"
        for row in rows
    }


def main(arguments: list[str], say: flat.Say) -> bool:
    """Runs the benchmark with a command's arguments; returns whether the bars hold."""
    parser = argparse.ArgumentParser(prog="tests.bench history", description=__doc__)
    parser.add_argument("--sessions", type=int, default=Plan.sessions)
    parser.add_argument("--turns", type=int, default=Plan.turns, help="of each session")
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of each sample")
    chosen = parser.parse_args(arguments)
    return uvloop.run(measure(Plan(chosen.sessions, chosen.turns, chosen.rounds, chosen.seconds), say))
