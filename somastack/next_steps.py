"""What a person can do with a stack that runs: its addresses, and commands to copy."""

import asyncio
from collections.abc import Iterator
from typing import Final

from rich.text import Text
from soma.controlplane.v1.agent_service_pb2 import GetAgentRequest

from soma_common.errors import NotFound, SomaError
from somastack.auth_material import AuthMaterial
from somastack.demo import AGENT, TENANT
from somastack.home import Home
from somastack.remote import Remote
from somastack.shell import callable_name, from_here
from somastack.state import StackState

LOOK_S: Final = 5.0
"""How long the control plane is asked whether there is somebody to talk to."""


async def has_demo(home: Home, state: StackState) -> bool:
    """Whether `somastack chat` has its agent here. Where this cannot be learned, chat is the one to say so: True."""
    try:
        async with asyncio.timeout(LOOK_S), Remote.at(home, state).agents() as agents:
            await agents.GetAgent(GetAgentRequest(name=f"tenants/{TENANT}/agents/{AGENT}"))
    except NotFound:
        return False
    except (SomaError, TimeoutError):
        pass
    return True


def next_steps(home: Home, state: StackState, *, has_demo: bool) -> Iterator[Text]:
    """Lines with every address and the commands that work on this stack; `has_demo`: there is an agent to talk to."""
    for part in state.parts:
        shown = "  ".join(f"{purpose} {address}" for purpose, address in part.addresses.items())
        yield Text.assemble((f"  {part.name:<15}", "cyan"), shown)
    yield Text()
    for purpose, command in _commands(home, state, has_demo):
        yield Text.assemble((f"  {purpose:<15}", "cyan"), command)


def _commands(home: Home, state: StackState, has_demo: bool) -> Iterator[tuple[str, str]]:
    if has_demo:
        yield "talk", home.command("chat")
        yield "one question", home.command("chat", "--message", "'what is 17*23'")
    else:
        missing = f"there is no agent {AGENT} of tenant {TENANT} yet"
        yield "talk", f"{missing}: start with --demo, or create your own (docs/guides/standalone.md)"
    yield "look", home.command("status")
    yield "logs", home.command("logs", "--follow")
    yield "stop", home.command("down")
    token_file = from_here(AuthMaterial(home).admin_token_file)
    control = state.targets("controlplane").partition(",")[0]
    yield (
        "administrate",
        f"{callable_name('buf')} curl --protocol grpc --http2-prior-knowledge "
        f'-H "authorization: Bearer $(cat {token_file})" '
        f'-d \'{{"parent": "tenants/{TENANT}"}}\' http://{control}/soma.controlplane.v1.AgentService/ListAgents',
    )
