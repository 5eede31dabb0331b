"""Places: how many calls of a tenant's adapters there may be, and when one is free again."""

import asyncio
import time
from typing import Any, cast

import pytest
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.gateway.v1.channel_service_pb2 import Hello
from soma.router.v1.outbound_pb2 import AckBatch, Presence

from services.gateway.application import adapter_stream
from services.gateway.application.adapter_stream import StreamBounds
from services.gateway.application.serve_streams import ServeStreams
from services.gateway.domain.refusal import Refused
from services.gateway.domain.stream_number import StreamNumbers
from soma_common.clock import monotonic
from soma_common.testing.eventually import eventually

NEVER_S = 3600.0
PATIENCE_S = 10.0


class AnyTenant:
    """Port `Directory`: everything exists."""

    def check_tenant(self, tenant: str) -> None: ...

    def check_agent(self, tenant: str, agent: str) -> None: ...


class Routers:
    """Port `Routers`: keeps what they are told."""

    def __init__(self) -> None:
        self.losses = 0
        self.told: list[Presence] = []

    async def send_acks(self, tenant: str, router: str, batch: AckBatch) -> None: ...

    async def announce(self, tenant: str, presence: Presence) -> None:
        self.told.append(presence)


class Call:
    """A call whose peer takes nothing, as `Connect` runs it."""

    def __init__(self, streams: ServeStreams, instance: str, tenant: str = "demo") -> None:
        self._streams = streams
        self.stream = streams.open(Hello(tenant=tenant, channel="line", instance=instance, protocol=1, credit=1))
        self._gone = asyncio.Event()
        self.task = asyncio.create_task(self._serve())

    async def leave(self) -> None:
        """The peer is gone."""
        self._gone.set()
        await asyncio.wait({self.task}, timeout=PATIENCE_S)

    async def over(self) -> ErrorReason.ValueType:
        """What it was ended with."""
        done, _ = await asyncio.wait({self.task}, timeout=PATIENCE_S)
        assert done
        error = self.task.exception()
        assert isinstance(error, Refused)
        return error.error.reason

    async def _serve(self) -> None:
        try:
            async with self.stream.writing():
                await self._gone.wait()
        finally:
            self._streams.leave(self.stream)


def some_streams(tenant_streams: int, routers: Routers | None = None) -> ServeStreams:
    return ServeStreams(
        "gateway-0",
        directory=AnyTenant(),
        accept=cast(Any, None),
        acks=cast(Any, None),
        routers=routers or Routers(),
        numbers=StreamNumbers(lambda: time.time_ns() // 1000, lambda bits: 0),
        bounds=StreamBounds(tenant_streams=tenant_streams),
        clock=monotonic,
    )


@pytest.fixture(autouse=True)
def all_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is cut ends: no test waits for a time."""
    monkeypatch.setattr(adapter_stream, "LAST_FRAMES_S", NEVER_S)


async def a_call(streams: ServeStreams, instance: str, tenant: str = "demo") -> Call:
    call = Call(streams, instance, tenant)
    await asyncio.sleep(0)
    return call


async def refused(streams: ServeStreams, instance: str) -> bool:
    """Whether there is no place for the instance; takes one if there is."""
    try:
        await a_call(streams, instance)
    except Refused as error:
        if error.error.reason != ErrorReason.ERROR_REASON_QUEUE_FULL:
            raise
        return True
    return False


async def test_a_replaced_stream_holds_its_place_until_its_call_has_left() -> None:
    streams = some_streams(1)
    first = await a_call(streams, "a")
    second = await a_call(streams, "a")
    await second.leave()
    assert await refused(streams, "b"), "the call of the first is still there"
    await first.leave()
    assert not await refused(streams, "b")
    assert await refused(streams, "c")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_place_is_freed_once(order: tuple[int, int]) -> None:
    streams = some_streams(2)
    calls = [await a_call(streams, "a"), await a_call(streams, "a")]
    for number in order:
        await calls[number].leave()
        streams.leave(calls[number].stream)
    assert not await refused(streams, "a")
    assert not await refused(streams, "b")
    assert await refused(streams, "c")


async def test_an_instance_is_not_refused_because_of_its_own_streams() -> None:
    streams = some_streams(1)
    await a_call(streams, "a")
    second = await a_call(streams, "a")  # the first has no room for its end
    await second.leave()
    assert not await refused(streams, "a"), "only its replaced stream is there"


async def test_an_instance_is_not_refused_because_of_anothers_replaced_stream() -> None:
    streams = some_streams(2)
    await a_call(streams, "a")
    lost = await a_call(streams, "b")
    await a_call(streams, "a")
    await lost.leave()
    assert not await refused(streams, "b")


async def test_an_instance_has_two_calls_at_most() -> None:
    streams = some_streams(1)
    calls = [await a_call(streams, "a") for _ in range(20)]
    *cut, leaving, newest = calls
    for call in cut:
        assert await call.over() == ErrorReason.ERROR_REASON_ALREADY_EXISTS
    assert not leaving.task.done()
    assert not newest.task.done()
    assert len(streams) == 1
    await newest.leave()
    last = await a_call(streams, "a")
    assert not leaving.task.done(), "it is the only one before the last"
    await a_call(streams, "a")
    assert await leaving.over() == ErrorReason.ERROR_REASON_ALREADY_EXISTS
    assert not last.task.done()


async def test_calls_that_open_in_one_round_of_the_loop_are_cut_as_well() -> None:
    streams = some_streams(1)

    async def serve() -> None:
        await Call(streams, "a").task

    tasks = [asyncio.create_task(serve()) for _ in range(200)]
    await eventually(lambda: sum(task.done() for task in tasks) >= 198, PATIENCE_S)
    assert all(isinstance(task.exception(), Refused) for task in tasks[:-2])
    assert [task.done() for task in tasks[-2:]] == [False, False]


async def test_tenants_have_places_of_their_own() -> None:
    streams = some_streams(1)
    await a_call(streams, "a", "demo")
    await a_call(streams, "a", "other")
    assert await refused(streams, "b")


async def test_a_replaced_stream_is_not_told_to_the_routers() -> None:
    routers = Routers()
    streams = some_streams(1, routers)
    await a_call(streams, "a")
    second = await a_call(streams, "a")
    running = asyncio.create_task(streams.run())
    await eventually(lambda: routers.told, PATIENCE_S)
    running.cancel()
    assert [stream.stream for stream in routers.told[0].streams] == [second.stream.number]
