"""The wall clock of a process jumps by an hour, ahead and back: nothing is decided by it.

Leases, terms and everything that is stored go by the database's clock, time limits by the monotonic one.
"""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from soma_common.testing.eventually import eventually
from tests.chaos.load import Load, Mix
from tests.chaos.stack import FaultyStack, faulty_stack

ROOT = Path(__file__).parents[2]
ERRANDS = Mix(echo=8, slow=4, clerk=4)
JUMPERS = ("router-0", "cognition-0", "toolgw-0")
TAKEN = 'soma_router_partitions_taken_total{cause="takeover"}'
_OWNERS = "SELECT array_agg((id, owner, epoch)::text ORDER BY id) FROM router.partitions"
_FURTHEST_S = """
SELECT greatest(
    (SELECT max(abs(extract(epoch FROM expires_at - clock_timestamp()))) FROM router.leases),
    (SELECT max(abs(extract(epoch FROM beat_at - clock_timestamp()))) FROM router.routers),
    (SELECT max(abs(extract(epoch FROM create_time - clock_timestamp()))) FROM router.turns),
    (SELECT max(abs(extract(epoch FROM end_time - clock_timestamp()))) FROM router.turns),
    (SELECT max(abs(extract(epoch FROM update_time - clock_timestamp()))) FROM router.sessions),
    (SELECT max(abs(extract(epoch FROM create_time - clock_timestamp()))) FROM toolgw.invocations),
    (SELECT max(abs(extract(epoch FROM expire_time - clock_timestamp()))) FROM toolgw.runners))::float
"""
"""How far the furthest stored time is from now."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def jumping() -> AsyncIterator[FaultyStack]:
    """Two routers; every service can be made to jump."""
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "gen")])}
    everywhere = dict.fromkeys(("gateway", "controlplane", "router", "cognition", "toolgw"), path)
    async with faulty_stack({"router": 2}, everywhere, module="tests.chaos.jumping_clock") as running:
        yield running


async def test_the_clocks_of_some_processes_jump(jumping: FaultyStack) -> None:
    database = await jumping.database()
    async with Load(jumping, ERRANDS) as load:
        await eventually(lambda: _both_own(jumping), 45, "two routers with four partitions each", interval_s=0.1)
        await load.flows(each=1)
        owners, taken = await database.fetchval(_OWNERS), await _taken(jumping)
        # In the end they are right again: a server whose clock is behind refuses new tokens, as it should.
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR2, signal.SIGUSR1):
            for part in JUMPERS:
                jumping.process(part).send(number)
            await load.flows(each=4)
            assert await database.fetchval(_FURTHEST_S) < 600
        assert await database.fetchval(_OWNERS) == owners, "nobody lost a partition for it"
        assert await _taken(jumping) == taken
        await load.finish()
    await database.close()
    assert not jumping.deaths


async def _both_own(stack: FaultyStack) -> bool:
    return [(await stack.metrics(router))["soma_router_partitions_owned"] for router in ("router-0", "router-1")] == [
        4.0,
        4.0,
    ]


async def _taken(stack: FaultyStack) -> list[float]:
    return [(await stack.metrics(router)).get(TAKEN, 0.0) for router in ("router-0", "router-1")]
