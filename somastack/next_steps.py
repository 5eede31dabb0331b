"""What a person can do with a stack that runs: its addresses, and commands to copy."""

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from somastack.auth_material import AuthMaterial
from somastack.demo import TENANT
from somastack.home import Home
from somastack.state import StackState


def next_steps(home: Home, state: StackState, *, has_demo: bool) -> Iterator[Text]:
    """Lines with every address and the commands that work on this stack; `has_demo`: there is an agent to talk to."""
    for part in state.parts:
        shown = "  ".join(f"{purpose} {address}" for purpose, address in part.addresses.items())
        yield Text.assemble((f"  {part.name:<15}", "cyan"), shown)
    yield Text()
    for purpose, command in _commands(home, state, has_demo):
        yield Text.assemble((f"  {purpose:<15}", "cyan"), command)


def _commands(home: Home, state: StackState, has_demo: bool) -> Iterator[tuple[str, str]]:
    program = callable_name("somastack")
    at_home = "" if Home.chosen(None) == home else f" --home {_from_here(home.path)}"
    if has_demo:
        yield "talk", f"{program} chat{at_home}"
        yield "one question", f"{program} chat{at_home} --message 'what is 17*23'"
    else:
        yield "talk", "start with --demo, or create a tenant and an agent (docs/guides/standalone.md)"
    yield "look", f"{program} status{at_home}"
    yield "logs", f"{program} logs{at_home} --follow"
    yield "stop", f"{program} down{at_home}"
    token_file = _from_here(AuthMaterial(home).admin_token_file)
    control = state.targets("controlplane").partition(",")[0]
    yield (
        "administrate",
        f"{callable_name('buf')} curl --protocol grpc --http2-prior-knowledge "
        f'-H "authorization: Bearer $(cat {token_file})" '
        f'-d \'{{"parent": "tenants/{TENANT}"}}\' http://{control}/soma.controlplane.v1.AgentService/ListAgents',
    )


def callable_name(program: str) -> str:
    """How to call a program of this environment from here: by its name if the shell finds it, else by its path."""
    beside_us = Path(sys.executable).with_name(program)
    found = shutil.which(program)
    if found is not None and Path(found).resolve() == beside_us.resolve():
        return program
    if not beside_us.exists():
        return program
    return _from_here(beside_us)


def _from_here(path: Path) -> str:
    """`path` for a shell in the present directory."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
