"""A message whose turn kills its router is set aside alone: those that ran beside it and died with it are answered."""

import random
from dataclasses import replace

import pytest
from soma.common.v1.turn_pb2 import Outcome

from tests.chaos.guard_faults import EXPERIMENTS, FLOWS_WITHIN_S
from tests.chaos.load import Load, Mix
from tests.chaos.soak_guards import try_out
from tests.chaos.stack import FaultyStack

POISON = next(each for each in EXPERIMENTS if each.guards == "strikes_durable")


async def _only_one_is_set_aside(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    await POISON.hurt(stack, load, drawn)
    await load.flows(each=1, timeout_s=FLOWS_WITHIN_S)
    failed = [delivery for _, delivery in load.story.turns() if delivery.outcome == Outcome.OUTCOME_ERROR]
    assert len(failed) == 1, f"{len(failed)} turns were set aside"


@pytest.mark.timeout(240)
async def test_a_message_that_kills_its_router_takes_nobody_with_it() -> None:
    beside = Mix(echo=0, slow=16, clerk=3, pause_s=0.02, ahead=3)
    experiment = replace(POISON, guards="", environment={}, mix=beside, hurt=_only_one_is_set_aside)
    found = await try_out(experiment, 1, control=True, within_s=1)
    assert not found.violation, found.row()
