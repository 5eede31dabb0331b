"""Requests over the real NATS: each gets its own answer, one without an answer ends, whatever happens in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from soma_common.nats.connection import connect_nats
from soma_common.nats.requests import Requests
from soma_common.testing.embedded import FaultyNats
from soma_common.testing.eventually import eventually


@pytest.fixture
async def bus(nats_server: FaultyNats) -> AsyncIterator[Client]:
    client = await connect_nats(nats_server.url, nats_server.token_file, "requests")
    yield client
    await client.close()


async def test_each_request_gets_its_own_answer(bus: Client) -> None:
    held: list[Msg] = []

    async def hold(message: Msg) -> None:
        held.append(message)
        if len(held) == 50:
            for one in reversed(held):
                await one.respond(one.data + (one.headers or {})["n"].encode())

    await bus.subscribe("soma.test", cb=hold)
    requests = Requests(bus)
    answers = await asyncio.gather(*(requests.request("soma.test", b"%d/" % n, 5.0, {"n": str(n)}) for n in range(50)))
    assert [answer.data for answer in answers] == [b"%d/%d" % (n, n) for n in range(50)]


async def test_a_subject_that_nobody_reads_is_told(bus: Client) -> None:
    with pytest.raises(nats.errors.NoRespondersError):
        await Requests(bus).request("soma.nobody", b"", 5.0, {})


async def test_silence_ends_and_a_late_answer_is_nobodys(bus: Client) -> None:
    asked = await bus.subscribe("soma.silent")
    requests = Requests(bus)
    with pytest.raises(TimeoutError):
        await requests.request("soma.silent", b"first", 0.05, {})
    second = asyncio.create_task(requests.request("soma.silent", b"second", 5.0, {}))
    first_message, second_message = await asked.next_msg(timeout=2), await asked.next_msg(timeout=2)
    await first_message.respond(b"late")
    await second_message.respond(b"mine")
    assert (await second).data == b"mine"


async def test_requests_work_again_after_a_lost_connection(bus: Client, nats_server: FaultyNats) -> None:
    async def answer(message: Msg) -> None:
        await message.respond(b"yes")

    await bus.subscribe("soma.test", cb=answer)
    requests = Requests(bus)
    assert (await requests.request("soma.test", b"", 5.0, {})).data == b"yes"
    await nats_server.kill9()
    await eventually(lambda: not bus.is_connected, what="the loss is noticed")
    await nats_server.restart()
    await eventually(lambda: bus.is_connected, what="the connection is back")
    assert (await requests.request("soma.test", b"", 5.0, {})).data == b"yes"
