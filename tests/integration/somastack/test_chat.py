"""A message that waits: when that is told and how often, and what is said to who leaves."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from rich.console import Console
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Message, Part, SessionKey
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome, TextDelta
from soma.gateway.v1.channel_service_pb2 import Receipt, StreamTurnRequest, StreamTurnResponse

from soma_common.errors import Unavailable
from soma_common.testing.eventually import eventually
from somastack import chat as chats
from somastack.chat import Chat, Progress
from somastack.home import Home

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[StreamTurnRequest, StreamTurnResponse]

MESSAGE_ID = bytes(15) + b"m"
HELD = "agent slow is paused (somastack agents resume slow)"


class Gateway:
    """Serves StreamTurn step by step, as far as a test lets it."""

    def __init__(self) -> None:
        self.stores, self.begins, self.ends = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.losses = 0
        """How many calls end after the receipt."""

    async def stream_turn(self, request: StreamTurnRequest, context: "Context") -> AsyncIterator[StreamTurnResponse]:
        """Serve StreamTurn."""
        await self.stores.wait()
        yield StreamTurnResponse(receipt=Receipt(message_id=MESSAGE_ID))
        if self.losses:
            self.losses -= 1
            return
        await self.begins.wait()
        yield StreamTurnResponse(live=LiveEvent(turn_id=bytes(16), dispatch=1, step=1, text=TextDelta(text="4")))
        await self.ends.wait()
        answer = Message(parts=[Part(text="42")])
        yield StreamTurnResponse(outcome=Delivery(outcome=Outcome.OUTCOME_FINAL, message=answer))


class Talk:
    """A chat on one gateway whose terminal can be read."""

    def __init__(self, address: str, home: Home, *, quiet: bool) -> None:
        self._out, self._told = io.StringIO(), io.StringIO()
        self.asked: list[bytes] = []
        """The messages of which it was asked why they wait."""
        self.holds = [HELD]
        """What is answered to that, one after the other; at last nothing."""
        self.chat = Chat(
            address,
            "token",
            SessionKey(tenant="acme", agent="slow", channel="cli", session="s"),
            home,
            Console(file=self._out, no_color=True, soft_wrap=True),
            Console(file=self._told, no_color=True, soft_wrap=True),
            quiet=quiet,
            what_holds=self._what_holds,
        )

    async def _what_holds(self, message_id: bytes) -> str:
        self.asked.append(message_id)
        held = self.holds.pop(0) if self.holds else ""
        if held == "?":
            raise Unavailable(ErrorReason.ERROR_REASON_STORE_UNAVAILABLE, "not now")
        return held

    @property
    def shown(self) -> str:
        return self._out.getvalue()

    @property
    def told(self) -> str:
        return self._told.getvalue()


@asynccontextmanager
async def talking(gateway: Gateway, home: Path, *, quiet: bool = False) -> AsyncIterator[Talk]:
    """A chat with `gateway` behind a real socket."""
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(
        gateway.stream_turn, StreamTurnRequest.FromString, StreamTurnResponse.SerializeToString
    )
    methods = grpc.method_handlers_generic_handler("soma.gateway.v1.ChannelService", {"StreamTurn": handler})
    server.add_generic_rpc_handlers((methods,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    talk = Talk(f"127.0.0.1:{port}", Home(home), quiet=quiet)
    try:
        async with talk.chat:
            yield talk
    finally:
        await server.stop(None)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "WAITS_AFTER_S", 0.05)
    monkeypatch.setattr(chats, "RETRY_EVERY_S", 0.05)


async def test_what_a_message_waits_for_is_told_once(tmp_path: Path) -> None:
    gateway = Gateway()
    gateway.stores.set()
    gateway.losses = 1
    async with talking(gateway, tmp_path) as talk:
        talk.holds = ["?", "", HELD, "never"]
        said = asyncio.create_task(talk.chat.say("what is 6*7"))
        await eventually(lambda: HELD in talk.shown)
        await asyncio.sleep(0.3)
        gateway.begins.set()
        gateway.ends.set()
        assert await said
    assert talk.shown == f"  waiting: {HELD}\nslow> 42\n"
    assert talk.asked == [MESSAGE_ID] * 3
    assert talk.told == ""


async def test_with_one_message_it_is_told_beside_the_answer(tmp_path: Path) -> None:
    gateway = Gateway()
    gateway.stores.set()
    async with talking(gateway, tmp_path, quiet=True) as talk:
        said = asyncio.create_task(talk.chat.say("what is 6*7"))
        await eventually(lambda: HELD in talk.told)
        gateway.begins.set()
        gateway.ends.set()
        assert await said
    assert (talk.shown, talk.told) == ("42\n", f"waiting: {HELD}\n")


async def test_nothing_is_told_of_a_turn_that_runs_however_long(tmp_path: Path) -> None:
    gateway = Gateway()
    gateway.stores.set()
    gateway.begins.set()
    async with talking(gateway, tmp_path) as talk:
        said = asyncio.create_task(talk.chat.say("what is 6*7"))
        await eventually(lambda: "4" in talk.shown)
        await asyncio.sleep(0.3)
        gateway.ends.set()
        assert await said
    assert talk.shown == "slow> 42\n"


async def test_who_leaves_is_told_how_far_the_message_came(tmp_path: Path) -> None:
    gateway = Gateway()
    async with talking(gateway, tmp_path) as talk:
        said = asyncio.create_task(talk.chat.say("what is 6*7"))
        see = f"somastack sessions watch slow/cli/s --tenant acme --home {tmp_path})"
        for event, progress, words in (
            (None, Progress.SENT, "not known whether the message was taken"),
            (gateway.stores, Progress.STORED, "the message waits and will be answered"),
            (gateway.begins, Progress.ANSWERED, "the turn goes on"),
        ):
            if event is not None:
                event.set()
            await eventually(lambda: talk.chat.progress is progress)  # noqa: B023 - asked in this round only
            assert words in talk.chat.left
            assert talk.chat.left.endswith(see)
        gateway.ends.set()
        assert await said
