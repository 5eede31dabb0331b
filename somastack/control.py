"""Acting on a stack that runs in another process, through what it wrote in its home."""

import asyncio
import signal
import time
from collections.abc import Callable

from soma_common.embedded.process import PartFailed, ProcessIdentity
from somastack.home import Home
from somastack.layout import SERVICES
from somastack.state import PartState, Phase, StackState

STOP_WITHIN_S = 20.0
"""Twice what an orderly stop may take; then the supervisor is killed, and its children end with it."""
STATE_WITHIN_S = 5.0
READY_WITHIN_S = 90.0
"""From the stop of a service to its being ready again; it may wait for the database for a while."""
POLL_S = 0.05


def running_state(home: Home) -> StackState | None:
    """The state of the stack that runs in `home`; None when none does (what a killed one left behind is not one)."""
    state = StackState.load(home.state_file)
    return state if state is not None and home.is_owned() and state.supervisor.alive() else None


def needed_state(home: Home) -> StackState:
    """The state of the stack that runs in `home`.

    Raises:
        PartFailed: none does.
    """
    state = running_state(home)
    if state is None:
        raise PartFailed(f"no stack is running in {home.path}", f"start one: {home.command('up', '--demo')}")
    return state


async def end_stack(home: Home) -> bool:
    """Stop the stack that runs in `home`; False when none does.

    Raises:
        PartFailed: something owns the home but does not say what it is.
    """
    if not home.is_owned():
        return False
    if not await _within(STATE_WITHIN_S, lambda: running_state(home) is not None or not home.is_owned()):
        raise PartFailed(f"something owns {home.lock_file} and is no stack", f"see what it is: fuser {home.lock_file}")
    state = running_state(home)
    if state is not None:
        state.supervisor.send(signal.SIGTERM)
        if not await _within(STOP_WITHIN_S, lambda: not home.is_owned()):
            state.supervisor.send(signal.SIGKILL)
            await _within(STATE_WITHIN_S, lambda: not home.is_owned())
    return True


async def restart(home: Home, component: str | None, told: Callable[[str, float], None]) -> None:
    """Restart services one after the other, in the order in which an upgrade replaces them, each when the one before is
    ready again; `told` hears of each, with its seconds. `component` is one replica or all of a service; None: all.

    The supervisor starts again what has ended, as after any end. What is not ready is waited for first.

    Raises:
        PartFailed: nothing runs, nothing has this name, or one did not come back: then the others are left alone.
    """
    for name in _services(needed_state(home), component):
        began = time.monotonic()
        await _ready(home, name, other_than=None)
        before = _part(home, name).process
        assert before is not None  # it is ready
        before.send(signal.SIGTERM)
        await _ready(home, name, other_than=before)
        told(name, time.monotonic() - began)


def _services(state: StackState, component: str | None) -> list[str]:
    order = [service.name for service in SERVICES]
    names = [part.name for part in state.parts if part.name.rpartition("-")[0] in order]
    chosen = [name for name in names if component in (None, name, name.rpartition("-")[0])]
    if not chosen:
        raise PartFailed(f"no service {component} runs", "name one of " + ", ".join(names))
    return sorted(chosen, key=lambda name: order.index(name.rpartition("-")[0]))


def _part(home: Home, name: str) -> PartState:
    return next(part for part in needed_state(home).parts if part.name == name)


async def _ready(home: Home, name: str, other_than: ProcessIdentity | None) -> None:
    """Wait until a part is ready, in another process than that one."""

    def holds() -> bool:
        part = _part(home, name)
        return part.phase is Phase.READY and part.process not in (None, other_than)

    if not await _within(READY_WITHIN_S, holds):
        trouble = _part(home, name).trouble
        raise PartFailed(
            f"{name} was not ready within {READY_WITHIN_S:.0f} s{': ' if trouble else ''}{trouble}",
            f"look: {home.command('logs', name)}",
        )


async def _within(limit_s: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL_S)
    return True
