"""What turns cost on the wire: counts, not time. A change that makes a statement, a publish or a frame for each item of
a group is seen here without a stopwatch.

64 messages of 64 sessions are posted at once, answered by an echo, and acknowledged. The processes are real and so is
their scheduling: what of the crowd goes together differs a little. So the best of a few bursts counts, and a bound has
room for one more cut of the crowd; a cost for each item would be 64 or more in every burst.
"""

from __future__ import annotations

from typing import Final

from tests.integration.costs.counted import BURST, CountedStack

BURSTS: Final = 4
WAL_BYTES_PER_TURN: Final = 4300
"""3400 when this was written: the message, its session, the turn, its last step, its end, the delivery and its end."""

CROWD: Final = {
    # the gateway applies 32 items of a frame in one go, and stores what has gathered
    "lane_publishes": 3,
    # two lane messages: a group of starts and a group of ends for each, and one for the acknowledgements
    "groups": 7,
    # starts and confirmations, a frame for each group
    "frames_to_brain": 6,
    "frames_from_brain": 4,
    # one frame of messages, one of acknowledgements for each frame of deliveries
    "frames_from_adapter": 5,
    # receipts for each lane message, deliveries for each group of ends
    "frames_to_adapter": 6,
    "delivery_publishes": 3,
    "ack_publishes": 4,
    "wal_bytes": BURST * WAL_BYTES_PER_TURN,
}
"""Most that a burst of 64 turns costs, and why."""

ALONE: Final = {
    "lane_publishes": 1,
    # start, end, acknowledgement
    "groups": 3,
    # the start, and the confirmation of the end
    "frames_to_brain": 2,
    "frames_from_brain": 1,
    # the message, the acknowledgement
    "frames_from_adapter": 2,
    # the receipt, the delivery
    "frames_to_adapter": 2,
    "delivery_publishes": 1,
    "ack_publishes": 1,
}
"""Exactly what a turn costs that has the stack for itself."""


async def test_a_crowd_of_turns_shares_what_it_costs(counted: CountedStack) -> None:
    async with counted.adapter() as adapter:
        await counted.burst(adapter)  # sessions and pages are made
        await counted.burst(adapter)
        bursts = [await counted.burst(adapter) for _ in range(BURSTS)]
    best = {name: min(burst[name] for burst in bursts) for name in CROWD}
    dear = {name: (count, CROWD[name]) for name, count in best.items() if count > CROWD[name]}
    assert not dear, f"(count, bound) of the best of {BURSTS} bursts of {BURST} turns: {dear}"


async def test_a_group_is_one_statement_and_one_round_trip(counted: CountedStack) -> None:
    async with counted.adapter() as adapter:
        await counted.burst(adapter)
        burst = await counted.burst(adapter)
    assert burst["executions"] == burst["groups"]
    assert burst["round_trips"] == burst["groups"]


async def test_a_turn_alone_takes_no_further_hop(counted: CountedStack) -> None:
    async with counted.adapter() as adapter:
        await counted.burst(adapter, 1)
        turns = [await counted.burst(adapter, 1) for _ in range(BURSTS)]
    # A heartbeat may fall into one of them.
    assert {name: min(turn[name] for turn in turns) for name in ALONE} == ALONE
