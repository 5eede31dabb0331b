"""A conversation from end to end: streamed, with tools, read back from the journal."""

import uuid
from typing import TYPE_CHECKING

import grpc
from soma.common.v1.message_pb2 import Message, Part, Role, SessionKey
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome, TurnState
from soma.gateway.v1.channel_service_pb2 import SendMessageRequest, StreamTurnRequest, StreamTurnResponse
from soma.router.v1.session_service_pb2 import GetSessionRequest, ListMessagesRequest, SessionState
from soma.router.v1.turn_service_pb2 import GetTurnRequest, ListStepsRequest, TurnStatus, WatchTurnRequest

from soma_common.ids import SessionName, TurnName
from soma_common.testing.eventually import eventually
from tests.e2e.record import Record, answer, shown_text, text_of
from tests.e2e.stack import ECHO, OFFLINE, WITNESS, Stack

if TYPE_CHECKING:
    from soma.router.v1.turn_service_pb2_grpc import TurnServiceAsyncStub


async def test_a_tool_call_is_streamed_step_by_step(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery, on_live=seen.on_live) as adapter:
        receipt = await adapter.send(OFFLINE, "s", "what is 17*23")
        delivery = await seen.outcome_of(receipt.message_id)
        assert "391" in answer(delivery)
        live = await eventually(lambda: _whole_turn(seen, delivery), what="the answer's text as live events")

    states = [event.state for event in live if event.HasField("state")]
    tool_states = [TurnState.TURN_STATE_THINKING, TurnState.TURN_STATE_TOOL_CALL, TurnState.TURN_STATE_REFLECTING]
    assert states[:3] == tool_states
    calls = [event.tool_call for event in live if event.HasField("tool_call")]
    results = [event.tool_result for event in live if event.HasField("tool_result")]
    assert [call.tool for call in calls] == [result.tool for result in results]
    assert len(calls) == 1
    assert results[0].result.number_value == 391 or "391" in str(results[0].result)


async def test_the_journal_can_be_read_back(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        receipt = await adapter.send(OFFLINE, "s", "what is 6*7")
        delivery = await seen.outcome_of(receipt.message_id)
    session = SessionName("demo", OFFLINE, channel, "s")
    turn = str(TurnName(session, delivery.turn_id))
    async with stack.turns() as turns, stack.sessions() as sessions:
        read = (await turns.GetTurn(GetTurnRequest(name=turn), timeout=10)).turn
        steps = (await turns.ListSteps(ListStepsRequest(parent=turn), timeout=10)).steps
        messages = (await sessions.ListMessages(ListMessagesRequest(parent=str(session)), timeout=10)).messages
        state = (await sessions.GetSession(GetSessionRequest(name=str(session)), timeout=10)).session
    assert (read.status, read.outcome, read.dispatch) == (TurnStatus.TURN_STATUS_ENDED, Outcome.OUTCOME_FINAL, 1)
    assert text_of(read.message) == answer(delivery)
    assert list(read.message_ids) == [receipt.message_id.hex()]
    assert [step.number for step in steps] == [1, 2, 3]
    assert [step.body.WhichOneof("body") for step in steps] == ["model_reply", "tool_results", "final"]
    assert [(m.message_id, m.turn) for m in messages] == [(receipt.message_id.hex(), turn)]
    assert (state.state, state.message_count, state.turn_count) == (SessionState.SESSION_STATE_IDLE, 1, 1)


async def test_what_is_remembered_is_recalled_in_a_later_turn(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        told = await adapter.send(OFFLINE, "s", "remember that my train leaves at nine")
        await seen.outcome_of(told.message_id)
        asked = await adapter.send(OFFLINE, "s", "what did I ask you to remember")
        recalled = await seen.outcome_of(asked.message_id)
        elsewhere = await adapter.send(OFFLINE, "other", "what did I ask you to remember")
        nothing = await seen.outcome_of(elsewhere.message_id)
    assert "train leaves at nine" in answer(recalled)
    assert "train" not in answer(nothing)


async def test_the_offline_model_says_so(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        receipt = await adapter.send(OFFLINE, "s", "hello")
        assert "offline" in answer(await seen.outcome_of(receipt.message_id)).lower()


async def test_the_model_sees_the_conversation_so_far(stack: Stack, channel: str) -> None:
    seen = Record()
    before = len(stack.model.calls)
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        for number in range(3):
            receipt = await adapter.send(WITNESS, "s", f"message {number}")
            assert f"message {number}" in answer(await seen.outcome_of(receipt.message_id))
    calls = stack.model.calls[before:]
    said = [m["content"] for m in calls[-1].messages if m["role"] == "user"]
    assert said == ["message 0", "message 1", "message 2"]


async def test_the_model_is_called_once_for_each_step(stack: Stack, channel: str) -> None:
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        receipt = await adapter.send(WITNESS, "s", "what is 2*3*7?")
        delivery = await seen.outcome_of(receipt.message_id)
    assert "42" in answer(delivery)
    turn = delivery.turn_id.hex()
    steps = {key: count for key, count in stack.model.calls_by_step().items() if key[0] == turn}
    assert steps == {(turn, 1, 1): 1, (turn, 3, 1): 1}


async def test_stream_turn_sends_and_watches_in_one_call(stack: Stack, channel: str) -> None:
    request = StreamTurnRequest(session=_key(OFFLINE, channel), idempotency_key="one", message=_said("what is 3*5"))
    async with stack.channels() as gateway:
        events = [event async for event in gateway.StreamTurn(request, timeout=30)]
        again = [event async for event in gateway.StreamTurn(request, timeout=30)]
    assert [event.WhichOneof("event") for event in (events[0], events[-1])] == ["receipt", "outcome"]
    assert {event.WhichOneof("event") for event in events[1:-1]} == {"live"}
    assert "15" in answer(events[-1].outcome)
    assert shown_text(_live(events)).endswith(answer(events[-1].outcome))
    assert again[0].receipt.message_id == events[0].receipt.message_id
    assert answer(again[-1].outcome) == answer(events[-1].outcome)
    assert again[-1].outcome.turn_id == events[-1].outcome.turn_id


async def test_a_message_sent_alone_can_be_watched_by_its_turn_name(stack: Stack, channel: str) -> None:
    request = SendMessageRequest(
        session=_key(OFFLINE, channel), idempotency_key="one", message=_said("what is 9*9"), no_delivery=True
    )
    async with stack.channels() as gateway, stack.turns() as turns:
        sent = await gateway.SendMessage(request, timeout=10)
        await eventually(lambda: _exists(turns, sent.turn_name), what="the turn")
        events = [answer.event async for answer in turns.WatchTurn(WatchTurnRequest(name=sent.turn_name), timeout=30)]
    assert events[-1].HasField("ended")
    assert "81" in answer(events[-1].ended)


async def test_two_watchers_see_the_same(stack: Stack, channel: str) -> None:
    first = StreamTurnRequest(session=_key(WITNESS, channel), idempotency_key="one", message=_said("a " * 40))
    async with stack.channels(gateway=0) as one, stack.channels(gateway=1) as other:
        here = one.StreamTurn(first, timeout=30)
        events = [await anext(aiter(here))]
        there = [event async for event in other.StreamTurn(first, timeout=30)]
        events += [event async for event in here]
    assert answer(there[-1].outcome) == answer(events[-1].outcome)
    for watched in (events, there):
        assert shown_text(_live(watched)) == answer(events[-1].outcome)


async def test_content_of_every_kind_arrives(stack: Stack, channel: str) -> None:
    seen = Record()
    message = _said("look at this: äöü 🚀")
    message.metadata["provider-id"] = "77"
    part = message.parts.add()
    part.data.update({"temperature": 21.5, "rooms": ["a", "b"]})
    message.parts.add().file.uri = "https://example.org/picture.png"
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        receipt = await adapter.send(ECHO, "s", message)
        assert "äöü 🚀" in answer(await seen.outcome_of(receipt.message_id))
    async with stack.sessions() as sessions:
        parent = str(SessionName("demo", ECHO, channel, "s"))
        stored = (await sessions.ListMessages(ListMessagesRequest(parent=parent), timeout=10)).messages
    assert stored[0].message == message


def _key(agent: str, channel: str, session: str = "") -> SessionKey:
    return SessionKey(tenant="demo", agent=agent, channel=channel, session=session or uuid.uuid4().hex)


def _said(text: str) -> Message:
    return Message(role=Role.ROLE_USER, parts=[Part(text=text)])


def _live(events: list[StreamTurnResponse]) -> list[LiveEvent]:
    return [event.live for event in events if event.HasField("live")]


def _whole_turn(seen: Record, delivery: Delivery) -> list[LiveEvent]:
    """Return the live events of a turn once they add up to its answer."""
    events = [event for event in seen.live if event.turn_id == delivery.turn_id]
    return events if shown_text(events).endswith(answer(delivery)) else []


async def _exists(turns: "TurnServiceAsyncStub", turn: str) -> bool:
    try:
        await turns.GetTurn(GetTurnRequest(name=turn), timeout=5)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return False
    return True
