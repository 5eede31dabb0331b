"""A router or a brain freezes at the worst places, is replaced, and wakes up believing that nothing has happened.

It is stopped by itself at a named point (or, inside the database's work on its commit, from outside). While it stands
still the others take its work over and answer; when it goes on it commits, confirms, delivers, streams and executes
nothing that counts, holds up nobody, and soon works with the others again. Held against outside witnesses: adapters,
the model's and the tools' server, every row that is committed, every word on the bus, every lock in the database.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from soma_common.testing.eventually import eventually
from tests.chaos.load import Load, Mix
from tests.chaos.report import Recoveries
from tests.chaos.stack import FaultyStack
from tests.chaos.witness import (
    CommitWitness,
    Speech,
    commit_witness,
    speech_witness,
    terms_that_came_back,
    zombies_words,
)
from tests.stalls import Stalls

ERRANDS = Mix(echo=8, slow=4, clerk=4)
ROUTER, OTHER_ROUTER, BRAIN = "router-0", "router-1", "cognition-0"
OWNED, BRAINS = "soma_router_partitions_owned", "soma_router_brains"
LONGEST_LOCK_S = 1.0
IN_COMMIT_S = 0.3
"""How long the database is made to work on a commit while its router freezes."""
LONG = pytest.mark.soak
ROUTER_POINTS = [
    pytest.param("router.before_commit", 60, id="before BEGIN"),
    pytest.param("router.after_answer_before_start", 15, id="an answer before its turn's start"),
    pytest.param("router.after_step_before_confirm", 4, id="after COMMIT, before the confirmation"),
    pytest.param("router.before_handover", 40, id="before the handover of outcomes and tokens"),
    pytest.param("router.after_commit_before_delivery", 20, id="after COMMIT, before the outcome", marks=LONG),
    pytest.param("router.after_handover", 40, id="after the handover", marks=LONG),
    pytest.param("router.before_beat", 7, id="before a heartbeat", marks=LONG),
    pytest.param("router.after_beat", 7, id="after a heartbeat", marks=LONG),
]
BRAIN_POINTS = [
    pytest.param("cognition.after_confirm_before_tool", 3, id="after a confirmation, before the tool"),
    pytest.param("cognition.mid_tokens", 20, id="in the middle of tokens"),
    pytest.param("cognition.after_tool_before_result", 3, id="after the tool", marks=LONG),
    pytest.param("cognition.before_proposal", 10, id="before a proposal", marks=LONG),
]

_HOLD_COMMITS = """
CREATE TABLE witness.held (connection text, seconds float);
CREATE FUNCTION witness.hold() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM pg_sleep(seconds) FROM witness.held WHERE connection = current_setting('application_name');
    RETURN NULL;
END $$;
CREATE TRIGGER hold AFTER UPDATE ON router.partitions FOR EACH STATEMENT EXECUTE FUNCTION witness.hold();
"""
_HOLD_BEATS = "CREATE TRIGGER hold AFTER UPDATE ON router.leases FOR EACH STATEMENT EXECUTE FUNCTION witness.hold();"
_IS_HELD = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event = 'PgSleep'"


@dataclass
class Eyes:
    """The outside witnesses of one test."""

    stack: FaultyStack
    load: Load
    database: CommitWitness
    speech: Speech
    locks: CommitWitness


@asynccontextmanager
async def watched(pairs: FaultyStack) -> AsyncIterator[Eyes]:
    """Conversations, and everything that routers do, from here to the end of the block."""
    locks = CommitWitness(await pairs.database())
    async with commit_witness(pairs) as database, speech_witness(pairs) as speech, Stalls() as stalls:
        watching = asyncio.create_task(locks.watch_locks("router-_", 60.0, stalls))
        try:
            async with Load(pairs, ERRANDS) as load:
                yield Eyes(pairs, load, database, speech, locks)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            locks.close()


@pytest.mark.parametrize(("point", "at"), ROUTER_POINTS)
async def test_router(pairs: FaultyStack, point: str, at: int) -> None:
    await _both_work(pairs)
    await pairs.arm(ROUTER, f"{point}=stop@{at}")
    async with watched(pairs) as eyes:
        frozen_at = await _is_frozen(pairs, ROUTER)
        assert pairs.logged(ROUTER, "failpoint.hit")[-1]["point"] == point
        await _replaced_and_woken(eyes, f"SIGSTOP at {point}", frozen_at)


@pytest.mark.parametrize("connection", ["writer", pytest.param("leases", marks=LONG)])
async def test_router_while_the_database_works_for_it(pairs: FaultyStack, connection: str) -> None:
    """Between the fence and COMMIT: the statement is complete, so it is committed without the router, and its locks
    are held for no longer than it takes. The same with a heartbeat, between the question and the answer.
    """
    await _both_work(pairs)
    async with watched(pairs) as eyes:
        await eyes.load.flows(each=1)
        looking = await pairs.database()
        try:
            await looking.execute(_HOLD_COMMITS if connection == "writer" else _HOLD_COMMITS + _HOLD_BEATS)
            name = f"{ROUTER} {connection}"
            await looking.execute("INSERT INTO witness.held VALUES ($1, $2)", name, IN_COMMIT_S)
            await eventually(lambda: looking.fetchval(_IS_HELD, name), 20, "it is in the statement", interval_s=0.01)
            frozen_at = pairs.freeze(ROUTER)
            await looking.execute("TRUNCATE witness.held")
            await _replaced_and_woken(eyes, f"SIGSTOP within a statement of its {connection}", frozen_at)
        finally:
            await looking.execute(
                "DROP TRIGGER hold ON router.partitions; DROP TRIGGER IF EXISTS hold ON router.leases"
            )
            looking.terminate()


@pytest.mark.parametrize(("point", "at"), BRAIN_POINTS)
async def test_brain(pairs: FaultyStack, point: str, at: int) -> None:
    recoveries = Recoveries(f"SIGSTOP at {point}", 0.5 * 4 + 2.0)
    await _both_work(pairs)
    await pairs.arm(BRAIN, f"{point}=stop@{at}")
    await _both_work(pairs)
    async with Load(pairs, ERRANDS) as load:
        frozen_at = await _is_frozen(pairs, BRAIN)
        await eventually(lambda: _says(pairs, BRAINS, 1.0), 20, "both routers have noticed")
        await load.flows(each=2)
        recoveries.add(load, frozen_at)
        pairs.thaw(BRAIN)
        await _both_work(pairs)
        asked = await _model_calls(pairs)
        await load.flows(each=2)
        assert await _model_calls(pairs) > asked, "it gets turns again"
        await recoveries.hold(load)
    assert not pairs.deaths


async def _replaced_and_woken(eyes: Eyes, fault: str, frozen_at: float) -> None:
    """From the freeze to the end: taken over and answered meanwhile, awake and fenced off, of use again."""
    stack, load = eyes.stack, eyes.load
    recoveries = Recoveries(fault, 5.0)
    await eventually(lambda: _owns_everything(stack), 20, "the other one owns everything")
    await load.flows(each=2)
    recoveries.add(load, frozen_at)
    woken_at = time.time()
    stack.thaw(ROUTER)
    await _both_work(stack)
    await load.flows(each=2)

    commits = await eyes.database.commits()
    assert not terms_that_came_back(commits)
    said = zombies_words(commits, eyes.speech, ROUTER, woken_at)
    print(f"said on waking up: {said}")
    assert len(said) <= len(load.tenants), f"it held nothing yet, and said {said} (woken at {woken_at})"
    await recoveries.hold(load)
    print(f"longest lock of a router: {eyes.locks.longest_lock_s:.3f} s")
    assert eyes.locks.longest_lock_s < LONGEST_LOCK_S
    assert not stack.deaths


async def _is_frozen(stack: FaultyStack, part: str) -> float:
    """Wait until a part has stopped itself; returns the moment (monotonic)."""
    pid = stack.process(part).pid
    await eventually(lambda: _state(pid) == "T", 45, f"{part} stops itself", interval_s=0.02)
    return time.monotonic()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def _owns_everything(stack: FaultyStack) -> bool:
    return (await stack.metrics(OTHER_ROUTER))[OWNED] == 8.0


async def _both_work(stack: FaultyStack) -> None:
    """Each router owns its share and has both brains."""

    async def all_is_even() -> bool:
        return await _says(stack, OWNED, 4.0) and await _says(stack, BRAINS, 2.0)

    await eventually(all_is_even, 45, "two routers with four partitions and two brains each", interval_s=0.1)


async def _says(stack: FaultyStack, metric: str, value: float) -> bool:
    return [(await stack.metrics(router)).get(metric) for router in (ROUTER, OTHER_ROUTER)] == [value, value]


async def _model_calls(stack: FaultyStack) -> float:
    metrics = await stack.metrics(BRAIN)
    return sum(value for name, value in metrics.items() if name.startswith("soma_cognition_model_calls_total"))
