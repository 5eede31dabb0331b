"""The brain stands still while messages keep coming: they are accepted, nobody's memory grows with them, and all are
answered in order once it goes on. `make bench ARGS=frozen` is the same with 100 000 messages.
"""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.bench.frozen_brain import MIB, UNBOUNDED, Plan, growth, run
from tests.chaos.stack import FaultyStack, faulty_stack

QUICK = Plan(messages=10_000, sessions=500, text_bytes=2048, settled=4000, every=500, patience_s=60)
"""What is sent from the moment on at which memory is judged is 12 MiB of text."""
MOST_GROWTH = 8 * MIB
NATS_CACHE = 24 * MIB
"""The bus keeps what it has written in the last ten seconds in memory too."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unbounded() -> AsyncIterator[FaultyStack]:
    """A stack whose bounds on waiting messages are not reached."""
    async with faulty_stack(environment=UNBOUNDED) as running:
        yield running


async def test_memory_stays_flat_while_the_brain_is_frozen_and_all_is_answered_in_order(
    unbounded: FaultyStack,
) -> None:
    seen = await run(unbounded, QUICK, print)
    assert seen.accepted == QUICK.messages
    assert not seen.refused
    assert not seen.faults
    grown = {name: growth(seen, name, QUICK.settled) for name in unbounded.parts}
    assert grown.pop("nats") < MOST_GROWTH + NATS_CACHE
    assert all(by < MOST_GROWTH for by in grown.values()), {name: by // MIB for name, by in grown.items()}
    assert not unbounded.deaths
