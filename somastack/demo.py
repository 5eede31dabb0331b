"""The demonstration of `somastack up --demo`: a tenant, an agent, and a conversation played through `Connect`."""

import asyncio
import json
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from soma.common.v1.turn_pb2 import Delivery
from soma.controlplane.v1.agent_service_pb2 import AgentSpec

from soma_common.client import ChannelClient
from soma_common.embedded.process import PartFailed
from soma_common.errors import NotFound, PermissionDenied, SomaError
from somastack.auth_material import AuthMaterial
from somastack.home import Home
from somastack.provision import provision
from somastack.state import StackState
from somastack.turn_view import TurnView

TENANT: Final = "demo"
AGENT: Final = "assistant"
CHANNEL: Final = "tour"
"""A channel of its own: the player is its only adapter, so it gets every answer and nobody else's."""
DEFAULT_MODEL: Final = "offline/assistant"
TURN_TIMEOUT_S: Final = 60.0
ADOPTION_PATIENCE_S: Final = 15.0
"""How long a new tenant and agent may take to be known to every service."""
CONVERSATIONS: Final = Path(__file__).resolve().parents[1] / "examples" / "conversations"
INSTRUCTIONS: Final = (
    "You are the assistant of a SomaStack demonstration. Answer briefly. Use your tools for arithmetic, for the time, "
    "and to remember and recall notes."
)
TOOLS: Final = ("calculate", "current_time", "remember_note", "recall_notes")


@dataclass(frozen=True)
class Conversation:
    """What a person says, one message after the other."""

    title: str
    messages: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read a file of examples/conversations.

        Raises:
            PartFailed: it is not one.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(raw["title"]), tuple(str(message) for message in raw["messages"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PartFailed(
                f"{path} is not a conversation: {error!r}", f"see {path.with_name('README.md')}"
            ) from error


async def demonstrate(home: Home, state: StackState, console: Console, model: str = DEFAULT_MODEL) -> None:
    """Provide tenant `demo` with agent `assistant`, and play every example conversation.

    Raises:
        PartFailed: something of it did not work.
    """
    auth = AuthMaterial(home)
    admin_token = auth.admin_token_file.read_text(encoding="utf-8").strip()
    tenant_token = auth.tenant_token_file(TENANT).read_text(encoding="utf-8").strip()
    spec = AgentSpec(instructions=INSTRUCTIONS, model=model, tools=TOOLS)
    try:
        await provision(state.targets("controlplane"), admin_token, TENANT, AGENT, spec)
        for path in sorted(CONVERSATIONS.glob("*.json")):
            await _play(Conversation.load(path), state.targets("gateway"), tenant_token, console)
    except SomaError as error:
        raise PartFailed(f"the demonstration failed: {error}", f"look: somastack logs --home {home.path}") from error


async def _play(conversation: Conversation, target: str, token: str, console: Console) -> None:
    """Say every message of the conversation in a session of its own, and show the answers as they come."""
    console.print()
    console.print(Rule(Text(f"💬 {conversation.title}"), align="left"))
    session = f"tour-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    async with AsyncExitStack() as streams:
        client = await _connected(streams, target, token)
        for message in conversation.messages:
            console.print(Text.assemble(("you> ", "bold green"), message))
            await _ask(client, session, message, TurnView(console, AGENT))
    console.print(Rule())


async def _connected(streams: AsyncExitStack, target: str, token: str) -> ChannelClient:
    """A client that the gateway has welcomed, closed by `streams`; asks again while the tenant is not known there."""
    deadline = time.monotonic() + ADOPTION_PATIENCE_S
    while True:
        client = ChannelClient(target, token=token, tenant=TENANT, channel=CHANNEL, instance="player")
        try:
            return await streams.enter_async_context(client)
        except (NotFound, PermissionDenied):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


async def _ask(client: ChannelClient, session: str, text: str, view: TurnView) -> None:
    """Send one message and show its turn until it has ended."""
    message_id = await _accepted(client, session, text)
    try:
        async with asyncio.timeout(TURN_TIMEOUT_S):
            async for event in client.events():
                if not isinstance(event, Delivery):
                    if event.session == session:
                        view.show(event)
                    continue
                await client.ack(event)
                if message_id in event.message_ids:
                    if not view.finish(event):
                        raise PartFailed("the demonstration got no answer", "see the reason above")
                    return
    except TimeoutError:
        raise PartFailed(
            f"the demonstration got no answer within {TURN_TIMEOUT_S:.0f} s", "look for trouble: somastack status"
        ) from None


async def _accepted(client: ChannelClient, session: str, text: str) -> bytes:
    """The id of the accepted message; asks again while the gateway has not heard of the agent yet."""
    deadline = time.monotonic() + ADOPTION_PATIENCE_S
    while True:
        try:
            return (await client.send(AGENT, session, text)).message_id
        except NotFound:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)
