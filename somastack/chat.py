"""Talking with an agent from a terminal: each message is one `StreamTurn` call, shown while it runs.

Not `Connect`: who connects serves a whole channel and gets the answers of all its sessions, so two terminals on one
channel would take each other's answers. A call that loses its gateway is made again with the same idempotency key, and
goes on with the same turn.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Self

import grpc
from rich.console import Console
from rich.text import Text
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import ArrivalPolicy
from soma.gateway.v1.channel_service_pb2 import StreamTurnRequest
from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceStub

from soma_common.client.channel_client import text_message
from soma_common.errors import ResourceExhausted, SomaError, Unavailable, from_rpc_error
from soma_common.grpc.channel import open_channel
from somastack.auth_material import AuthMaterial
from somastack.home import Home
from somastack.refusals import in_chat
from somastack.resource_names import tenant_option
from somastack.turn_view import TurnView

if TYPE_CHECKING:
    from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceAsyncStub

PATIENCE_S = 30.0
"""How long a message is tried again while the stack is not able to take it or show it."""
RETRY_EVERY_S = 0.5
WAITS_AFTER_S = 1.0
"""A message of which no turn is seen for so long waits for something, and that is told."""


class Progress(Enum):
    """How far a message has come. The value is what is said to who no longer looks."""

    SENT = "it is not known whether the message was taken, see"
    STORED = "the message waits and will be answered, see"
    ANSWERED = "the turn goes on, see"
    """A turn runs that answers it."""


def token_for(home: Home, tenant: str) -> str:
    """The token of the tenant's channels; for a tenant that has none here, the administrator's."""
    auth = AuthMaterial(home)
    own = auth.tenant_token_file(tenant)
    return (own if own.exists() else auth.admin_token_file).read_text(encoding="utf-8").strip()


@dataclass
class Chat:
    """One session on a terminal. An async context manager."""

    target: str
    """Address of the gateway; several are separated by commas."""
    token: str
    session: SessionKey
    home: Home
    """Where the stack is, for the commands that are named."""
    console: Console
    errors: Console
    quiet: bool = False
    """Show nothing but answers."""
    policy: ArrivalPolicy.ValueType = ArrivalPolicy.ARRIVAL_POLICY_UNSPECIFIED
    """What a message does while a turn of the session runs; not set: what the agent says."""
    what_holds: Callable[[bytes], Awaitable[str]] | None = None
    """Asked by a message's id why it waits; empty: it does not. May raise SomaError."""
    progress: Progress = Progress.SENT
    """Of the last message."""

    async def __aenter__(self) -> Self:
        self._channel = open_channel(self.target, token=lambda: self.token, service="gateway")
        self._stub: ChannelServiceAsyncStub = ChannelServiceStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def say(self, text: str) -> bool:
        """Send one message and show its turn; True when the agent answered.

        Raises:
            SomaError: the message was refused, or what became of it could not be learned.
        """
        request = StreamTurnRequest(
            session=self.session,
            idempotency_key=uuid.uuid4().hex,
            message=text_message(text),
            policy=self.policy,
        )
        speaker = "" if self.quiet else self.session.agent
        view = TurnView(self.console, speaker, quiet=self.quiet, errors=self.errors)
        deadline = time.monotonic() + PATIENCE_S
        self.progress = Progress.SENT
        waiting: list[asyncio.Task[None]] = []
        try:
            while True:
                try:
                    answered = await self._watch(request, view, waiting)
                    if answered is not None:
                        return answered
                except (Unavailable, ResourceExhausted):
                    if time.monotonic() > deadline:
                        raise
                await asyncio.sleep(RETRY_EVERY_S)
        finally:
            for task in waiting:
                task.cancel()

    @property
    def left(self) -> str:
        """What to say to a person who no longer waits for the answer."""
        name = f"{self.session.agent}/{self.session.channel}/{self.session.session}"
        watch = self.home.command("sessions", "watch", name, *tenant_option(self.session.tenant))
        return f"(no longer shown; {self.progress.value}: {watch})"

    async def _watch(
        self, request: StreamTurnRequest, view: TurnView, waiting: "list[asyncio.Task[None]]"
    ) -> bool | None:
        """One call, to its end; None when it ended without the turn's outcome. `waiting` holds the one task that tells
        why the message waits, if it was begun.
        """
        call = self._stub.StreamTurn(request)
        try:
            async for event in call:
                match event.WhichOneof("event"):
                    case "receipt":
                        if self.progress is Progress.SENT:
                            self.progress = Progress.STORED
                            waiting.append(asyncio.create_task(self._tell_wait(event.receipt.message_id, view)))
                    case "live":
                        self.progress = Progress.ANSWERED
                        view.show(event.live)
                    case "outcome":
                        return view.finish(event.outcome)
        except grpc.aio.AioRpcError as error:
            raise in_chat(from_rpc_error(error), self.home, self.session) from error
        finally:
            call.cancel()
        return None

    async def _tell_wait(self, message_id: bytes, view: TurnView) -> None:
        """Say once what a message waits for of which no turn is seen."""
        while self.what_holds is not None:
            await asyncio.sleep(WAITS_AFTER_S)
            held = ""
            # Only a remark: who serves it may be away, and then the message is tried again in its own way.
            with contextlib.suppress(SomaError):
                held = await self.what_holds(message_id)
            if self.progress is not Progress.STORED:
                return
            if held:
                view.waits(held)
                return


def ask_once(chat: Chat, text: str) -> bool:
    """One message; True when the agent answered. Ctrl-C leaves it. Raises SomaError."""

    async def asked() -> bool:
        async with chat:
            return await chat.say(text)

    try:
        return asyncio.run(asked())
    except KeyboardInterrupt:
        chat.errors.print(Text(chat.left, style="dim"))
        raise


def converse(chat: Chat, read_line: Callable[[], str]) -> None:
    """Read lines and show answers until the input ends. Ctrl-C behind a message leaves it; at the prompt it ends."""
    with asyncio.Runner() as runner:
        runner.run(chat.__aenter__())
        try:
            while True:
                text = read_line().strip()
                if not text:
                    continue
                _say(runner, chat, text)
        except (EOFError, KeyboardInterrupt):
            chat.console.print()
        finally:
            runner.run(chat.__aexit__())


def _say(runner: asyncio.Runner, chat: Chat, text: str) -> None:
    try:
        runner.run(chat.say(text))
    except SomaError as error:
        chat.errors.print(Text(str(error), style="bold red"))
    except KeyboardInterrupt:
        chat.console.print(Text(f"\n{chat.left}", style="dim"))
