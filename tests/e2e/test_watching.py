"""Watchers of turns and sessions: the same content for all, from any place on, whatever dies meanwhile."""

import asyncio
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import ArrivalPolicy, Outcome, QueueState, WatchPosition
from soma.gateway.v1.channel_service_pb2 import (
    Decision,
    SendMessageRequest,
    SendMessageResponse,
    StreamTurnRequest,
    WatchSessionRequest,
    WatchTurnRequest,
)
from soma.router.v1.session_service_pb2 import WatchSessionRequest as RouterWatchSessionRequest

from soma_common.client.channel_client import text_message
from soma_common.client.watch import watch_session, watch_turn
from soma_common.errors import NotFound, from_rpc_error
from soma_common.ids import SessionName, TurnName
from soma_common.live_errors import position_of
from soma_common.live_merge import Watched
from soma_common.testing.eventually import eventually
from tests.e2e.record import answer, text_of
from tests.e2e.stack import ECHO, OFFLINE, WITNESS, Stack
from tests.e2e.viewer import Viewer, Watching

if TYPE_CHECKING:
    from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceAsyncStub

FROM_THE_FIRST = WatchPosition(ended=True)
TURN_TIMEOUT_S = 40.0


def a_session(agent: str, channel: str) -> SessionName:
    return SessionName("demo", agent, channel, uuid.uuid4().hex)


async def say(
    stub: "ChannelServiceAsyncStub",
    session: SessionName,
    text: str,
    *,
    policy: ArrivalPolicy.ValueType = ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE,
    wait: bool = False,
) -> SendMessageResponse:
    key = SessionKey(tenant=session.tenant, agent=session.agent, channel=session.channel, session=session.session)
    request = SendMessageRequest(
        session=key,
        idempotency_key=uuid.uuid4().hex,
        message=text_message(text),
        no_delivery=True,
        policy=policy,
        wait_for_decision=wait,
    )
    return await stub.SendMessage(request, timeout=10)


@pytest.mark.parametrize("part", ["cognition-0", "router-0", "nats"])
async def test_watchers_over_two_gateways_see_the_same_while_a_part_is_killed(
    stack: Stack, channel: str, part: str
) -> None:
    session = a_session(WITNESS, channel)
    here, there = Viewer(), Viewer()
    async with (
        stack.channels(gateway=0) as one,
        stack.channels(gateway=1) as other,
        Watching(here, watch_session(one, str(session), FROM_THE_FIRST)),
        Watching(there, watch_session(other, str(session), FROM_THE_FIRST)),
    ):
        await say(one, session, f"slowly: {channel}")
        await eventually(lambda: len(here.shown) > 20 and len(there.shown) > 20, 20.0, "some of the answer at both")
        await stack.kill(part)
        await eventually(lambda: here.outcomes and there.outcomes, TURN_TIMEOUT_S, "the outcome at both")
    (turn,) = here.outcomes
    assert here.turns == there.turns
    assert here.text(turn) == answer(here.outcomes[turn])
    if part == "cognition-0":
        assert here.taken_back == there.taken_back == 1


@pytest.mark.parametrize("later", [1, 3])
async def test_a_watch_is_resumed_at_another_gateway_after_turns_that_nobody_watched(
    stack: Stack, channel: str, later: int
) -> None:
    session = a_session(OFFLINE, channel)
    always, returning = Viewer(), Viewer()
    async with (
        stack.channels(gateway=0) as one,
        stack.channels(gateway=1) as other,
        Watching(always, watch_session(one, str(session), FROM_THE_FIRST)),
    ):
        await say(one, session, "what is 17*23")
        async with Watching(returning, watch_session(other, str(session), FROM_THE_FIRST)):
            await eventually(lambda: "[" in returning.shown, 20.0, "a call")
        for number in range(later):
            await say(one, session, f"what is {number}*3")
        await eventually(lambda: len(always.outcomes) == later + 1, TURN_TIMEOUT_S, "all outcomes")
        assert len(returning.outcomes) <= 1
        async with Watching(returning, watch_session(one, str(session), returning.position)):
            await eventually(lambda: len(returning.outcomes) == later + 1, TURN_TIMEOUT_S, "all outcomes, later")
    assert returning.turns == always.turns
    assert list(returning.outcomes) == list(always.outcomes)
    assert returning.taken_back == 0


async def test_every_position_is_a_place_to_go_on_from(stack: Stack, channel: str) -> None:
    """A watcher leaves behind each event of a turn with tools, and comes back."""
    session = a_session(OFFLINE, channel)
    async with stack.channels() as gateway:
        sent = await say(gateway, session, "what is 17*23")
        turn = await _known(gateway, sent.turn_name)
        whole = [watched async for watched in watch_turn(gateway, turn)]
        reference = _shown(whole)
        for seen in range(1, len(whole) + 1):
            rest = [watched async for watched in watch_turn(gateway, turn, whole[seen - 1].position)]
            viewer = _shown([*whole[:seen], *rest])
            assert viewer.turns == reference.turns
            assert viewer.taken_back == 0


async def test_a_slow_watcher_is_sent_away_and_goes_on_without_a_gap(stack: Stack, channel: str) -> None:
    session = a_session(ECHO, channel)
    turns = 60
    always, slow = Viewer(), Viewer()
    async with (
        stack.channels(gateway=0) as one,
        stack.channels(gateway=1) as other,
        Watching(always, watch_session(one, str(session), FROM_THE_FIRST)),
    ):
        call = other.WatchSession(WatchSessionRequest(name=str(session), resume_from=FROM_THE_FIRST))
        responses = aiter(call)
        await anext(responses)
        for number in range(turns):
            await say(one, session, f"{number} " + "x" * 120_000)
        await eventually(lambda: len(always.outcomes) == turns, TURN_TIMEOUT_S, "all outcomes")

        async def read_on() -> None:
            async for response in responses:
                slow.show(response.event)
                slow.position = response.position

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_on(), 20.0)
        error = from_rpc_error(caught.value)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.metadata["bound"] == "watch.buffer"
        assert position_of(error.metadata) == slow.position
        async with Watching(slow, watch_session(other, str(session), slow.position)):
            await eventually(lambda: len(slow.outcomes) == turns, TURN_TIMEOUT_S, "all outcomes, later")
    assert slow.turns == always.turns


async def test_a_turn_that_is_cut_ends_for_its_watchers_with_what_is_kept(stack: Stack, channel: str) -> None:
    session = a_session(WITNESS, channel)
    viewer = Viewer()
    async with (
        stack.channels() as gateway,
        Watching(viewer, watch_session(gateway, str(session), FROM_THE_FIRST)),
    ):
        await say(gateway, session, f"for ever: {channel}")
        await eventually(lambda: len(viewer.shown) > 20, 20.0, "text")
        await say(gateway, session, f"now {channel}", policy=ArrivalPolicy.ARRIVAL_POLICY_INTERRUPT)
        await eventually(lambda: len(viewer.outcomes) == 2, TURN_TIMEOUT_S, "both outcomes")
    cut, last = viewer.outcomes.values()
    assert (cut.outcome, last.outcome) == (Outcome.OUTCOME_INTERRUPTED, Outcome.OUTCOME_FINAL)
    assert viewer.text(cut.turn_id) == text_of(cut.message)
    assert viewer.text(last.turn_id) == answer(last)
    assert viewer.taken_back == 0


async def test_a_cancelled_turns_half_sentence_is_taken_back(stack: Stack, channel: str) -> None:
    session = a_session(WITNESS, channel)
    viewer = Viewer()
    async with (
        stack.channels() as gateway,
        Watching(viewer, watch_session(gateway, str(session), FROM_THE_FIRST)),
    ):
        sent = await say(gateway, session, f"for ever: {channel}")
        await eventually(lambda: len(viewer.shown) > 20, 20.0, "text")
        async with stack.adapter(channel) as adapter:
            await adapter.cancel(session.agent, session.session)
            await eventually(lambda: viewer.outcomes, TURN_TIMEOUT_S, "the outcome")
    (ended,) = viewer.outcomes.values()
    assert (ended.outcome, ended.turn_id) == (
        Outcome.OUTCOME_CANCELLED,
        TurnName.parse(sent.turn_name).turn_id,
    )
    assert viewer.shown == text_of(ended.message)


async def test_stream_turn_follows_a_message_that_is_rolled_back(stack: Stack, channel: str) -> None:
    session = a_session(WITNESS, channel)
    key = SessionKey(tenant="demo", agent=WITNESS, channel=channel, session=session.session)
    request = StreamTurnRequest(session=key, idempotency_key="one", message=text_message(f"for ever: {channel}"))
    async with stack.channels() as gateway:
        events = []
        async for event in gateway.StreamTurn(request, timeout=TURN_TIMEOUT_S):
            events.append(event)
            if event.live.HasField("text") and len(events) == 6:
                await say(gateway, session, f"I meant {channel}", policy=ArrivalPolicy.ARRIVAL_POLICY_ROLLBACK)
    given_up = next(event.live for event in events if event.live.HasField("ended"))
    outcome = events[-1].outcome
    assert given_up.ended.outcome == Outcome.OUTCOME_ABSORBED
    assert outcome.outcome == Outcome.OUTCOME_FINAL
    assert outcome.turn_id != given_up.turn_id
    assert events[0].receipt.message_id in outcome.message_ids


def _places(queue: QueueState) -> list[tuple[str, int]]:
    """The messages that wait, with their places."""
    return [(message.message_id.hex(), message.place) for message in queue.messages]


async def test_a_receipt_tells_what_becomes_of_the_message(stack: Stack, channel: str) -> None:
    session = a_session(WITNESS, channel)
    reject = ArrivalPolicy.ARRIVAL_POLICY_REJECT
    viewer = Viewer()
    async with (
        stack.channels() as gateway,
        Watching(viewer, watch_session(gateway, str(session), FROM_THE_FIRST)),
    ):
        taken = await say(gateway, session, f"for ever: {channel}", policy=reject, wait=True)
        assert taken.decision == Decision.DECISION_TAKEN
        queued = await say(gateway, session, "later", wait=True)
        assert (queued.decision, queued.ahead, queued.turn_name) == (Decision.DECISION_QUEUED, 1, "")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await say(gateway, session, "no", policy=reject, wait=True)
        error = from_rpc_error(caught.value)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert error.reason == ErrorReason.ERROR_REASON_TURN_RUNNING
        assert taken.turn_name in error.metadata.values()
        # The first message may have been seen in the queue too, before its turn began.
        await eventually(lambda: [(queued.message_id, 1)] in map(_places, viewer.queues), 10.0, "the queue")
        await say(gateway, session, "stop", policy=ArrivalPolicy.ARRIVAL_POLICY_INTERRUPT)
        await eventually(lambda: len(viewer.outcomes) == 2, TURN_TIMEOUT_S, "the outcomes")
        await eventually(lambda: not viewer.queues[-1].count, 10.0, "nobody waits")


async def test_a_router_serves_the_same_watch(stack: Stack, channel: str) -> None:
    session = a_session(OFFLINE, channel)
    viewer, at_router = Viewer(), Viewer()
    async with stack.channels() as gateway, stack.sessions() as sessions:
        await say(gateway, session, "what is 6*7")
        async with Watching(viewer, watch_session(gateway, str(session), FROM_THE_FIRST)):
            await eventually(lambda: viewer.outcomes, TURN_TIMEOUT_S, "the outcome")
        request = RouterWatchSessionRequest(name=str(session), resume_from=FROM_THE_FIRST)
        call = sessions.WatchSession(request)
        async for response in call:
            at_router.show(response.event)
            if at_router.outcomes:
                break
        call.cancel()
    assert at_router.turns == viewer.turns


async def test_a_position_of_no_turn_and_a_turn_of_no_session_are_refused(stack: Stack, channel: str) -> None:
    session = a_session(ECHO, channel)
    async with stack.channels() as gateway:
        nowhere = WatchPosition(turn_id=b"x" * 16, step=1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.WatchSession(WatchSessionRequest(name=str(session), resume_from=nowhere)).read()
        assert from_rpc_error(caught.value).reason == ErrorReason.ERROR_REASON_WATCH_POSITION_UNKNOWN
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await gateway.WatchTurn(WatchTurnRequest(name=str(TurnName(session, b"x" * 16)))).read()
        assert from_rpc_error(missing.value).reason == ErrorReason.ERROR_REASON_TURN_NOT_FOUND


async def test_another_tenants_session_cannot_be_watched(stack: Stack, channel: str) -> None:
    session = a_session(ECHO, channel)
    async with stack.channels("acme") as gateway, stack.sessions("acme") as sessions:
        for call in (
            gateway.WatchSession(WatchSessionRequest(name=str(session))),
            gateway.WatchTurn(WatchTurnRequest(name=str(TurnName(session, b"x" * 16)))),
            sessions.WatchSession(RouterWatchSessionRequest(name=str(session))),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def _known(gateway: "ChannelServiceAsyncStub", turn: str) -> str:
    """The turn's name once it has ended."""

    async def ended() -> bool:
        with suppress(NotFound):
            return bool([watched async for watched in watch_turn(gateway, turn)])
        return False

    await eventually(ended, TURN_TIMEOUT_S, "the turn")
    return turn


def _shown(watched: list[Watched]) -> Viewer:
    viewer = Viewer()
    for event, _ in watched:
        viewer.show(event)
    return viewer
