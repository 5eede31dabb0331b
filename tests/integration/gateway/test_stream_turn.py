"""StreamTurn and the watcher behind it, against a scripted owner of the partition."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, TypeVar

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import LiveEvent, Outcome, TextDelta, ToolCall, TurnState, WatchPosition
from soma.gateway.v1.channel_service_pb2 import (
    Decision,
    SendMessageRequest,
    SendMessageResponse,
    StreamTurnRequest,
    StreamTurnResponse,
    WatchSessionRequest,
    WatchTurnRequest,
)
from soma.router.v1.outbound_pb2 import WatchSnapshot

from soma_common import errors, ids
from soma_common.errors import ResourceExhausted
from soma_common.live import MAX_BUFFERED, LiveHub, Subject
from soma_common.live_errors import position_of
from soma_common.testing.eventually import eventually
from tests.integration.gateway.harness import AGENT, CHANNEL, PARTITIONS, TENANT, World, delivery, message

if TYPE_CHECKING:
    from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceAsyncStub

T = TypeVar("T")
SESSION = ids.SessionName(TENANT, AGENT, CHANNEL, "s")
MESSAGE = ids.message_id(TENANT, AGENT, CHANNEL, "s", "k")
TURN = ids.turn_id(SESSION.id, MESSAGE)
REQUEST = StreamTurnRequest(
    session=SessionKey(tenant=TENANT, agent=AGENT, channel=CHANNEL, session="s"),
    idempotency_key="k",
    message=message("hi"),
)


def event(step: int = 1, dispatch: int = 1, **content: object) -> LiveEvent:
    return LiveEvent(agent=AGENT, session="s", turn_id=TURN, dispatch=dispatch, step=step, **content)  # type: ignore[arg-type]


def begun(dispatch: int = 1, step: int = 1) -> LiveEvent:
    return event(step, dispatch, state=TurnState.TURN_STATE_THINKING, message_ids=[MESSAGE])


def text(offset: int, said: str, step: int = 1, dispatch: int = 1) -> LiveEvent:
    return event(step, dispatch, text=TextDelta(offset=offset, text=said))


def ended(answer: str = "") -> LiveEvent:
    outcome = delivery(1)
    outcome.message.parts[0].text = answer
    outcome.turn_id = TURN
    outcome.message_ids.append(MESSAGE)
    return event(ended=outcome)


def hub(world: World, tenant_watches: int = 10) -> LiveHub:
    return LiveHub(world.router.nc, PARTITIONS, tenant_watches=tenant_watches, bound="test.tenant_watches")


def said(events: list[StreamTurnResponse]) -> str:
    return "".join(e.live.text.text for e in events if e.live.HasField("text"))


async def test_receipt_then_live_then_outcome(world: World) -> None:
    stub = await world.stub(await world.gateway())
    events: list[StreamTurnResponse] = []

    async def watch() -> None:
        async for received in stub.StreamTurn(REQUEST):
            events.append(received)  # noqa: PERF401 - looked at while it grows

    watching = asyncio.create_task(watch())
    await eventually(lambda: events)
    assert events[0].receipt.message_id == MESSAGE
    [(_, stored)] = await world.router.stored()
    assert not stored.deliver
    asked = world.router.queries[0]
    assert (asked.message_id, asked.content_hash) == (MESSAGE, stored.content_hash)
    world.router.snapshot = WatchSnapshot(known=True, events=[begun()])
    await world.router.tell("s", begun(), text(0, "he"))
    await world.router.tell("s", text(2, "llo"))
    await world.router.tell("other", text(5, "!!!"))
    await world.router.tell("s", ended("hello"))
    await watching
    assert said(events) == "hello"
    assert events[-1].outcome.turn_id == TURN


async def test_a_turn_that_has_ended_is_answered_from_the_snapshot(world: World) -> None:
    world.router.snapshot = WatchSnapshot(known=True, events=[ended()])
    stub = await world.stub(await world.gateway())
    events = [e async for e in stub.StreamTurn(REQUEST)]
    assert [e.WhichOneof("event") for e in events] == ["receipt", "outcome"]


async def test_the_turn_of_other_content_under_the_same_key_is_not_shown(world: World) -> None:
    """It names the message too, as the key makes the id; the owner says which turn answers this content."""
    stub = await world.stub(await world.gateway())
    refused = ended()
    refused.turn_id = refused.ended.turn_id = b"r" * 16
    events: list[StreamTurnResponse] = []
    async for received in stub.StreamTurn(REQUEST):
        events.append(received)
        if received.HasField("receipt"):
            await world.router.tell("s", begun(), text(0, "not ours"), ended())
            await eventually(lambda: len(world.router.queries) >= 2)
            world.router.snapshot = WatchSnapshot(known=True, events=[refused])
            await world.router.tell("s", refused)
    assert said(events) == ""
    assert events[-1].outcome.turn_id == b"r" * 16


async def test_a_tenant_is_shown_a_bounded_number_of_turns(world: World) -> None:
    target = await world.gateway(tenant_watches=1)
    stub = await world.stub(target)
    first = stub.StreamTurn(REQUEST)
    await first.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.StreamTurn(REQUEST).read()
    error = errors.from_rpc_error(caught.value)
    assert isinstance(error, ResourceExhausted)
    assert error.metadata["bound"] == "gateway.tenant_watches"
    first.cancel()

    async def shown() -> bool:
        try:
            return bool(await stub.StreamTurn(REQUEST).read())
        except grpc.aio.AioRpcError:
            return False

    await eventually(shown)


async def test_a_refused_message_ends_the_call(world: World) -> None:
    stub = await world.stub(await world.gateway())
    request = StreamTurnRequest()
    request.CopyFrom(REQUEST)
    request.session.agent = "nobody"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.StreamTurn(request):
            pass
    assert errors.from_rpc_error(caught.value).reason == ErrorReason.ERROR_REASON_AGENT_NOT_FOUND


async def test_leaving_stops_nothing_and_calling_again_goes_on(world: World) -> None:
    stub = await world.stub(await world.gateway())
    call = stub.StreamTurn(REQUEST)
    async for _ in call:
        break
    call.cancel()
    world.router.snapshot = WatchSnapshot(known=True, events=[begun(), text(0, "so far")])
    events: list[StreamTurnResponse] = []
    async for received in stub.StreamTurn(REQUEST):
        events.append(received)
        if said(events) == "so far":
            await world.router.tell("s", text(6, " an"), ended("so far and on"))
    assert said(events) == "so far and on"
    assert len({item.message_id for _, item in await world.router.stored()}) == 1


async def test_a_watch_waits_for_an_owner_and_fills_gaps_from_snapshots(world: World) -> None:
    world.router.snapshot = None  # nobody owns the partition
    events: list[LiveEvent] = []
    async with hub(world).watch(Subject(SESSION, message_id=MESSAGE)) as watch:

        async def read() -> None:
            async for received, _ in watch:
                events.append(received)

        reading = asyncio.create_task(read())
        await eventually(lambda: len(world.router.queries) >= 2)
        world.router.snapshot = WatchSnapshot(known=True, events=[begun(), text(0, "abc")])
        await eventually(lambda: len(events) == 2)
        world.router.snapshot = WatchSnapshot(known=True, events=[begun(), text(0, "abcdefghi")])
        await world.router.tell("s", text(6, "ghi"))
        await eventually(lambda: "".join(e.text.text for e in events) == "abcdefghi")
        world.router.snapshot = WatchSnapshot(
            known=True,
            events=[
                event(1, 2, tool_call=ToolCall(tool="t"), next_offset=1),
                event(2, 2, state=TurnState.TURN_STATE_TOOL_CALL, step_size=1),
                text(0, "x", 2, 2),
            ],
        )
        await world.router.tell("s", text(1, "y", 2, 2))
        await eventually(lambda: any(e.HasField("restarted") for e in events))
        await eventually(lambda: events[-1].text.text == "y")
        done = ended("xy")
        done.step, done.dispatch = 2, 2
        await world.router.tell("s", done)
        await reading
    kinds = [e.WhichOneof("event") for e in events]
    assert kinds[-6:] == ["restarted", "tool_call", "state", "text", "text", "ended"]


async def test_interest_is_renewed(world: World) -> None:
    world.router.snapshot = WatchSnapshot(known=True, events=[begun()])
    async with hub(world).watch(Subject(SESSION, turn_id=TURN)):
        await eventually(lambda: len(world.router.queries) >= 2, timeout_s=4)
        assert world.router.queries[0].after.turn_id == TURN


async def test_a_slow_watcher_is_told_to_resume_and_where(world: World) -> None:
    world.router.snapshot = WatchSnapshot(known=True, events=[begun()])
    async with hub(world).watch(Subject(SESSION, turn_id=TURN)) as watch:
        assert (await anext(watch)).event.HasField("state")
        await world.router.tell("s", text(0, "x"))
        assert (await anext(watch)).event.text.text == "x"
        for number in range(1, MAX_BUFFERED + 200, 100):
            await world.router.tell("s", *(text(at, "x") for at in range(number, number + 100)))
        await world.router.nc.flush()
        await asyncio.sleep(0.3)  # nothing is read meanwhile
        with pytest.raises(ResourceExhausted) as caught:
            async for _ in watch:
                pass
    after = position_of(caught.value.metadata)
    assert after == WatchPosition(turn_id=TURN, dispatch=1, step=1, offset=1)
    world.router.snapshot = WatchSnapshot(known=True, events=[begun(), text(1, "y" * 5000)])
    async with hub(world).watch(Subject(SESSION, turn_id=TURN), after=after) as watch:
        resumed = [(await anext(watch)).event for _ in range(2)]
    assert resumed[1].text.text == "y" * 5000
    assert world.router.queries[-1].after == after


async def test_watches_of_one_session_share_what_comes_and_each_sees_all(world: World) -> None:
    world.router.snapshot = WatchSnapshot(known=True, events=[begun()])
    shared = hub(world, tenant_watches=600)
    async with AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(shared.watch(Subject(SESSION, turn_id=TURN)))]
        subscribed = len(world.router.nc._subs)
        watches += [await stack.enter_async_context(shared.watch(Subject(SESSION, turn_id=TURN))) for _ in range(499)]
        assert len(world.router.nc._subs) == subscribed
        world.router.snapshot = WatchSnapshot(known=True, events=[begun(), text(0, "hello")])
        await world.router.tell("s", text(0, "he"), text(2, "llo"))
        await world.router.tell("s", ended("hello"))
        for watch in watches:
            events = [watched.event async for watched in watch]
            assert "".join(e.text.text for e in events) == "hello"
            assert events[-1].HasField("ended")
    assert len(world.router.nc._subs) == subscribed - 1


async def test_a_watch_over_the_bound_of_its_tenant_is_refused(world: World) -> None:
    world.router.snapshot = WatchSnapshot(known=True, events=[begun()])
    one = hub(world, tenant_watches=1)
    async with one.watch(Subject(SESSION, turn_id=TURN)):
        with pytest.raises(ResourceExhausted) as caught:
            await one.watch(Subject(SESSION)).__aenter__()
        assert caught.value.metadata["bound"] == "test.tenant_watches"
        assert caught.value.retry_delay_s
    async with one.watch(Subject(SESSION, turn_id=TURN)):
        pass


async def test_a_watch_ends_with_its_token(world: World) -> None:
    world.router.snapshot = WatchSnapshot(known=True, events=[begun()])
    stub = await world.stub(await world.gateway(), ttl_s=2)
    name = str(ids.TurnName(SESSION, TURN))
    events: list[LiveEvent] = []

    async def watch() -> None:
        async for received in stub.WatchTurn(WatchTurnRequest(name=name)):
            events.append(received.event)  # noqa: PERF401 - what came before the end counts

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watch()
    assert errors.from_rpc_error(caught.value).reason == ErrorReason.ERROR_REASON_UNAUTHENTICATED
    assert [e.WhichOneof("event") for e in events] == ["state"]


async def test_a_turn_that_is_not_there_is_not_found(world: World) -> None:
    stub = await world.stub(await world.gateway())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.WatchTurn(WatchTurnRequest(name=str(ids.TurnName(SESSION, TURN)))).read()
    assert errors.from_rpc_error(caught.value).reason == ErrorReason.ERROR_REASON_TURN_NOT_FOUND


async def test_a_position_of_no_turn_is_told(world: World) -> None:
    world.router.snapshot = WatchSnapshot(position_unknown=True)
    stub = await world.stub(await world.gateway())
    request = WatchSessionRequest(name=str(SESSION), resume_from=WatchPosition(turn_id=TURN, step=1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.WatchSession(request).read()
    assert errors.from_rpc_error(caught.value).reason == ErrorReason.ERROR_REASON_WATCH_POSITION_UNKNOWN


async def test_a_session_is_watched_over_its_turns(world: World) -> None:
    world.router.snapshot = WatchSnapshot(
        known=True, idle_at=WatchPosition(turn_id=b"l" * 16, step=2, ended=True), idle_number=4
    )
    stub = await world.stub(await world.gateway())
    call = stub.WatchSession(WatchSessionRequest(name=str(SESSION)))
    await eventually(lambda: world.router.queries)
    assert world.router.queries[0].session
    first, last = begun(), ended()
    first.turn_number, last.turn_number, last.step_size = 5, 5, 0
    for _ in range(50):  # until the gateway has the answer that it waits for
        await world.router.tell("s", first, last)
        await asyncio.sleep(0.02)
    received = [event async for event in _first(call, 2)]
    assert [r.event.WhichOneof("event") for r in received] == ["state", "ended"]
    assert received[1].position.ended
    call.cancel()


@pytest.mark.parametrize(
    ("answer", "decision", "ahead"),
    [
        (WatchSnapshot(known=True, queued=True, ahead=3), Decision.DECISION_QUEUED, 3),
        (WatchSnapshot(known=True, events=[begun()]), Decision.DECISION_TAKEN, 0),
        (WatchSnapshot(known=True, events=[ended()]), Decision.DECISION_ENDED, 0),
    ],
)
async def test_a_receipt_says_what_became_of_the_message(
    world: World, answer: WatchSnapshot, decision: Decision.ValueType, ahead: int
) -> None:
    stub = await world.stub(await world.gateway())
    sending = asyncio.ensure_future(_send_and_wait(stub))
    await eventually(lambda: len(world.router.queries) >= 2)
    assert not sending.done()
    world.router.snapshot = answer
    receipt = await sending
    assert (receipt.decision, receipt.ahead) == (decision, ahead)
    assert receipt.turn_name == ("" if ahead else str(ids.TurnName(SESSION, TURN)))


async def test_a_refused_message_ends_the_call_that_waits_for_its_fate(world: World) -> None:
    refusal = ended()
    refusal.ended.outcome = Outcome.OUTCOME_REJECTED
    refusal.ended.error.reason = ErrorReason.ERROR_REASON_TURN_RUNNING
    refusal.ended.error.metadata["turn"] = "it"
    world.router.snapshot = WatchSnapshot(known=True, events=[refusal])
    stub = await world.stub(await world.gateway())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _send_and_wait(stub)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    error = errors.from_rpc_error(caught.value)
    assert (error.reason, error.metadata["turn"]) == (ErrorReason.ERROR_REASON_TURN_RUNNING, "it")


async def test_a_fate_that_is_not_known_in_time_says_that_the_message_is_stored(world: World) -> None:
    stub = await world.stub(await world.gateway())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _send_and_wait(stub, timeout_s=2.0)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert errors.from_rpc_error(caught.value).metadata["message_id"] == MESSAGE.hex()
    assert len(await world.router.stored()) == 1


async def test_a_message_that_is_rolled_back_is_followed_into_the_next_turn(world: World) -> None:
    stub = await world.stub(await world.gateway())
    world.router.snapshot = WatchSnapshot(known=True, events=[begun(), text(0, "dropped")])
    given_up = ended()
    given_up.ended.outcome = Outcome.OUTCOME_ABSORBED
    second = begun()
    second.turn_id = b"2" * 16
    answer = ended()
    answer.turn_id = answer.ended.turn_id = second.turn_id
    events: list[StreamTurnResponse] = []
    async for received in stub.StreamTurn(REQUEST):
        events.append(received)
        if received.live.text.text == "dropped":
            world.router.snapshot = WatchSnapshot(known=True, events=[given_up])
            await world.router.tell("s", given_up)
        elif received.live.HasField("ended"):
            world.router.snapshot = WatchSnapshot(known=True, events=[second])
            await world.router.tell("s", second)
        elif received.live.turn_id == second.turn_id:
            world.router.snapshot = WatchSnapshot(known=True, events=[answer])
            await world.router.tell("s", answer)
    assert events[-1].outcome.turn_id == second.turn_id


async def _first(call: AsyncIterable[T], count: int) -> AsyncIterator[T]:
    async for event in call:
        yield event
        count -= 1
        if not count:
            return


async def _send_and_wait(stub: "ChannelServiceAsyncStub", timeout_s: float = 10.0) -> SendMessageResponse:
    request = SendMessageRequest(
        session=REQUEST.session, idempotency_key="k", message=REQUEST.message, wait_for_decision=True
    )
    return await stub.SendMessage(request, timeout=timeout_s)
