"""Every process of the stack is killed -9 under load, one after the other."""

import pytest

from tests.chaos.load import Load, Mix
from tests.chaos.report import Recoveries
from tests.chaos.stack import FaultyStack

PARTS = {
    "gateway-0": None,
    "router-0": 5.0,
    "cognition-0": None,
    "toolgw-0": None,
    "controlplane-0": None,
    "nats": 5.0,
    "postgres": 5.0,
}
"""With the time in which everything goes on again, where one is promised for a stack of one of each."""


@pytest.mark.parametrize(("part", "bar_s"), PARTS.items(), ids=PARTS)
async def test_killed_under_load(stack: FaultyStack, part: str, bar_s: float | None) -> None:
    recoveries = Recoveries(f"kill -9 {part}", bar_s)
    async with Load(stack, Mix(clerk=4)) as load:
        await load.flows()
        for _ in range(5 if bar_s else 2):
            killed_at = await stack.kill9(part)
            await stack.is_up(part)
            await load.flows(each=2)
            recoveries.add(load, killed_at)
        await recoveries.hold(load)
    assert not stack.deaths


async def test_cancels_while_things_die(stack: FaultyStack) -> None:
    """A stopped turn has one outcome, and no call that its transcript calls cancelled ever runs."""
    async with Load(stack, Mix(echo=4, slow=8, clerk=8, cancel=0.4)) as load:
        await load.flows()
        for part in ("router-0", "cognition-0", "toolgw-0", "router-0"):
            await stack.kill9(part)
            await stack.is_up(part)
            await load.flows(each=3)
        counts = await load.finish()
        assert counts["cancelled"], "no turn was stopped"
        print(f"\nCANCELS while parts die: {counts}")
    assert not stack.deaths
