"""The same key is the same message: one receipt, one turn, one answer, wherever and whenever it is sent again."""

import asyncio

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import Delivery, Outcome
from soma.gateway.v1.channel_service_pb2 import StreamTurnRequest
from soma.router.v1.session_service_pb2 import GetSessionRequest
from soma.router.v1.turn_service_pb2 import ListTurnsRequest

from soma_common.client.channel_client import text_message
from soma_common.ids import SessionName
from soma_common.testing.eventually import eventually
from tests.e2e.record import Record, answer
from tests.e2e.stack import ECHO, WITNESS, Stack


async def test_a_repeated_send_is_one_turn(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        first = await adapter.send(ECHO, "s", "hello", idempotency_key="one")
        again = await adapter.send(ECHO, "s", "hello", idempotency_key="one")
        await seen.outcome_of(first.message_id)
        late = await adapter.send(ECHO, "s", "hello", idempotency_key="one")
        last = await adapter.send(ECHO, "s", "bye", idempotency_key="two")
        await seen.all_answered([first.message_id, last.message_id])
    assert first.message_id == again.message_id == late.message_id
    assert await _turn_count(stack, channel) == 2


async def test_the_same_message_at_two_gateways_at_once_is_one_turn(stack: Stack, channel: str) -> None:
    seen = Record()
    async with (
        stack.adapter(channel, instance="a", gateway=0, on_delivery=seen.on_delivery) as one,
        stack.adapter(channel, instance="b", gateway=1, credit=0) as other,
    ):
        for number in range(10):
            key, text = f"key-{number}", f"message {number}"
            here, there = await asyncio.gather(
                one.send(WITNESS, "s", text, idempotency_key=key), other.send(WITNESS, "s", text, idempotency_key=key)
            )
            assert here.message_id == there.message_id
            await seen.outcome_of(here.message_id)
    assert [answer(delivery) for delivery in seen.of_session("s")] == [
        f"You said: message {number}" for number in range(10)
    ]
    assert await _turn_count(stack, channel, WITNESS) == 10
    asked = [call.last_text for call in stack.model.calls if call.turn in {d.turn_id.hex() for d in seen.deliveries}]
    assert asked == [f"message {number}" for number in range(10)]


async def test_the_model_is_not_asked_again_for_a_message_that_was_answered(stack: Stack, channel: str) -> None:
    """Turns are given to a brain before the store has seen their message; the session remembers its newest ones."""
    seen = Record()
    async with (
        stack.adapter(channel, instance="a", gateway=0, on_delivery=seen.on_delivery) as one,
        stack.adapter(channel, instance="b", gateway=1, credit=0) as other,
    ):
        for number in range(10):
            key, text = f"key-{number}", f"message {number}"
            first = await one.send(WITNESS, "s", text, idempotency_key=key)
            await seen.outcome_of(first.message_id)
            again = [await adapter.send(WITNESS, "s", text, idempotency_key=key) for adapter in (one, other)]
            assert {receipt.message_id for receipt in again} == {first.message_id}
        last = await one.send(WITNESS, "s", "goes on", idempotency_key="last")
        await seen.outcome_of(last.message_id)
    turns = [delivery.turn_id.hex() for delivery in seen.of_session("s")]
    assert len(turns) == 11
    calls = {key: count for key, count in stack.model.calls_by_step().items() if key[0] in turns}
    assert calls == {(turn, 1, 1): 1 for turn in turns}


async def test_a_send_repeated_after_a_gateways_death_is_one_turn(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, gateway=0, on_delivery=seen.on_delivery) as adapter:
        first = await adapter.send(ECHO, "s", "hello", idempotency_key="one")
        await stack.kill("gateway-0")
        again = await adapter.send(ECHO, "s", "hello", idempotency_key="one")
        await seen.all_answered([first.message_id])
    assert again.message_id == first.message_id
    assert await _turn_count(stack, channel) == 1


async def test_sends_that_a_gateways_death_cuts_off_are_answered_once(stack: Stack, channel: str) -> None:
    """The gateway dies while sends are in flight: the client repeats those without a receipt, with their keys."""
    seen = Record()
    async with stack.adapter(channel, gateway=1, on_delivery=seen.on_delivery) as adapter:
        sends = [
            asyncio.create_task(adapter.send(ECHO, f"s-{number}", f"hello {number}", idempotency_key="one"))
            for number in range(200)
        ]
        await asyncio.sleep(0)
        await stack.kill("gateway-1")
        receipts = await asyncio.gather(*sends)
        await seen.all_answered([receipt.message_id for receipt in receipts])


async def test_the_same_key_with_other_content_is_an_error(stack: Stack, channel: str) -> None:
    """It is accepted, as the gateway keeps no record; its outcome is the error, and the first message keeps its own."""
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        first = await adapter.send(ECHO, "s", "hello", idempotency_key="one")
        right = await seen.outcome_of(first.message_id)
        second = await adapter.send(ECHO, "s", "something else", idempotency_key="one")
        after = await adapter.send(ECHO, "s", "goes on", idempotency_key="two")
        await seen.outcome_of(after.message_id)
    assert second.message_id == first.message_id
    assert "hello" in answer(right)
    outcomes = [delivery.outcome for delivery in seen.of_session("s")]
    assert outcomes == [Outcome.OUTCOME_FINAL, Outcome.OUTCOME_ERROR, Outcome.OUTCOME_FINAL]
    wrong = seen.of_session("s")[1]
    assert wrong.error.reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED
    assert [delivery.position for delivery in seen.of_session("s")] == [1, 2, 3]


async def test_a_reused_key_shows_its_own_outcome(stack: Stack, channel: str) -> None:
    """Once while the turn of the first content runs, once after both have ended."""
    key = SessionKey(tenant="demo", agent=WITNESS, channel=channel, session="s")

    async def outcome(text: str) -> Delivery:
        request = StreamTurnRequest(session=key, idempotency_key="one", message=text_message(text))
        async with stack.channels() as gateway:
            events = [event async for event in gateway.StreamTurn(request, timeout=30)]
        assert not [event for event in events if event.live.HasField("text")] or text.startswith("slowly")
        return events[-1].outcome

    slow = f"slowly: {channel}"
    first = asyncio.create_task(outcome(slow))
    await eventually(lambda: stack.was_asked(slow), what="the model is asked")
    refused = await outcome("something else")
    assert (await first).outcome == Outcome.OUTCOME_FINAL
    again = await outcome("something else")
    for delivery in (refused, again):
        assert delivery.error.reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED
        assert delivery.turn_id == refused.turn_id
    assert (await outcome(slow)).message == (await first).message


async def test_a_key_belongs_to_its_session(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        receipts = [await adapter.send(ECHO, session, "hello", idempotency_key="one") for session in ("a", "b")]
        await seen.all_answered([receipt.message_id for receipt in receipts])
    assert receipts[0].message_id != receipts[1].message_id


async def _turn_count(stack: Stack, channel: str, agent: str = ECHO) -> int:
    name = str(SessionName("demo", agent, channel, "s"))
    async with stack.sessions() as sessions, stack.turns() as turns:
        session = (await sessions.GetSession(GetSessionRequest(name=name), timeout=10)).session
        listed = (await turns.ListTurns(ListTurnsRequest(parent=name, page_size=1000), timeout=10)).turns
    assert session.turn_count == len(listed)
    return len(listed)
