"""StreamTurn and the watcher behind it, against a scripted owner of the partition."""

import asyncio

import grpc
import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import LiveEvent, TextDelta, ToolCall, TurnState
from soma.gateway.v1.channel_service_pb2 import StreamTurnRequest, StreamTurnResponse
from soma.router.v1.outbound_pb2 import WatchSnapshot

from soma_common import errors, ids
from soma_common.errors import ResourceExhausted
from soma_common.live import MAX_BUFFERED, LiveWatcher
from soma_common.testing.eventually import eventually
from tests.integration.gateway.harness import AGENT, CHANNEL, PARTITIONS, TENANT, World, delivery, message

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


def ended() -> LiveEvent:
    outcome = delivery(1)
    outcome.turn_id = TURN
    outcome.message_ids.append(MESSAGE)
    return event(ended=outcome)


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
    await world.router.tell("s", ended())
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
            await world.router.tell("s", text(6, " and on"), ended())
    assert said(events) == "so far and on"
    assert len({item.message_id for _, item in await world.router.stored()}) == 1


async def test_a_watch_waits_for_an_owner_and_fills_gaps_from_snapshots(world: World) -> None:
    world.router.snapshot = None  # nobody owns the partition
    events: list[LiveEvent] = []
    async with LiveWatcher(world.router.nc, SESSION, partitions=PARTITIONS, message_id=MESSAGE) as watch:

        async def read() -> None:
            async for received in watch:
                events.append(received)  # noqa: PERF401 - looked at while it grows

        reading = asyncio.create_task(read())
        await eventually(lambda: len(world.router.queries) >= 2)
        world.router.snapshot = WatchSnapshot(known=True, events=[begun(), text(0, "abc")])
        await eventually(lambda: len(events) == 2)
        world.router.snapshot = WatchSnapshot(known=True, events=[begun(), text(0, "abcdefghi")])
        await world.router.tell("s", text(6, "ghi"))
        await eventually(lambda: "".join(e.text.text for e in events) == "abcdefghi")
        world.router.snapshot = WatchSnapshot(
            known=True, events=[begun(2, 2), event(1, 2, tool_call=ToolCall(tool="t")), text(0, "x", 2, 2)]
        )
        await world.router.tell("s", text(1, "y", 2, 2))
        await eventually(lambda: any(e.HasField("restarted") for e in events))
        await eventually(lambda: events[-1].text.text == "y")
        await world.router.tell("s", ended())
        await reading
    kinds = [e.WhichOneof("event") for e in events]
    assert kinds[-6:] == ["restarted", "tool_call", "state", "text", "text", "ended"]


async def test_interest_is_renewed(world: World) -> None:
    async with LiveWatcher(world.router.nc, SESSION, partitions=PARTITIONS, turn_id=TURN):
        await eventually(lambda: len(world.router.queries) >= 2, timeout_s=4)
        assert world.router.queries[0].turn_id == TURN


async def test_a_slow_watcher_is_told_to_resume(world: World) -> None:
    world.router.snapshot = WatchSnapshot(known=True, events=[begun()])
    async with LiveWatcher(world.router.nc, SESSION, partitions=PARTITIONS, turn_id=TURN) as watch:
        for number in range(0, MAX_BUFFERED + 200, 100):
            await world.router.tell("s", *(text(at, "x") for at in range(number, number + 100)))
        await asyncio.sleep(0.3)
        with pytest.raises(ResourceExhausted):
            async for _ in watch:
                pass
