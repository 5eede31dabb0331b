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
from somastack.provision import Provided, change_model, provision
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


async def demonstrate(home: Home, state: StackState, console: Console, model: str | None = None) -> None:
    """Provide tenant `demo` with agent `assistant`, and play every example conversation.

    An agent that is there stays as it is, except that it gets `model` if one is given; what is not as the demonstration
    makes it is told. A conversation that could only wait, because of a pause, is not played.

    Raises:
        PartFailed: something of it did not work.
    """
    auth = AuthMaterial(home)
    admin_token = auth.admin_token_file.read_text(encoding="utf-8").strip()
    tenant_token = auth.tenant_token_file(TENANT).read_text(encoding="utf-8").strip()
    try:
        provided = await _provide(state.targets("controlplane"), admin_token, console, model)
        if held := _held(home, provided):
            console.print(Text(f"no conversation is played: {held}", style="yellow"))
            return
        for path in sorted(CONVERSATIONS.glob("*.json")):
            await _play(home, Conversation.load(path), state.targets("gateway"), tenant_token, console)
    except SomaError as error:
        raise PartFailed(f"the demonstration failed: {error}", f"look: {home.command('logs')}") from error


async def _provide(target: str, token: str, console: Console, model: str | None) -> Provided:
    """The demonstration's tenant and agent; tells in a line what of the agent is not the demonstration's own."""
    wanted = AgentSpec(instructions=INSTRUCTIONS, model=model or DEFAULT_MODEL, tools=TOOLS)
    provided = await provision(target, token, TENANT, AGENT, wanted)
    before = provided.agent.spec.model
    told = []
    if model is not None and before != model:
        provided = Provided(provided.tenant, await change_model(target, token, provided.agent, model))
        told.append(f"model changed from {before} to {model}")
    if kept := _kept(provided.agent.spec, wanted):
        told.append(f"kept as configured: {kept}")
    if told:
        console.print(Text(f"agent {AGENT}: {'; '.join(told)}", style="dim"))
    return provided


def _kept(present: AgentSpec, wanted: AgentSpec) -> str:
    """What an agent has that is not as wanted."""
    kept = []
    if present.model != wanted.model:
        kept.append(f"model {present.model} (--model {wanted.model} changes it)")
    if list(present.tools) != list(wanted.tools):
        kept.append(f"tools {' '.join(present.tools) or 'none'}")
    if present.instructions != wanted.instructions:
        kept.append("its instructions")
    return ", ".join(kept)


def _held(home: Home, provided: Provided) -> str:
    """Why nothing would be answered, with what changes it; empty: it would."""
    if provided.tenant.paused:
        return f"tenant {TENANT} is paused ({home.command('tenants', 'resume', TENANT)})"
    if provided.agent.paused:
        return f"agent {AGENT} is paused ({home.command('agents', 'resume', AGENT)})"
    if provided.tenant.suspended or provided.agent.spec.suspended:
        return f"{'tenant ' + TENANT if provided.tenant.suspended else 'agent ' + AGENT} is suspended"
    return ""


async def _play(home: Home, conversation: Conversation, target: str, token: str, console: Console) -> None:
    """Say every message of the conversation in a session of its own, and show the answers as they come."""
    console.print()
    console.print(Rule(Text(f"💬 {conversation.title}"), align="left"))
    session = f"tour-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    async with AsyncExitStack() as streams:
        client = await _connected(streams, target, token)
        for message in conversation.messages:
            console.print(Text.assemble(("you> ", "bold green"), message))
            await _ask(home, client, session, message, TurnView(console, AGENT))
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


async def _ask(home: Home, client: ChannelClient, session: str, text: str, view: TurnView) -> None:
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
            f"the demonstration got no answer within {TURN_TIMEOUT_S:.0f} s",
            f"look for trouble: {home.command('status')}",
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
