"""The client kit against a real gateway: conversation, loss, resume, drain, refusal, many messages."""

import asyncio
import socket
import time
from functools import partial

import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, TextDelta
from soma.gateway.v1.channel_service_pb2 import InboundMessage

from soma_common import errors, ids
from soma_common.client.channel_client import ChannelClient, ClientClosed, text_message
from soma_common.testing.eventually import eventually
from tests.integration.client.wire import Wire
from tests.integration.gateway.harness import AGENT, CHANNEL, TENANT, World, delivery
from tests.stalls import Stalls


def client(world: World, target: str, instance: str = "a", **options: object) -> ChannelClient:
    token = world.identities.token("adapter", TENANT, ["channel"])
    settings = {"token": token, "tenant": TENANT, "channel": CHANNEL, "instance": instance, **options}
    return ChannelClient(target, **settings)  # type: ignore[arg-type]


async def take(c: ChannelClient, count: int) -> list[Delivery]:
    """The next deliveries, acknowledged."""
    taken: list[Delivery] = []
    async with asyncio.timeout(10):
        async for event in c.events():
            if isinstance(event, Delivery):
                await c.ack(event)
                taken.append(event)
                if len(taken) == count:
                    break
    return taken


async def test_send_receive_acknowledge(world: World) -> None:
    await world.router.echo()
    target = await world.gateway()
    async with client(world, target) as c:
        await world.router.stream("a")
        receipt = await c.send(AGENT, "s", "hello", idempotency_key="k")
        assert receipt.message_id == ids.message_id(TENANT, AGENT, CHANNEL, "s", "k")
        [answer] = await take(c, 1)
        assert answer.message.parts[0].text == "hello"
        await eventually(lambda: world.router.acks == [answer.delivery_id])
        cancelled = await c.cancel(AGENT, "s")
        assert len(cancelled.message_id) == 16


async def test_a_cancel_from_outside_wins_and_leaves_no_stream_behind(world: World) -> None:
    """While it connects to nobody, and while it waits for answers to close."""
    nowhere = client(world, "127.0.0.1:1")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await nowhere.__aenter__()
    c = await client(world, await world.gateway()).__aenter__()
    world.nats_server.sigstop()
    try:
        sending = asyncio.create_task(c.send(AGENT, "s", "hello"))
        await eventually(lambda: c.unanswered)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await c.close()
    finally:
        world.nats_server.sigcont()
    with pytest.raises(ClientClosed):
        await sending
    assert not any(task.get_name().startswith("channel-") for task in asyncio.all_tasks())


async def test_a_refusal_is_a_typed_error_and_the_stream_goes_on(world: World) -> None:
    async with client(world, await world.gateway()) as c:
        with pytest.raises(errors.NotFound) as caught:
            await c.send("nobody", "s", "hello")
        assert caught.value.reason == ErrorReason.ERROR_REASON_AGENT_NOT_FOUND
        await c.send(AGENT, "s", "hello")
        assert c.streams == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tenant": "other"}, errors.PermissionDenied),
        ({"token": "not a token"}, errors.Unauthenticated),
        ({"channel": "Not A Slug"}, errors.InvalidRequest),
    ],
)
async def test_a_stream_refused_for_good_says_why(
    world: World, options: dict[str, str], error: type[errors.SomaError]
) -> None:
    with pytest.raises(error):
        async with client(world, await world.gateway(), **options):
            pass


async def test_live_events_come_before_the_delivery(world: World) -> None:
    async with client(world, await world.gateway()) as c:
        gateway, stream = await world.router.stream("a")
        assert stream.live
        event = LiveEvent(agent=AGENT, session="s", dispatch=1, step=1, text=TextDelta(text="an"))
        await world.router.hand_live(gateway, stream.stream, event)
        await world.router.hand_over(gateway, stream.stream, delivery(1))
        events = c.events()
        assert await anext(events) == event
        assert isinstance(await anext(events), Delivery)


async def test_what_a_replaced_dispatch_says_is_not_shown_over_another_stream_either(world: World) -> None:
    """The second gateway does not know what the first has shown."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    await world.gateway(listen=listen, drain_timeout_s=0.05)
    shown: list[int] = []

    def said_by(dispatch: int) -> LiveEvent:
        text = TextDelta(text="an")
        return LiveEvent(agent=AGENT, session="s", turn_id=b"t" * 16, dispatch=dispatch, step=1, text=text)

    async with client(world, listen, on_live=lambda event: shown.append(event.dispatch)) as c:
        gateway, first = await world.router.stream("a")
        await world.router.hand_live(gateway, first.stream, said_by(2))
        await eventually(lambda: shown == [2])
        await world.lifecycles[-1].stop()
        await world.gateway(listen=listen, drain_timeout_s=0.05)
        await eventually(lambda: c.streams == 2)

        async def second() -> bool:
            nonlocal gateway, first
            gateway, stream = await world.router.stream("a")
            is_new = stream.stream != first.stream
            first = stream
            return is_new

        await eventually(second)
        await world.router.hand_live(gateway, first.stream, said_by(1), said_by(2), said_by(3))
        await eventually(lambda: shown == [2, 2, 3])


async def test_resume_loses_and_repeats_nothing(world: World) -> None:
    """Five restarts of the gateway while 40 sessions talk: each message is answered once, in order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    await world.gateway(listen=listen, drain_timeout_s=0.05)
    shown: dict[str, list[str]] = {}
    router = world.router

    def show(answer: Delivery) -> None:
        shown.setdefault(answer.session, []).append(answer.message.parts[0].text)

    async def redeliver() -> None:
        """What the router of the scripted peer leaves out: what is not acknowledged comes again."""
        while True:
            await asyncio.sleep(0.05)
            acked = set(router.acks)
            streams = [(s.stream, g) for (_, g), p in router.presence.items() for s in p.streams]
            open_ones = {d.session: d for d in reversed(router.answers) if d.delivery_id not in acked}
            if streams and open_ones:
                stream, gateway = max(streams)
                await router.hand_over(gateway, stream, *open_ones.values())

    await router.echo(deliver=False)
    redelivering = asyncio.create_task(redeliver())
    sessions = [f"s{n}" for n in range(40)]
    async with client(world, listen, on_delivery=show) as c:

        async def talk(session: str) -> None:
            for number in range(10):
                await c.send(AGENT, session, str(number))
                await asyncio.sleep(0.02)

        talking = asyncio.gather(*(talk(session) for session in sessions))
        for _ in range(5):
            await asyncio.sleep(0.15)
            await world.lifecycles[-1].stop()
            await world.gateway(listen=listen, drain_timeout_s=0.05)
        await talking
        await eventually(lambda: sum(map(len, shown.values())) >= 400, timeout_s=20)
        await asyncio.sleep(0.3)
        assert c.streams >= 5
    redelivering.cancel()
    assert shown == {session: [str(number) for number in range(10)] for session in sessions}


async def test_unanswered_messages_are_sent_again_in_order_with_their_keys(world: World) -> None:
    answers: list[tuple[bytes, Error | None]] = []
    target = await world.gateway(publish_attempt_s=0.2)
    async with Wire(target) as wire, client(world, wire.address) as c:
        world.nats_server.sigstop()
        for number in range(50):
            item = InboundMessage(
                agent=AGENT, session="s", idempotency_key=f"k{number}", message=text_message(str(number))
            )
            c.post(item, lambda message_id, error: answers.append((message_id, error)))
        await asyncio.sleep(0.1)
        wire.cut()  # the stream is lost while its messages are open
        await asyncio.sleep(0.3)
        world.nats_server.sigcont()
        await eventually(lambda: len(answers) == 50)
        assert c.streams == 2
    assert all(error is None for _, error in answers)
    expected = [ids.message_id(TENANT, AGENT, CHANNEL, "s", f"k{number}") for number in range(50)]
    assert [message_id for message_id, _ in answers] == expected
    stored = [item.message_id for _, item in await world.router.stored()]
    assert list(dict.fromkeys(stored)) == expected


async def test_a_drained_gateway_is_left_for_another(world: World) -> None:
    first = await world.gateway("gateway-0", drain_timeout_s=2.0)
    second = await world.gateway("gateway-1")
    async with client(world, f"{first},{second}") as c:
        before = c.welcome.gateway if c.welcome else ""
        drained = 0 if before.startswith("gateway-0") else 1
        stopping = asyncio.create_task(world.lifecycles[drained].stop())
        for number in range(30):
            await c.send(AGENT, "s", "x", idempotency_key=str(number))
            await asyncio.sleep(0.01)
        await stopping

        def moved() -> bool:
            welcome = c.welcome
            return welcome is not None and welcome.gateway != before

        await eventually(moved)
        await c.send(AGENT, "s", "x", idempotency_key="last")
    stored = [item.message_id for _, item in await world.router.stored()]
    keys = [*map(str, range(30)), "last"]
    assert list(dict.fromkeys(stored)) == [ids.message_id(TENANT, AGENT, CHANNEL, "s", key) for key in keys]


async def test_a_drained_gateway_is_left_when_another_is_there(world: World) -> None:
    """The other one is still starting, as in a rolling restart: until it is there, answers go on over this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        later = f"127.0.0.1:{probe.getsockname()[1]}"
    drained = await world.gateway("gateway-0", drain_timeout_s=20.0)
    async with client(world, f"{drained},{later}") as c:
        gateway, stream = await world.router.stream("a")
        before = c.welcome.gateway if c.welcome else ""
        stopping = asyncio.create_task(world.lifecycles[0].stop())
        await eventually(lambda: c.holds)
        sending = asyncio.create_task(c.send(AGENT, "s", "x", idempotency_key="k"))
        answer = delivery(1)
        await world.router.hand_over(gateway, stream.stream, answer)
        await take(c, 1)
        await eventually(lambda: world.router.acks == [answer.delivery_id])
        assert c.streams == 1
        assert not stopping.done()
        await world.gateway("gateway-1", listen=later)
        assert (await sending).message_id == ids.message_id(TENANT, AGENT, CHANNEL, "s", "k")
        assert c.welcome is not None
        assert c.welcome.gateway != before
        assert c.streams == 2, "it went straight to the other one"
        await stopping


async def test_a_gateway_that_is_the_only_one_is_left_in_half_its_grace(world: World) -> None:
    async with Stalls() as stalls, client(world, await world.gateway(drain_timeout_s=2.0)):
        began = time.monotonic()
        await world.lifecycles[0].stop()
        assert time.monotonic() - began < 1.95 + stalls.since(began)


async def test_a_replaced_client_stops_and_says_so(world: World) -> None:
    target = await world.gateway()
    async with client(world, target) as first, client(world, target):
        with pytest.raises(errors.AlreadyExists):
            async for _ in first.events():
                pass
        with pytest.raises(errors.AlreadyExists):
            await first.send(AGENT, "s", "x")


async def test_nack_brings_the_delivery_again(world: World) -> None:
    async with client(world, await world.gateway()) as c:
        gateway, stream = await world.router.stream("a")
        await world.router.hand_over(gateway, stream.stream, delivery(1))
        events = c.events()
        first = await anext(events)
        assert isinstance(first, Delivery)
        await c.nack(first, delay_s=0.2, cause="no")
        await eventually(lambda: world.router.returns)
        assert world.router.returns[0].counts
        await world.router.hand_over(gateway, stream.stream, delivery(1))
        again = await anext(events)
        assert isinstance(again, Delivery)
        await c.ack(again)
        await eventually(lambda: world.router.acks)
        await world.router.hand_over(gateway, stream.stream, delivery(1))
        await eventually(lambda: len(world.router.acks) == 2)


async def test_a_failing_callback_gives_the_delivery_back(world: World) -> None:
    def fail(_: Delivery) -> None:
        raise ValueError("no")

    async with client(world, await world.gateway(), on_delivery=fail):
        gateway, stream = await world.router.stream("a")
        await world.router.hand_over(gateway, stream.stream, delivery(1))
        await eventually(lambda: world.router.returns)
        assert "no" in world.router.returns[0].cause


async def test_it_waits_for_a_gateway_that_is_not_there_yet(world: World) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    c = client(world, listen)
    entering = asyncio.create_task(c.__aenter__())
    await asyncio.sleep(0.3)
    await world.gateway(listen=listen)
    await entering
    await c.send(AGENT, "s", "x")
    await c.close()
    with pytest.raises(ClientClosed):
        await c.send(AGENT, "s", "x")


async def test_credit_comes_back_with_acks_for_ever(world: World) -> None:
    """Far more deliveries than credit pass, so credit neither leaks nor grows."""
    seen: list[int] = []

    def caught_up(number: int) -> bool:
        return len(seen) == number

    async with client(world, await world.gateway(), credit=16, on_delivery=lambda d: seen.append(d.position)):
        gateway, stream = await world.router.stream("a")
        for number in range(1, 501):
            await world.router.hand_over(gateway, stream.stream, delivery(number))
            if number % 10 == 0:
                await eventually(partial(caught_up, number), interval_s=0.001)
        await eventually(lambda: len(world.router.acks) == 500)
        _, stream = await world.router.stream("a")
        assert stream.window == 16
    assert seen == list(range(1, 501))


async def test_thousands_of_messages_pass_one_stream(world: World) -> None:
    answered: list[bytes] = []
    async with client(world, await world.gateway(), outbox=20_000) as c:
        started = time.perf_counter()
        for number in range(5000):
            item = InboundMessage(
                agent=AGENT, session=f"s{number % 64}", idempotency_key=str(number), message=text_message("x" * 200)
            )
            c.post(item, lambda message_id, error: answered.append(message_id))
        await eventually(lambda: len(answered) == 5000, timeout_s=20)
        print(f"{5000 / (time.perf_counter() - started):.0f} messages/s")
    assert all(answered)
