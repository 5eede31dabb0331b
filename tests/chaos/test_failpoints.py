"""A process dies (or its commit is cut off) at each edge where a crash matters: named points in the code, reached
under load. Whatever is lost there, every accepted message gets its one outcome, and no effect happens twice.
"""

import pytest

from soma_common.testing.eventually import eventually
from tests.chaos.load import Load, Mix
from tests.chaos.report import Recoveries
from tests.chaos.stack import FaultyStack

DEATHS = [
    # Accept: stored, and nobody has the receipt.
    ("gateway-0", "gateway.after_publish_before_ack", 20),
    # A brain has answered, and the start of its turn is nowhere.
    ("router-0", "router.after_answer_before_start", 15),
    # Stored by the router, and nothing that a brain says of it counts yet.
    ("router-0", "router.after_ingest_before_dispatch", 15),
    # In the journal, and the brain may not act on it yet.
    ("router-0", "router.after_step_before_confirm", 4),
    # The brain may act, and does not.
    ("cognition-0", "cognition.after_confirm_before_tool", 3),
    # The tool has run, and its result is nowhere.
    ("cognition-0", "cognition.after_tool_before_result", 3),
    # Words are shown that no journal will hold.
    ("cognition-0", "cognition.mid_tokens", 20),
    # The model's answer is known to nobody else.
    ("cognition-0", "cognition.before_proposal", 15),
    # The outcome is stored, and no adapter has it.
    ("router-0", "router.after_commit_before_delivery", 15),
    # The adapter has the outcome, and its acknowledgement goes nowhere.
    ("gateway-0", "gateway.after_delivery_before_ack", 15),
    # The call is claimed, and the tool has not run.
    ("toolgw-0", "toolgw.before_run", 4),
    # The tool has run, and its result is not stored.
    ("toolgw-0", "toolgw.after_run_before_store", 4),
    # The result is stored, and the brain has no answer.
    ("toolgw-0", "toolgw.after_store_before_answer", 4),
]
ERRANDS = Mix(echo=8, slow=4, clerk=4)


@pytest.mark.parametrize(("part", "point", "at"), DEATHS, ids=[point for _, point, _ in DEATHS])
async def test_death_at_a_failpoint(stack: FaultyStack, part: str, point: str, at: int) -> None:
    recoveries = Recoveries(f"kill at {point}", 5.0 if part == "router-0" else None)
    await stack.arm(part, f"{point}=kill@{at}")
    async with Load(stack, ERRANDS) as load:
        died_at = await stack.hit(part, point)
        await stack.is_up(part)
        await load.flows(each=2)
        recoveries.add(load, died_at)
        await recoveries.hold(load)
    assert not stack.deaths


async def test_commit_is_sent_and_the_connection_cut(stack: FaultyStack) -> None:
    """The router cannot know whether its group is in the database, and asks."""
    recoveries = Recoveries("connection cut after COMMIT was sent", 5.0)
    await stack.arm("router-0", "router.commit_cut=raise@40")
    before = len(stack.logged("router-0", "failpoint.hit"))
    async with Load(stack, ERRANDS) as load:
        await eventually(lambda: len(stack.logged("router-0", "failpoint.hit")) > before, 20, "the commit is cut")
        cut_at = load.last_arrival
        await load.flows(each=3)
        recoveries.add(load, cut_at)
        await recoveries.hold(load)
    assert not stack.deaths
