"""Who waits for calls that run: how many, who is refused, how often the database is asked. A store in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

from services.toolgw.application.cancel_invocation import CancelInvocation
from services.toolgw.application.hold_lease import RunnerLease
from services.toolgw.application.places import Shared
from services.toolgw.application.ports import Finish, InvocationStore, Tool
from services.toolgw.application.run_once import MAX_WAITING, MAX_WAITING_PER_TENANT, RunOnce
from services.toolgw.application.run_tool import Bounds, ToolRuns
from services.toolgw.domain.invocation import MAX_ATTEMPTS, Call, Invocation, Runner, State
from services.toolgw.domain.outcome import Outcome
from services.toolgw.domain.tool import Effect, Json, ToolDefinition
from soma_common.errors import Conflict, ResourceExhausted, Unavailable, reason_name
from soma_common.postgres.connect import unavailable


def call_of(tenant: str = "a", key: str = "k") -> Call:
    return Call(tenant, "helper", "chat", "s-1", "slow", {}, key, "", 0)


def running(call: Call, effect: Effect = Effect.SIDE_EFFECTFUL, claim: str = "elsewhere") -> Invocation:
    return Invocation(
        call.key, call.session_id, call.tool, call.digest, effect, State.RUNNING, claim, 1, Runner.ALIVE, None
    )


class Memory:
    """The rows of a store, and how often they were asked for."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Invocation] = {}
        self.asked: Counter[str] = Counter()

    async def claim(self, call: Call, tool: ToolDefinition, claim: str, dead: Invocation | None) -> Invocation:
        found = self.rows.get((call.tenant, call.key))
        if found is None:
            found = running(call, tool.effect, claim)
        elif dead is not None and found.claim == dead.claim:
            found = replace(found, claim=claim, attempt=found.attempt + 1, runner=Runner.ALIVE)
        self.rows[call.tenant, call.key] = found
        return found

    async def find(self, tenant: str, key: str) -> Invocation | None:
        self.asked["find"] += 1
        return self.rows.get((tenant, key))

    async def cancel(self, tenant: str, session_id: bytes, key: str) -> Invocation | None:
        self.asked["cancel"] += 1
        return self.rows[tenant, key]

    async def finish(self, call: Call, claim: str, outcome: Outcome) -> Finish:
        self.rows[call.tenant, call.key] = replace(self.rows[call.tenant, call.key], state=State.DONE, outcome=outcome)
        return Finish.STORED

    async def end_without_result(self, tenant: str, key: str, claim: str, state: State) -> bool:
        self.asked["end"] += 1
        found = self.rows[tenant, key]
        self.rows[tenant, key] = replace(found, state=state)
        return found.state is State.RUNNING

    async def abandon(self, tenant: str, key: str, claim: str, *, counts: bool = True) -> None:
        found = self.rows[tenant, key]
        self.rows[tenant, key] = replace(found, runner=Runner.GONE, attempt=found.attempt - (not counts))


class AnyArguments:
    async def violations(self, parameters: Mapping[str, Json], arguments: Mapping[str, Json]) -> Sequence[str]:
        return []


class Lease:
    is_fresh = True


class Slow:
    """A tool that waits until it is let go, and raises `error` while one is set."""

    def __init__(self, effect: Effect = Effect.NONE) -> None:
        self.definition = ToolDefinition("slow", "", {"type": "object"}, effect, 60.0)
        self.go = asyncio.Event()
        self.error: Exception | None = None
        self.runs = 0

    async def run(self, call: Call) -> Outcome:
        self.runs += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return Outcome(value=self.runs)


def run_once_on(memory: Memory) -> RunOnce:
    store = cast("InvocationStore", memory)
    runs = ToolRuns(store, AnyArguments(), Bounds(of_process=256, of_tenant=64))
    return RunOnce(store, runs, cast("RunnerLease", Lease()))


@asynccontextmanager
async def waiting(work: Iterable[Coroutine[Any, Any, Any]]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Tasks that wait already; they are stopped at the end."""
    tasks = [asyncio.create_task(each) for each in work]
    await asyncio.sleep(0.1)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def assert_refused_as_running(task: asyncio.Task[Any], scope: str) -> None:
    error = task.exception()
    assert isinstance(error, ResourceExhausted)
    assert reason_name(error.reason) == "QUEUE_FULL"
    assert error.metadata["scope"] == scope
    assert "may be running" in str(error)
    assert "not begun" not in str(error)


async def test_a_tenant_fills_its_own_places_only() -> None:
    memory, tool = Memory(), cast("Tool", Slow())
    run_once = run_once_on(memory)
    mine, theirs = call_of("a"), call_of("b")
    for call in (mine, theirs):
        memory.rows[call.tenant, call.key] = running(call)
    asked = (run_once(tool, mine, running(mine)) for _ in range(MAX_WAITING_PER_TENANT + 1))
    async with waiting(asked) as tasks, waiting([run_once(tool, theirs, running(theirs))]) as (other,):
        *places, refused = tasks
        assert_refused_as_running(refused, "tenant a")
        assert not any(task.done() for task in (*places, other))
    async with waiting([run_once(tool, mine, running(mine))]) as (again,):
        assert not again.done(), "places come free"


async def test_the_process_has_a_bound_too() -> None:
    memory, tool = Memory(), cast("Tool", Slow())
    run_once = run_once_on(memory)
    calls = [call_of(f"t{n % 20}") for n in range(MAX_WAITING + 1)]
    for call in calls:
        memory.rows[call.tenant, call.key] = running(call)
    async with waiting(run_once(tool, call, running(call)) for call in calls) as tasks:
        assert_refused_as_running(tasks[-1], "this instance")
        assert sum(task.done() for task in tasks) == 1


async def test_who_joins_a_run_of_this_process_is_counted() -> None:
    tool, call = Slow(), call_of()
    run_once = run_once_on(Memory())
    async with waiting(run_once(tool, call, None) for _ in range(MAX_WAITING_PER_TENANT + 2)) as tasks:
        assert_refused_as_running(tasks[-1], "tenant a")
        tool.go.set()
        answers = await asyncio.gather(*tasks[:-1])
    assert [answer.replayed for answer in answers] == [False] + [True] * MAX_WAITING_PER_TENANT
    assert tool.runs == 1


async def test_who_waits_for_one_key_shares_the_looks() -> None:
    memory, tool, call = Memory(), cast("Tool", Slow()), call_of()
    run_once = run_once_on(memory)
    memory.rows["a", "k"] = running(call)
    async with waiting(run_once(tool, call, running(call)) for _ in range(100)) as tasks:
        await asyncio.sleep(0.5)
        assert 0 < memory.asked["find"] < 20
        memory.rows["a", "k"] = replace(running(call), state=State.DONE, outcome=Outcome(value=7))
        answers = await asyncio.wait_for(asyncio.gather(*tasks), 5.0)
    assert {answer.outcome.value for answer in answers} == {7}


async def test_a_waiter_that_leaves_takes_the_look_from_nobody() -> None:
    memory, tool, call = Memory(), cast("Tool", Slow()), call_of()
    run_once = run_once_on(memory)
    memory.rows["a", "k"] = running(call)
    async with waiting(run_once(tool, call, running(call)) for _ in range(2)) as (first, second):
        first.cancel()
        memory.rows["a", "k"] = replace(running(call), state=State.DONE, outcome=Outcome(value=7))
        assert (await asyncio.wait_for(second, 5.0)).outcome.value == 7


async def test_who_asks_as_a_look_ends_has_it_done_again() -> None:
    """Not given the look that has ended: who asks on and on would get it for ever, without a pause for anybody else."""
    shared, begun = Shared[int](), 0

    async def look() -> int:
        nonlocal begun
        begun += 1
        if begun == 1:
            # Its first step comes before the look is forgotten.
            asked.append(asyncio.create_task(shared.do("k", look)))
        return begun

    asked: list[asyncio.Task[int]] = []
    assert await shared.do("k", look) == 1
    assert await asyncio.wait_for(asked[0], 5.0) == 2
    assert await shared.do("k", look) == 3


async def test_a_dead_runner_is_settled_once_for_all_who_wait() -> None:
    memory, tool, call = Memory(), cast("Tool", Slow()), call_of()
    run_once = run_once_on(memory)
    dead = memory.rows["a", "k"] = replace(running(call), runner=Runner.GONE)
    async with waiting(run_once(tool, call, dead) for _ in range(50)) as tasks:
        for ended in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5.0):
            assert isinstance(ended, Conflict)
    assert memory.asked["end"] == 1


async def test_cancels_have_places_and_share_their_looks() -> None:
    memory, call, other = Memory(), call_of(), call_of("b")
    cancel = CancelInvocation(cast("InvocationStore", memory), 60.0)
    memory.rows["a", "k"], memory.rows["b", "k"] = running(call), running(other)
    asked = (cancel("a", call.session_id, "k") for _ in range(MAX_WAITING_PER_TENANT + 1))
    async with waiting(asked) as tasks, waiting([cancel("b", other.session_id, "k")]) as (theirs,):
        assert_refused_as_running(tasks[-1], "tenant a")
        assert not theirs.done()
        await asyncio.sleep(0.5)
        assert memory.asked["cancel"] == MAX_WAITING_PER_TENANT + 2, "each writes once"
        assert 0 < memory.asked["find"] < 40
        memory.rows["a", "k"] = replace(running(call), state=State.DONE, outcome=Outcome(value=7))
        settled = await asyncio.wait_for(asyncio.gather(*tasks[:-1]), 5.0)
    assert {each.state for each in settled} == {State.DONE}


@pytest.mark.parametrize("effect", [Effect.NONE, Effect.WITH_RESULT])
async def test_a_tool_without_its_database_is_asked_again_under_the_same_key(effect: Effect) -> None:
    """However often: no attempt that did nothing counts for the tool being what kills its runners."""
    memory, tool, call = Memory(), Slow(effect), call_of()
    run_once = run_once_on(memory)
    tool.go.set()
    tool.error = unavailable(TimeoutError())
    for _ in range(MAX_ATTEMPTS + 2):
        with pytest.raises(Unavailable):
            await run_once(tool, call, memory.rows.get(("a", "k")))
        assert memory.rows["a", "k"].state is State.RUNNING
    tool.error = None
    answer = await asyncio.wait_for(run_once(tool, call, memory.rows["a", "k"]), 5.0)
    assert answer.outcome == Outcome(value=MAX_ATTEMPTS + 3)


async def test_a_tool_that_must_not_run_twice_stays_unknown_without_its_database() -> None:
    memory, tool, call = Memory(), Slow(Effect.SIDE_EFFECTFUL), call_of()
    tool.go.set()
    tool.error = unavailable(TimeoutError())
    with pytest.raises(Conflict) as refused:
        await run_once_on(memory)(tool, call, None)
    assert reason_name(refused.value.reason) == "TOOL_OUTCOME_UNKNOWN"
    assert tool.runs == 1
