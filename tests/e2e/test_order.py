"""Many sessions at once, several adapters: every session keeps its order, every message its one outcome."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable

from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery, LiveEvent
from soma.gateway.v1.channel_service_pb2 import InboundMessage

from soma_common.client.channel_client import ChannelClient, text_message
from soma_common.testing.eventually import eventually
from tests.e2e.record import Record, answer
from tests.e2e.stack import ECHO, WITNESS, Stack

SESSIONS = 50
MESSAGES = 6
PRESENCE_KNOWN_S = 1.5  # gateways announce their adapters every second and on each change


async def test_fifty_sessions_in_parallel_keep_their_order(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        accepted = await _talk(adapter, SESSIONS, MESSAGES)
        await seen.all_answered(accepted)
    _check_each_session_says(seen, SESSIONS, MESSAGES)


async def test_two_adapter_instances_keep_each_sessions_order(stack: Stack, channel: str) -> None:
    """Both instances send and receive; what one has sent may be delivered to the other."""
    seen = Record()
    by_instance: dict[str, set[str]] = {"one": set(), "other": set()}

    def note(instance: str) -> Callable[[Delivery], None]:
        def on_delivery(delivery: Delivery) -> None:
            by_instance[instance].add(delivery.session)
            seen.on_delivery(delivery)

        return on_delivery

    async with (
        stack.adapter(channel, instance="one", gateway=0, on_delivery=note("one")) as first,
        stack.adapter(channel, instance="other", gateway=1, on_delivery=note("other")) as second,
    ):
        await asyncio.sleep(PRESENCE_KNOWN_S)
        halves = await asyncio.gather(
            _talk(first, SESSIONS // 2, MESSAGES, "one"), _talk(second, SESSIONS // 2, MESSAGES, "other")
        )
        await seen.all_answered([*halves[0], *halves[1]])
    for prefix in ("one", "other"):
        _check_each_session_says(seen, SESSIONS // 2, MESSAGES, prefix)
    assert by_instance["one"], "sessions are spread over both instances"
    assert by_instance["other"], "sessions are spread over both instances"
    assert not by_instance["one"] & by_instance["other"], "while both stay, a session stays with its instance"


async def test_an_instance_that_leaves_hands_its_sessions_over(stack: Stack, channel: str) -> None:
    together = Record()
    async with stack.adapter(channel, instance="stays", gateway=0, on_delivery=together.on_delivery) as stays:
        async with stack.adapter(channel, instance="leaves", gateway=1, on_delivery=together.on_delivery):
            accepted = await _talk(stays, SESSIONS, 2)
            await together.all_answered(accepted)
        more = [(await stays.send(ECHO, f"s-{number}", "after")).message_id for number in range(SESSIONS)]
        await together.all_answered([*accepted, *more])


async def test_a_slow_session_delays_no_other(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        slow = await adapter.send(WITNESS, "slow", f"slowly: {channel}")
        await eventually(lambda: stack.was_asked(channel), what="the model is asked")
        quick = [(await adapter.send(ECHO, f"quick-{number}", "now")).message_id for number in range(20)]
        await asyncio.gather(*(seen.outcome_of(message_id, 3.0) for message_id in quick))
        assert not seen.of_session("slow")
        await seen.outcome_of(slow.message_id)


async def test_answers_wait_for_an_adapter(stack: Stack, channel: str) -> None:
    """With nobody connected outcomes wait; whoever comes gets them, oldest first."""
    async with stack.adapter(channel, credit=0) as sender:
        accepted = await _talk(sender, 5, 4)
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery):
        await seen.all_answered(accepted)
    _check_each_session_says(seen, 5, 4)


async def test_credit_bounds_what_an_adapter_holds(stack: Stack, channel: str) -> None:
    async with stack.adapter(channel, credit=3) as slow:
        accepted = [(await slow.send(ECHO, f"s-{number}", "hello")).message_id for number in range(12)]
        events = slow.events()
        held = [await _next_delivery(events) for _ in range(3)]
        stalled = asyncio.create_task(_next_delivery(events))
        done, _ = await asyncio.wait([stalled], timeout=1.0)
        assert not done, "a fourth delivery came without credit"
        for delivery in held:
            await slow.ack(delivery)
        rest = [await stalled]
        await slow.ack(rest[0])
        while len(held) + len(rest) < len(accepted):
            rest.append(await _next_delivery(events))
            await slow.ack(rest[-1])
    assert {m for d in (*held, *rest) for m in d.message_ids} == set(accepted)


async def _talk(adapter: ChannelClient, sessions: int, messages: int, prefix: str = "s") -> list[bytes]:
    """Post `messages` into each of `sessions` sessions without waiting in between; return the message ids."""
    answers = [
        _post(adapter, f"{prefix}-{session}", f"message {number} of {session}")
        for number in range(messages)
        for session in range(sessions)
    ]
    return list(await asyncio.wait_for(asyncio.gather(*answers), 30))


def _post(adapter: ChannelClient, session: str, text: str) -> asyncio.Future[bytes]:
    stored: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def settle(message_id: bytes, error: Error | None) -> None:
        if error is None:
            stored.set_result(message_id)
        else:
            stored.set_exception(AssertionError(f"refused: {error}"))

    item = InboundMessage(agent=ECHO, session=session, idempotency_key=uuid.uuid4().hex, message=text_message(text))
    adapter.post(item, settle)
    return stored


def _check_each_session_says(seen: Record, sessions: int, messages: int, prefix: str = "s") -> None:
    """Assert that each session was answered in the order sent."""
    for session in range(sessions):
        answers = [answer(delivery) for delivery in seen.of_session(f"{prefix}-{session}")]
        assert len(answers) == messages
        for number, text in enumerate(answers):
            assert f"message {number} of {session}" in text


async def _next_delivery(events: AsyncIterator[Delivery | LiveEvent]) -> Delivery:
    async for event in events:
        if isinstance(event, Delivery):
            return event
    raise AssertionError("the stream ended")
