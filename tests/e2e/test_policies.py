"""What a message does that arrives while a turn runs, and control of turns and sessions, on the whole stack."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import ArrivalPolicy, Outcome
from soma.gateway.v1.channel_service_pb2 import Receipt
from soma.router.v1.session_service_pb2 import (
    CancelSessionRequest,
    GetSessionRequest,
    InterruptSessionRequest,
    ListMessagesRequest,
    PauseSessionRequest,
    ResumeSessionRequest,
    Session,
    SessionMessage,
)
from soma.router.v1.turn_service_pb2 import (
    CancelTurnRequest,
    GetTurnRequest,
    InterruptTurnRequest,
    ListStepsRequest,
    ResumeTurnRequest,
    TurnStatus,
)

from soma_common.client.channel_client import ChannelClient
from soma_common.errors import from_rpc_error
from soma_common.ids import SessionName, TurnName, turn_id
from soma_common.testing.eventually import eventually
from tests.e2e.record import Record, answer, text_of
from tests.e2e.stack import ECHO, WITNESS, Stack
from tests.stalls import Stalls

ENQUEUE = ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE
ACCUMULATE = ArrivalPolicy.ARRIVAL_POLICY_ACCUMULATE
INTERRUPT = ArrivalPolicy.ARRIVAL_POLICY_INTERRUPT
ROLLBACK = ArrivalPolicy.ARRIVAL_POLICY_ROLLBACK
REJECT = ArrivalPolicy.ARRIVAL_POLICY_REJECT
GATHERING_S = 8.0
DUE_WITHIN_S = 1.0
RECOVERY_S = 5.0
"""What a router may take to go on after a kill, if that is later than when the group is due."""


class Talk:
    """One session of the witness, and what its adapter saw."""

    def __init__(self, stack: Stack, adapter: ChannelClient, seen: Record, channel: str) -> None:
        self.stack, self.adapter, self.seen = stack, adapter, seen
        self.name = SessionName("demo", WITNESS, channel, "s")

    async def say(self, text: str, policy: ArrivalPolicy.ValueType = ENQUEUE) -> Receipt:
        return await self.adapter.send(WITNESS, "s", text, policy=policy)

    async def is_heard(self, text: str) -> None:
        await eventually(lambda: self.stack.was_asked(text), 15.0, f"the model is asked {text!r}")

    def turn(self, receipt: Receipt) -> str:
        return str(TurnName(self.name, turn_id(self.name.id, receipt.message_id)))

    async def session(self) -> Session:
        async with self.stack.sessions() as sessions:
            return (await sessions.GetSession(GetSessionRequest(name=str(self.name)), timeout=10)).session

    async def messages(self) -> list[SessionMessage]:
        async with self.stack.sessions() as sessions:
            answer_ = await sessions.ListMessages(ListMessagesRequest(parent=str(self.name)), timeout=10)
            return list(answer_.messages)

    async def pause(self, request_id: str = "") -> Session:
        async with self.stack.sessions() as sessions:
            request = PauseSessionRequest(name=str(self.name), request_id=request_id)
            return (await sessions.PauseSession(request, timeout=15)).session

    async def resume(self) -> Session:
        async with self.stack.sessions() as sessions:
            return (await sessions.ResumeSession(ResumeSessionRequest(name=str(self.name)), timeout=15)).session


@asynccontextmanager
async def talking(stack: Stack, channel: str) -> AsyncIterator[Talk]:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery, on_live=seen.on_live) as adapter:
        yield Talk(stack, adapter, seen, channel)


async def test_an_interrupting_message_is_answered_next_and_the_model_sees_what_was_done(
    stack: Stack, channel: str
) -> None:
    async with talking(stack, channel) as talk:
        first = await talk.say(f"for ever: {channel}")
        await eventually(lambda: any(event.HasField("text") for event in talk.seen.live), 15.0, "text")
        second = await talk.say(f"and now {channel}-2", INTERRUPT)
        stopped = await talk.seen.outcome_of(first.message_id)
        assert stopped.outcome == Outcome.OUTCOME_INTERRUPTED
        assert text_of(stopped.message).startswith("word")
        assert stopped.message.metadata["interrupted"] == "true"
        assert answer(await talk.seen.outcome_of(second.message_id))
        talk.seen.check([first.message_id, second.message_id])
        asked = next(call for call in stack.model.calls if f"{channel}-2" in call.last_text)
        assert any(
            "word" in str(message.get("content")) for message in asked.messages if message["role"] == "assistant"
        )


async def test_a_rolled_back_turn_never_was(stack: Stack, channel: str) -> None:
    async with talking(stack, channel) as talk:
        first = await talk.say(f"for ever: {channel}")
        await talk.is_heard(channel)
        second = await talk.say(f"I meant {channel}-2", ROLLBACK)
        delivery = await talk.seen.outcome_of(second.message_id)
        assert list(delivery.message_ids) == [first.message_id, second.message_id]
        assert (delivery.outcome, delivery.position) == (Outcome.OUTCOME_FINAL, 1)
        talk.seen.check([first.message_id, second.message_id])
        assert delivery.turn_id != turn_id(talk.name.id, first.message_id)
        async with stack.turns() as turns:
            dropped = (await turns.GetTurn(GetTurnRequest(name=talk.turn(first)), timeout=10)).turn
        assert dropped.outcome == Outcome.OUTCOME_ABSORBED
        asked = next(call for call in stack.model.calls if f"{channel}-2" in call.last_text)
        assert not any(message["role"] == "assistant" for message in asked.messages), "the work is dropped"


async def test_a_busy_session_refuses_and_says_which_turn_runs(stack: Stack, channel: str) -> None:
    async with talking(stack, channel) as talk:
        first = await talk.say(f"slowly: {channel}")
        await talk.is_heard(channel)
        second = await talk.say("me too", REJECT)
        refused = await talk.seen.outcome_of(second.message_id, 2.0)
        assert refused.outcome == Outcome.OUTCOME_REJECTED
        assert refused.error.reason == ErrorReason.ERROR_REASON_TURN_RUNNING
        assert refused.error.metadata["turn"] == talk.turn(first)
        await talk.seen.all_answered([first.message_id, second.message_id])
        _, message = await talk.messages()
        assert (message.outcome, message.turn) == (Outcome.OUTCOME_REJECTED, talk.turn(second))


async def test_messages_that_gather_get_one_answer(stack: Stack, channel: str) -> None:
    async with talking(stack, channel) as talk:
        sent = [await talk.say(f"line {number} {channel}", ACCUMULATE) for number in range(5)]
        await talk.seen.all_answered([receipt.message_id for receipt in sent])
        assert len(talk.seen.deliveries) < 5, "they came within their debounce time"
        everything = "\n".join(str(call.messages) for call in stack.model.calls if channel in str(call.messages))
        assert all(f"line {number} {channel}" in everything for number in range(5))


async def test_a_group_that_gathers_outlives_its_router_and_starts_once(stack: Stack, channel: str) -> None:
    agent = f"gathers-{channel[-6:]}"
    await stack.add_agent("demo", agent, "echo/echo", debounce_ms=round(GATHERING_S * 1000), debounce_max_ms=60_000)
    await stack.agent_is_known("demo", agent)
    seen = Record()
    async with Stalls() as stalls, stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        sent = [await adapter.send(agent, "s", f"line {number}", policy=ACCUMULATE) for number in range(2)]
        asked_at = time.monotonic()
        sent.append(await adapter.send(agent, "s", "line 2", policy=ACCUMULATE))
        name = SessionName("demo", agent, channel, "s")
        await eventually(lambda: _stored(stack, name, 3), 10.0, "they are stored")
        stored_at = time.monotonic()
        await stack.kill("router-0")
        delivery = await seen.outcome_of(sent[0].message_id)
        ended_at = time.monotonic()
        stalled_s = stalls.since(stored_at, ended_at)
        assert list(delivery.message_ids) == [receipt.message_id for receipt in sent]
        assert ended_at - asked_at >= 6.0 - 0.5, "not before its time"
        assert ended_at - stored_at < 6.0 + DUE_WITHIN_S + 5.0 + stalled_s, "the recovery of the router, and a second"
        seen.check([receipt.message_id for receipt in sent])


async def _stored(stack: Stack, session: SessionName, count: int) -> bool:
    async with stack.sessions() as sessions:
        try:
            answer_ = await sessions.ListMessages(ListMessagesRequest(parent=str(session)), timeout=10)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            return False
        return len(answer_.messages) == count


async def test_a_stop_outlives_the_router_that_was_asked(stack: Stack, channel: str) -> None:
    async with talking(stack, channel) as talk:
        first = await talk.say(f"for ever: {channel}")
        await talk.is_heard(channel)
        asking = asyncio.create_task(talk.say(f"stop {channel}-2", INTERRUPT))
        second = await asking
        await stack.kill("router-0")
        await talk.seen.all_answered([first.message_id, second.message_id])
        outcome = await talk.seen.outcome_of(first.message_id)
        assert outcome.outcome == Outcome.OUTCOME_INTERRUPTED


async def test_a_paused_session_keeps_what_comes_over_a_restart(stack: Stack, channel: str) -> None:
    async with talking(stack, channel) as talk:
        first = await talk.say(f"hello {channel}")
        await talk.seen.outcome_of(first.message_id)
        assert (await talk.pause("once")).paused
        assert (await talk.pause("once")).paused, "again changes nothing"
        waiting = [await talk.say(f"later {number} {channel}") for number in range(2)]
        await stack.kill("router-0")
        await eventually(lambda: _queued(talk, 2), 15.0, "two messages wait")
        assert not stack.was_asked(f"later 0 {channel}")
        assert [message.queue_position for message in await talk.messages()] == [0, 1, 2]
        assert (await talk.session()).HasField("oldest_queued_time")
        assert not (await talk.resume()).paused
        await talk.seen.all_answered([receipt.message_id for receipt in [first, *waiting]])


async def _queued(talk: Talk, count: int) -> bool:
    return (await talk.session()).queued_count == count


async def test_a_stopped_turn_can_be_resumed(stack: Stack, channel: str) -> None:
    async with talking(stack, channel) as talk, stack.turns() as turns:
        first = await talk.say(f"for ever: {channel}")
        await talk.is_heard(channel)
        name = talk.turn(first)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await turns.ResumeTurn(ResumeTurnRequest(name=name), timeout=15)
        assert from_rpc_error(refused.value).reason == ErrorReason.ERROR_REASON_TURN_NOT_RESUMABLE
        stopped = (await turns.InterruptTurn(InterruptTurnRequest(name=name), timeout=15)).turn
        assert stopped.status in (TurnStatus.TURN_STATUS_CONVERGING, TurnStatus.TURN_STATUS_ENDED)
        assert (await talk.seen.outcome_of(first.message_id)).outcome == Outcome.OUTCOME_INTERRUPTED
        again = (await turns.InterruptTurn(InterruptTurnRequest(name=name), timeout=15)).turn
        assert again.outcome == Outcome.OUTCOME_INTERRUPTED
        resumed = await turns.ResumeTurn(ResumeTurnRequest(name=name, request_id="r1"), timeout=15)
        same = await turns.ResumeTurn(ResumeTurnRequest(name=name, request_id="r1"), timeout=15)
        assert same == resumed
        delivery = await talk.seen.outcome_of(bytes.fromhex(resumed.message_id))
        assert resumed.turn_name.endswith(delivery.turn_id.hex())
        assert answer(delivery)


async def test_a_session_is_interrupted_or_cancelled_as_a_whole(stack: Stack, channel: str) -> None:
    async with talking(stack, channel) as talk, stack.sessions() as sessions:
        sent = [await talk.say(f"for ever: {channel}-{number}") for number in range(3)]
        await talk.is_heard(f"{channel}-0")
        await sessions.InterruptSession(InterruptSessionRequest(name=str(talk.name)), timeout=15)
        assert (await talk.seen.outcome_of(sent[0].message_id)).outcome == Outcome.OUTCOME_INTERRUPTED
        await talk.is_heard(f"{channel}-1")
        await sessions.CancelSession(CancelSessionRequest(name=str(talk.name)), timeout=15)
        await talk.seen.all_answered([receipt.message_id for receipt in sent])
        outcomes = [delivery.outcome for delivery in talk.seen.of_session("s")]
        assert outcomes[1:] == [Outcome.OUTCOME_CANCELLED] * 2
        assert not stack.was_asked(f"{channel}-2")
        last = await talk.say("goes on")
        assert answer(await talk.seen.outcome_of(last.message_id))


async def test_a_tool_in_flight_is_closed_in_the_transcript(stack: Stack, channel: str) -> None:
    """The journal of a stopped turn is whole: each call that was confirmed has a result, whatever became of it."""
    async with talking(stack, channel) as talk, stack.turns() as turns:
        sent = [await talk.say(f"What is {number} * 3? {channel}") for number in range(8)]
        for receipt in sent:
            name = talk.turn(receipt)
            await eventually(partial(_exists, turns, name), 15.0, "the turn begins")
            await turns.CancelTurn(CancelTurnRequest(name=name), timeout=15)
        await talk.seen.all_answered([receipt.message_id for receipt in sent])
        for receipt in sent:
            steps = (await turns.ListSteps(ListStepsRequest(parent=talk.turn(receipt)), timeout=10)).steps
            calls = sum(len(step.body.model_reply.tool_calls) for step in steps)
            results = sum(len(step.body.tool_results.results) for step in steps)
            assert calls == results


async def _exists(turns: object, name: str) -> bool:
    try:
        await turns.GetTurn(GetTurnRequest(name=name), timeout=10)  # type: ignore[attr-defined]
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
        return False
    return True


async def test_agents_have_a_policy_of_their_own(stack: Stack, channel: str) -> None:
    agent = f"rejects-{channel[-6:]}"
    await stack.add_agent("demo", agent, "echo/delay-1500-1500", arrival_policy=REJECT)
    await stack.agent_is_known("demo", agent)
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        first = await adapter.send(agent, "s", "one")
        second = await adapter.send(agent, "s", "two")
        third = await adapter.send(agent, "s", "three", policy=ENQUEUE)
        await seen.all_answered([receipt.message_id for receipt in (first, second, third)])
    assert [delivery.outcome for delivery in seen.deliveries] == [
        Outcome.OUTCOME_REJECTED, Outcome.OUTCOME_FINAL, Outcome.OUTCOME_FINAL,
    ]  # fmt: skip


async def test_an_echo_is_not_disturbed_by_its_neighbours_stops(stack: Stack, channel: str) -> None:
    async with talking(stack, channel) as talk:
        first = await talk.say(f"for ever: {channel}")
        await talk.is_heard(channel)
        others = [await talk.adapter.send(ECHO, f"other-{number}", f"{number}") for number in range(10)]
        second = await talk.say("stop", INTERRUPT)
        await talk.seen.all_answered([r.message_id for r in [first, second, *others]])
