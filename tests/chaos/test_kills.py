"""Every process of the stack is killed -9 under load, one after the other."""

import pytest

from tests.chaos.load import Load
from tests.chaos.report import Recoveries
from tests.chaos.stack import FaultyStack

BARS_S = {"router-0": 5.0, "nats": 5.0, "postgres": 5.0}
ROUNDS = 2


@pytest.mark.parametrize(
    "part", ["gateway-0", "router-0", "cognition-0", "toolgw-0", "controlplane-0", "nats", "postgres"]
)
async def test_killed_under_load(stack: FaultyStack, part: str) -> None:
    recoveries = Recoveries(f"kill -9 {part}", BARS_S.get(part))
    async with Load(stack) as load:
        await load.flows()
        for _ in range(ROUNDS):
            killed_at = await stack.kill9(part)
            await stack.is_up(part)
            await load.flows(each=2)
            recoveries.add(load.silence(killed_at))
        recoveries.hold(await load.finish())
    assert not stack.deaths
