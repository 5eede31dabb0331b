"""Controls that a new owner applies again: what they said was done, and is done to nobody else."""

from __future__ import annotations

import asyncio

import pytest
from soma.router.v1.inbound_pb2 import InboundKind

from services.router.domain.turn import Outcome, TurnStatus
from tests.unit.router.builders import cancel
from tests.unit.router.test_policies import control, keys, message
from tests.unit.router.test_policy_machine import DurableStore, Owner
from tests.unit.router.test_waiting_controls import turn_of


@pytest.mark.parametrize("kind", [InboundKind.INBOUND_KIND_INTERRUPT, InboundKind.INBOUND_KIND_CANCEL])
async def test_a_control_that_stopped_a_turn_does_not_stop_the_next_one_too(kind: InboundKind.ValueType) -> None:
    """It is not done with yet, as it came behind a cancel that waits."""
    store = DurableStore()
    first = Owner(store)
    first.accept(message("first"))
    await first.started(1)
    a, b = message("a"), message("b")
    first.accept(a, b, cancel("s", "of b", turn_of(b)), control(kind, "of whatever runs"))
    await first.started(2)
    await first.quiet()
    assert [turn.status for turn in store.stored_turns] == [3, 1]
    await first.stop()
    owner = Owner(store)
    try:
        [start] = await owner.started(1)
        await owner.quiet()
        assert owner.state.running[start.turn_id].status is TurnStatus.RUNNING
        owner.answer(start, "done")
        ended = await owner.outcomes(2)
        assert [(outcome, list(delivery.message_ids)) for outcome, delivery in ended] == [
            (Outcome.FINAL, keys("a")),
            (Outcome.CANCELLED, keys("b")),
        ]
    finally:
        await owner.stop()
        await asyncio.sleep(0)
