"""Named faults at the edges where a crash matters, switched on by a test through the environment.

    SOMA_FAILPOINTS="router.before_commit=kill@3;gateway.after_publish=sleep:500"

    kill         SIGKILL to this process
    stop         SIGSTOP to this process: it freezes and keeps its connections
    sleep:MS     wait MS milliseconds (the coroutine waits, the loop goes on)
    block:MS     wait MS milliseconds with the whole event loop
    raise        raise FailpointHit
    @N           only at the N-th time the point is reached (from 1); without it, every time

Unarmed, a failpoint is one look into an empty dictionary. Names are listed where they are used: `grep -r failpoint`.
"""

import asyncio
import os
import signal
import time
from dataclasses import dataclass

import structlog

_log = structlog.get_logger(__name__)

LAST_LINE_S = 0.05
"""What a process that is about to die or freeze gives the log's writer thread for the line that says so."""

_ACTIONS = frozenset({"kill", "stop", "sleep", "block", "raise"})


class FailpointHit(RuntimeError):
    """What the action `raise` raises: an unexpected error, on purpose."""


@dataclass(slots=True)
class _Armed:
    action: str
    milliseconds: int
    only_at: int | None
    reached: int = 0

    def due(self) -> bool:
        self.reached += 1
        return self.only_at is None or self.reached == self.only_at


# The one piece of process-wide state here: a fault is injected from outside, so no caller can pass it in.
_armed: dict[str, _Armed] = {}


def arm_failpoints(spec: str) -> None:
    """Arm exactly the points in `spec` (format above; empty disarms all); raises ValueError naming the part that is
    wrong."""
    armed = dict(_parse(part.strip()) for part in spec.split(";") if part.strip())
    _armed.clear()
    _armed.update(armed)
    if armed:
        _log.warning("failpoints.armed", points=sorted(armed))


def failpoint(name: str) -> None:
    """Do what is armed for `name`, if anything, from code that cannot wait; `sleep` blocks the thread here."""
    if _armed and (point := _armed.get(name)) is not None and point.due():
        _hit(name, point)
        if point.action in {"sleep", "block"}:
            time.sleep(point.milliseconds / 1000)


async def failpoint_async(name: str) -> None:
    """Do what is armed for `name`, if anything, from a coroutine; `sleep` lets the loop go on."""
    if _armed and (point := _armed.get(name)) is not None and point.due():
        _hit(name, point)
        if point.action == "sleep":
            await asyncio.sleep(point.milliseconds / 1000)
        elif point.action == "block":
            time.sleep(point.milliseconds / 1000)  # noqa: ASYNC251 - a loop that stands still is the fault asked for


def _hit(name: str, point: _Armed) -> None:
    _log.warning("failpoint.hit", point=name, action=point.action, reached=point.reached)
    if point.action in {"kill", "stop"}:
        time.sleep(LAST_LINE_S)
    match point.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise FailpointHit(name)


def _parse(part: str) -> tuple[str, _Armed]:
    name, equals, rest = part.partition("=")
    rest, _, count = rest.partition("@")
    action, _, milliseconds = rest.partition(":")
    timed = action in {"sleep", "block"}
    if not (
        name and equals and action in _ACTIONS and milliseconds.isdigit() == timed and (count.isdigit() or not count)
    ):
        raise ValueError(f"failpoint {part!r} is not NAME=kill|stop|raise|sleep:MS|block:MS with an optional @N")
    return name, _Armed(action, int(milliseconds or 0), int(count) if count else None)
