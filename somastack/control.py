"""Acting on a stack that runs in another process, through what it wrote in its home."""

import asyncio
import signal
import time
from collections.abc import Callable

from soma_common.embedded.process import PartFailed
from somastack.home import Home
from somastack.state import StackState

STOP_WITHIN_S = 20.0
"""Twice what an orderly stop may take; then the supervisor is killed, and its children end with it."""
STATE_WITHIN_S = 5.0
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
        raise PartFailed(f"no stack is running in {home.path}", f"start one: somastack up --home {home.path}")
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


async def _within(limit_s: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL_S)
    return True
