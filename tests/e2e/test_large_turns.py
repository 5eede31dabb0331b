"""Turns with much to read, many at once: more than one message of the transport may hold goes in several."""

import asyncio

from soma.common.v1.turn_pb2 import Outcome

from soma_common.testing.eventually import eventually
from tests.e2e.record import Record
from tests.e2e.stack import WITNESS, Stack

SESSIONS = 80
CONTENT = "x" * 250_000
"""All together 20 MB; gRPC messages hold 16."""


async def test_large_turns_survive_the_death_of_their_brain_together(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        receipts = await asyncio.gather(
            *(adapter.send(WITNESS, f"s{n}", f"slowly: {channel}-{n} {CONTENT}") for n in range(SESSIONS))
        )
        await eventually(
            lambda: all(stack.was_asked(f"{channel}-{n} ") for n in range(SESSIONS)), 30, "all models are asked"
        )
        await stack.kill("cognition-0")
        await seen.all_answered([receipt.message_id for receipt in receipts], timeout_s=60)
    assert {delivery.outcome for delivery in seen.deliveries} == {Outcome.OUTCOME_FINAL}
