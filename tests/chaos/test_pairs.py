"""Two routers and two brains: one of them dies, freezes, and wakes up as a zombie."""

import asyncio
import time

from soma_common.testing.eventually import eventually
from tests.chaos.load import Load, Mix
from tests.chaos.report import Recoveries
from tests.chaos.stack import FaultyStack
from tests.chaos.witness import commit_witness, speech_witness, terms_that_came_back, zombies_words

HEARTBEATS_S = 0.5 * 4
ERRANDS = Mix(echo=8, slow=4, clerk=4)
OWNED = "soma_router_partitions_owned"
_OWNERS = "SELECT array_agg((id, owner)::text ORDER BY id) FROM router.partitions"


async def test_brain_killed(pairs: FaultyStack) -> None:
    recoveries = Recoveries("kill -9 of one of two brains", 2.0)
    async with Load(pairs, ERRANDS) as load:
        await load.flows()
        for brain in ("cognition-0", "cognition-1") * 2:
            killed_at = await pairs.kill9(brain)
            await load.flows(each=4)
            recoveries.add(load, killed_at)
            await pairs.is_up(brain)
            await _both_brains(pairs)
        await recoveries.hold(load)
    assert not pairs.deaths


async def test_brain_frozen(pairs: FaultyStack) -> None:
    """Its turns go on at the other one; what it says when it wakes up counts for nothing."""
    recoveries = Recoveries("SIGSTOP of one of two brains", HEARTBEATS_S + 2.0)
    async with Load(pairs, ERRANDS) as load:
        await load.flows()
        for brain in ("cognition-0", "cognition-1"):
            frozen_at = pairs.freeze(brain)
            await asyncio.sleep(HEARTBEATS_S + 0.5)
            await load.flows(each=4)
            recoveries.add(load, frozen_at)
            pairs.thaw(brain)
            await _both_brains(pairs)
            await load.flows(each=2)
        await recoveries.hold(load)
    assert not pairs.deaths


async def test_router_killed(pairs: FaultyStack) -> None:
    recoveries = Recoveries("kill -9 of one of two routers", 5.0)
    async with Load(pairs, ERRANDS) as load:
        for router in ("router-0", "router-1"):
            await _both_own(pairs)
            await load.flows()
            killed_at = await pairs.kill9(router)
            await load.flows(each=2)
            recoveries.add(load, killed_at)
            await pairs.is_up(router)
        await _both_own(pairs)
        await recoveries.hold(load)
    assert not pairs.deaths


async def test_router_stays_dead(pairs: FaultyStack) -> None:
    """Nobody starts it again: the other one takes its partitions over."""
    recoveries = Recoveries("one of two routers gone for good", 5.0)
    async with Load(pairs, ERRANDS) as load:
        await _both_own(pairs)
        await load.flows()
        pairs.hold_down("router-1")
        killed_at = await pairs.kill9("router-1")
        await load.flows(each=2)
        recoveries.add(load, killed_at)
        pairs.let_up("router-1")
        await pairs.is_up("router-1")
        await _both_own(pairs)
        await recoveries.hold(load)
    assert not pairs.deaths


async def test_zombie_router(pairs: FaultyStack) -> None:
    """A frozen owner blocks nobody, and after waking up it writes, delivers and streams nothing of its old terms."""
    recoveries = Recoveries("SIGSTOP of one of two routers", 5.0)
    async with commit_witness(pairs) as database, speech_witness(pairs) as speech, Load(pairs, ERRANDS) as load:
        await _both_own(pairs)
        await load.flows()
        frozen_at = pairs.freeze("router-0")
        locks = asyncio.create_task(database.watch_locks("router-0", 7.0, load.stalls))
        await load.flows(each=2)
        recoveries.add(load, frozen_at)
        await locks
        print(f"longest lock of the frozen router: {database.longest_lock_s:.3f} s")
        assert database.longest_lock_s < 1.0
        await eventually(lambda: _owns_everything(pairs, "router-1"), 20, "the other one owns everything")

        woken_at = time.time()
        pairs.thaw("router-0")
        await _both_own(pairs)  # It takes part again.
        await load.flows(each=4)
        commits = await database.commits()
        assert not terms_that_came_back(commits)
        said = zombies_words(commits, speech, "router-0", woken_at)
        print(f"said on waking up: {said}")
        assert len(said) <= len(load.tenants), f"before it held a partition, it said {said} (woken at {woken_at})"
        await recoveries.hold(load)
    assert not pairs.deaths


async def test_postgres_frozen_under_two_routers(pairs: FaultyStack) -> None:
    """All leases run out together, and nobody robs whoever wakes up a moment later: partitions stay where they were."""
    recoveries = Recoveries("PostgreSQL frozen for 5 s under two routers, then back", 5.0)
    async with Load(pairs, ERRANDS) as load:
        await _both_own(pairs)
        await load.flows()
        database = await pairs.database()
        before, owners = await _taken_over(pairs), await database.fetchval(_OWNERS)
        pairs.freeze("postgres")
        await asyncio.sleep(5.0)
        woken_at = pairs.thaw("postgres")
        await load.flows(each=2)
        recoveries.add(load, woken_at)
        await _both_own(pairs)
        assert await _taken_over(pairs) == before
        assert await database.fetchval(_OWNERS) == owners
        await database.close()
        await recoveries.hold(load)
    assert not pairs.deaths


async def _taken_over(stack: FaultyStack) -> float:
    """How many partitions a router has taken from another one."""
    name = 'soma_router_partitions_taken_total{cause="takeover"}'
    return sum([(await stack.metrics(router)).get(name, 0.0) for router in ("router-0", "router-1")])


async def _owns_everything(stack: FaultyStack, router: str) -> bool:
    return (await stack.metrics(router))[OWNED] == 8.0


async def _both_own(stack: FaultyStack) -> None:
    await _both_say(stack, OWNED, 4.0)


async def _both_brains(stack: FaultyStack) -> None:
    await _both_say(stack, "soma_router_brains", 2.0)


async def _both_say(stack: FaultyStack, metric: str, value: float) -> None:
    async def said() -> bool:
        return [(await stack.metrics(router)).get(metric) for router in ("router-0", "router-1")] == [value, value]

    await eventually(said, 45, f"{metric} is {value} at both routers", interval_s=0.2)
