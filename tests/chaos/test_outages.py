"""A store is away for a while, or nobody is there to take the answers: nothing is lost, all goes on by itself."""

import asyncio
import time
from itertools import pairwise

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.gateway.v1.channel_service_pb2 import InboundMessage

from soma_common.client.channel_client import text_message
from soma_common.ids import SessionName
from soma_common.testing.eventually import eventually
from tests.chaos.load import Load, Mix
from tests.chaos.report import Recoveries
from tests.chaos.stack import ECHO, FaultyStack

AWAY_S = 5.0
BACK_WITHIN_S = 5.0
WITHOUT_WAITING = Mix(echo=4, slow=2, clerk=2, pause_s=0.25, ahead=100)
"""Senders that do not wait for answers: accepts go on while turns cannot."""


async def test_postgres_frozen(stack: FaultyStack) -> None:
    recoveries = Recoveries("PostgreSQL frozen for 5 s, then back", BACK_WITHIN_S)
    async with Load(stack, WITHOUT_WAITING) as load:
        await load.flows()
        frozen_at = stack.freeze("postgres")
        await asyncio.sleep(AWAY_S)
        woken_at = stack.thaw("postgres")
        _assert_accepts_went_on(load, frozen_at, woken_at)
        await load.flows(each=3)
        recoveries.add(load, woken_at)
        await recoveries.hold(load)
    assert not stack.deaths


async def test_postgres_down(stack: FaultyStack) -> None:
    recoveries = Recoveries("PostgreSQL killed and down for 5 s, then back", BACK_WITHIN_S)
    async with Load(stack, WITHOUT_WAITING) as load:
        await load.flows()
        stack.hold_down("postgres")
        killed_at = await stack.kill9("postgres")
        await asyncio.sleep(AWAY_S)
        _assert_accepts_went_on(load, killed_at, time.monotonic())
        stack.let_up("postgres")
        await stack.is_up("postgres")
        back_at = time.monotonic()
        await load.flows(each=3)
        recoveries.add(load, back_at)
        await recoveries.hold(load)
    assert not stack.deaths


async def test_bus_down(stack: FaultyStack) -> None:
    """What cannot be stored is refused as not known, with the time after which to try again."""
    recoveries = Recoveries("NATS killed and down for 7 s, then back", BACK_WITHIN_S)
    async with Load(stack, WITHOUT_WAITING) as load:
        await load.flows()
        stack.hold_down("nats")
        await stack.kill9("nats")
        refusal = await _refusal(load)
        assert refusal.reason == ErrorReason.ERROR_REASON_BUS_UNAVAILABLE, refusal
        assert refusal.retry_delay_ms > 0, refusal
        stack.let_up("nats")
        await stack.is_up("nats")
        back_at = time.monotonic()
        await load.flows(each=3)
        recoveries.add(load, back_at)
        await recoveries.hold(load)
    assert not stack.deaths


async def test_bus_frozen(stack: FaultyStack) -> None:
    recoveries = Recoveries("NATS frozen for 5 s, then back", BACK_WITHIN_S)
    async with Load(stack, WITHOUT_WAITING) as load:
        await load.flows()
        stack.freeze("nats")
        await asyncio.sleep(AWAY_S)
        woken_at = stack.thaw("nats")
        await load.flows(each=3)
        recoveries.add(load, woken_at)
        await recoveries.hold(load)
    assert not stack.deaths


async def test_gateway_dies_with_what_the_bus_did_not_take(stack: FaultyStack) -> None:
    """Nobody has a receipt for what was only in the gateway's memory: senders send it again."""
    recoveries = Recoveries("gateway killed while NATS is frozen")
    async with Load(stack, WITHOUT_WAITING) as load:
        await load.flows()
        stack.freeze("nats")
        await asyncio.sleep(1.5)
        killed_at = await stack.kill9("gateway-0")
        stack.thaw("nats")
        await stack.is_up("gateway-0")
        await load.flows(each=3)
        recoveries.add(load, killed_at)
        await recoveries.hold(load)
    assert not stack.deaths


async def test_nobody_takes_the_answers(stack: FaultyStack) -> None:
    """Answers wait, over the death of their router too, until an adapter of the channel comes back."""
    async with Load(stack, Mix(echo=8, slow=0, clerk=2, ahead=100), tenants=("demo",)) as load:
        await load.flows()
        await load.disconnect("demo")
        taken = load.story.counts()["answered"]
        await asyncio.sleep(1.5)  # The routers learn that the adapter is gone; senders without an adapter go on.
        await stack.kill9("router-0")
        await stack.is_up("router-0")
        await eventually(lambda: load.story.counts()["accepted"] > taken + 40, 15, "messages are accepted meanwhile")
        assert load.story.counts()["answered"] == taken
        connected_at = time.monotonic()
        await load.connect("demo")
        await load.flows(each=2)
        print(f"\nANSWERS KEPT for {len(load.story.unanswered())} messages, {load.silence(connected_at):.2f} s")
        await load.finish()
    assert not stack.deaths


def _assert_accepts_went_on(load: Load, since: float, until: float) -> None:
    """Receipts came in each second of a time, but for what the machine stood still."""
    for before, after in pairwise([since, *(at for at in load.receipts if since < at < until), until]):
        gap_s = after - before - load.stalls.since(before, after)
        assert gap_s < 1.0, f"no receipt for {gap_s:.2f} s, {before - since:.2f} s after the outage began"


async def _refusal(load: Load) -> Error:
    """What a message gets that cannot be stored now."""
    name, text = SessionName("demo", ECHO, load.channel, "refused"), "nobody can store this"
    load.story.not_known(load.story.sent(name, "refused-1", text), name)
    refused: asyncio.Future[Error] = asyncio.get_running_loop().create_future()
    item = InboundMessage(
        agent=name.agent, session=name.session, idempotency_key="refused-1", message=text_message(text)
    )
    load.client(name.tenant).post(item, lambda _, error: refused.set_result(error or Error()))
    async with asyncio.timeout(15):
        return await refused
