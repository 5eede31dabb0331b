"""Messages that steer, from end to end: each is read by the turn that runs or starts the next one, never neither."""

import asyncio
import random

from soma.common.v1.turn_pb2 import ArrivalPolicy, Delivery

from soma_common.client.channel_client import ChannelClient
from soma_common.testing.eventually import eventually
from tests.e2e.record import Record
from tests.e2e.stack import Stack

SESSIONS, MESSAGES = 12, 25
STEER = ArrivalPolicy.ARRIVAL_POLICY_STEER


def lines_of(delivery: Delivery) -> list[str]:
    """What the echo answered: a line for each input, whether it told them together or in parts."""
    return [line for part in delivery.message.parts for line in part.text.split("\n")]


async def test_a_steering_message_is_read_by_the_running_turn_or_starts_the_next(stack: Stack, channel: str) -> None:
    """Messages come at every place of a turn, many between the proposal of its final and the commit that takes it."""
    turns, interims = await _storm(stack, channel, "brief", "echo/delay-0-20")
    assert interims > 0, "no final was ever taken back"
    assert SESSIONS < turns < SESSIONS * MESSAGES, "no message started a turn of its own, or each did"


async def test_what_steering_messages_were_told_survives_a_brain_that_dies(stack: Stack, channel: str) -> None:
    """The next brain has the journal alone: which inputs were read, and what was said of them."""
    _, interims = await _storm(stack, channel, "slow", "echo/delay-50-150", killing="cognition-0")
    assert interims > 0


async def _storm(stack: Stack, channel: str, agent: str, model: str, *, killing: str = "") -> tuple[int, int]:
    """Has sessions steer all at once, kills a part in the middle, and checks each answer; returns how many turns and
    interim replies there were."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    await stack.add_agent("demo", agent, model)
    await stack.agent_is_known("demo", agent)
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        sent: list[dict[bytes, str]] = [{} for _ in range(SESSIONS)]
        talks = [_talk(adapter, agent, f"s-{i}", sent[i], random.Random(chance.random())) for i in range(SESSIONS)]
        talking = asyncio.gather(*talks)
        if killing:
            await eventually(lambda: sum(map(len, sent)) > SESSIONS * MESSAGES / 2, 30.0, "half of it is said")
            await stack.kill(killing)
        await talking
        await seen.all_answered([message_id for texts in sent for message_id in texts])
    for number, texts in enumerate(sent):
        deliveries = seen.of_session(f"s-{number}")
        assert [id_ for d in deliveries for id_ in d.message_ids] == list(texts), f"their order, seed {seed}"
        for delivery in deliveries:
            told = [texts[message_id] for message_id in delivery.message_ids]
            assert lines_of(delivery) == told, f"each input of a turn is answered in it, once, seed {seed}"
    return len(seen.deliveries), sum(len(delivery.message.parts) - 1 for delivery in seen.deliveries)


async def _talk(
    adapter: ChannelClient, agent: str, session: str, texts: dict[bytes, str], chance: random.Random
) -> None:
    """Sends messages that steer, some at once and some while a turn runs; keeps their texts by id, in order."""
    for number in range(MESSAGES):
        text = f"{session} message {number}"
        receipt = await adapter.send(agent, session, text, policy=STEER)
        texts[receipt.message_id] = text
        await asyncio.sleep(chance.choice([0, 0.005, 0.02, 0.05]))
