"""What a lawful client would send, damaged in seeded ways: the server ends what it must and serves everybody else.

Each case is made of its own seed, which a failure names: `SEED` and the number of the case give the same bytes again.
"""

import asyncio
import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hpack import Encoder
from hyperframe.frame import DataFrame, Frame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame
from soma.cognition.v1.cognition_service_pb2 import RunTurnsRequest, StartTurn
from soma.toolgw.v1.tool_service_pb2 import ListToolsRequest

from soma_common.telemetry.metrics import REGISTRY
from soma_common.testing.eventually import eventually
from tests.integration.soma_common.conftest import Stack
from tests.integration.soma_common.h2_peer import CHECK, PREFACE, check, message, request, stranger

SEED = 20_260_913
BATCHES, CASES = 16, 40
"""How often the server is looked at, and how many damaged clients come before each look."""

LIST = "/soma.toolgw.v1.ToolService/ListTools"
RUN = "/soma.cognition.v1.CognitionService/RunTurns"


def recorded(token: str) -> list[bytes]:
    """The frames of a lawful client, the preface first: unary calls, a stream, a reset, pings and windows."""
    encoder = Encoder()
    bearer = ("authorization", f"Bearer {token}")

    def headers(number: int, path: str) -> Frame:
        block = encoder.encode(request(path, bearer, ("grpc-timeout", "2S"), ("x-trace-bin", "AAEC")))
        return HeadersFrame(number, block, flags=["END_HEADERS"])

    listing = message(ListToolsRequest(parent="tenants/demo").SerializeToString())
    turns = [message(RunTurnsRequest(starts=[StartTurn()] * count).SerializeToString()) for count in range(4)]
    frames: list[Frame] = [
        SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 1 << 16, SettingsFrame.MAX_FRAME_SIZE: 1 << 14}),
        headers(1, CHECK),
        DataFrame(1, message(b""), flags=["END_STREAM"]),
        headers(3, RUN),
        DataFrame(3, turns[1]),
        WindowUpdateFrame(0, 1000),
        headers(5, LIST),
        DataFrame(5, listing[:7]),
        DataFrame(3, turns[2] + turns[3]),
        DataFrame(5, listing[7:], flags=["END_STREAM"]),
        PingFrame(0, b"recorded"),
        headers(7, RUN),
        DataFrame(7, turns[1]),
        RstStreamFrame(7, 8),
        WindowUpdateFrame(3, 77),
        DataFrame(3, b"", flags=["END_STREAM"]),
        headers(9, LIST),
        DataFrame(9, listing, flags=["END_STREAM"]),
    ]
    return [PREFACE, *(frame.serialize() for frame in frames)]


Damage = Callable[[random.Random, list[bytes]], bytes]


def changed_bytes(chance: random.Random, frames: list[bytes]) -> bytes:
    data = bytearray(b"".join(frames))
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[chance.randrange(len(PREFACE), len(data))] = chance.randrange(256)
    return bytes(data)


def changed_bits_of_frame_heads(chance: random.Random, frames: list[bytes]) -> bytes:
    """Lengths, types, flags and stream numbers decide most; a byte hit by chance is rarely one of theirs."""
    changed = [bytearray(frame) for frame in frames]
    for frame in chance.sample(changed[1:], chance.choice((1, 1, 2, 3))):
        frame[chance.randrange(9)] ^= 1 << chance.randrange(8)
    return b"".join(changed)


def cut(chance: random.Random, frames: list[bytes]) -> bytes:
    data = b"".join(frames)
    return data[: chance.randrange(len(data))]


def lost_bytes(chance: random.Random, frames: list[bytes]) -> bytes:
    data = b"".join(frames)
    start = chance.randrange(len(PREFACE), len(data))
    return data[:start] + data[start + chance.choice((1, 4, 9, 100)) :]


def repeated_bytes(chance: random.Random, frames: list[bytes]) -> bytes:
    data = b"".join(frames)
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice((1, 9, 50, 500)))
    return data[:end] + data[start:end] * chance.choice((1, 2, 20)) + data[end:]


def foreign_bytes(chance: random.Random, frames: list[bytes]) -> bytes:
    data = b"".join(frames)
    at = chance.randrange(len(PREFACE), len(data))
    return data[:at] + chance.randbytes(chance.choice((1, 9, 64, 2000))) + data[at:]


def shuffled_frames(chance: random.Random, frames: list[bytes]) -> bytes:
    rest = frames[1:]
    chance.shuffle(rest)
    return b"".join([frames[0], *rest])


def lost_and_repeated_frames(chance: random.Random, frames: list[bytes]) -> bytes:
    return b"".join([frames[0], *(frame * chance.choice((0, 1, 1, 1, 2)) for frame in frames[1:])])


DAMAGES: Sequence[Damage] = (
    changed_bytes,
    changed_bits_of_frame_heads,
    cut,
    lost_bytes,
    repeated_bytes,
    foreign_bytes,
    shuffled_frames,
    lost_and_repeated_frames,
)


def running() -> float:
    """How many calls the server counts as being served."""
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "soma_rpc_server_running"
    )


async def damaged_client(port: int, data: bytes, chance: random.Random) -> None:
    """Send `data`, whole or in parts, and go away: at once, or when the server has said what it has to say."""
    async with stranger(port) as connection:
        size = chance.choice((len(data) or 1, 1000, 100, 17))
        for at in range(0, len(data), size):
            if not await connection.try_send(data[at : at + size]):
                break
        if chance.random() < 0.7:
            await connection.what_comes(patience_s=0.05)


@pytest.fixture
async def complaints() -> list[dict[str, Any]]:
    """What the event loop's exception handler was called with."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: found.append(context))
    return found


@pytest.fixture(autouse=True)
async def settled() -> None:
    """Nothing that other tests have left is counted."""
    await eventually(lambda: running() == 0, what="no call is being served")


async def test_the_recorded_client_is_lawful(stack: Stack) -> None:
    """Without this the damaged ones would show nothing: most of what is tried lies behind lawful frames."""
    data = b"".join(recorded(stack.identities.token("tester", "*", ["admin", "service"])))
    async with stranger(stack.server.port) as connection:
        connection.read()
        await connection.send(data)
        for number in (1, 3, 5, 9):
            assert (await connection.end_of(number)).status == 0
        assert not connection.goaways
    assert len(stack.tools.requests) == 2


async def test_a_client_whose_bytes_are_damaged_harms_nobody(stack: Stack, complaints: list[dict[str, Any]]) -> None:
    frames = recorded(stack.identities.token("tester", "*", ["admin", "service"]))
    print(f"seed {SEED}")
    for batch in range(BATCHES):
        clients = []
        for case in range(batch * CASES, (batch + 1) * CASES):
            chance = random.Random(f"{SEED}/{case}")
            damage = DAMAGES[case % len(DAMAGES)]
            clients.append(damaged_client(stack.server.port, damage(chance, frames), chance))
        await asyncio.gather(*clients)
        told = f"seed {SEED}, cases {batch * CASES} to {(batch + 1) * CASES - 1}"
        try:
            await check(stack.server.port)
        except Exception as error:
            raise AssertionError(f"a lawful client is no longer served: {told}") from error
        await eventually(lambda: running() == 0, what=f"no handler is left over: {told}")
        # An exception that nobody has asked for is told when its task is collected.
        gc.collect()
        await asyncio.sleep(0)
        assert not complaints, told
    # Or none of it has come so far as to be a call. How many do depends on what is run before their end is read.
    assert len(stack.tools.requests) > CASES / 4
    assert stack.brain.frames > CASES
