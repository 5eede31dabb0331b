"""What a handler may know about the call it serves, without it being passed through every function."""

import asyncio
import time
from contextvars import ContextVar

from soma.common.v1 import error_reason_pb2

from soma_common.authz.tokens import Caller
from soma_common.errors import Internal

_caller: ContextVar[Caller] = ContextVar("soma_caller")
_deadline: ContextVar[tuple["asyncio.Task[object] | None", float] | None] = ContextVar("soma_deadline", default=None)


def caller() -> Caller:
    """Return who makes the call that this task serves; raises Internal outside of a call or in a public method."""
    try:
        return _caller.get()
    except LookupError:
        raise Internal(error_reason_pb2.ERROR_REASON_INTERNAL, "there is no authenticated caller here") from None


def time_left_s() -> float | None:
    """Return the seconds left for the unary call that this very task serves, or None.

    Tasks that a handler starts are not bound by its deadline: they may outlive the call and serve others.
    """
    bound = _deadline.get()
    if bound is None or bound[0] is not _current_task():
        return None
    return bound[1] - time.monotonic()


def set_caller(caller: Caller) -> None:
    """Make `caller` the one this task serves (each call runs in its own task)."""
    _caller.set(caller)


def set_deadline(seconds_left: float) -> None:
    """Bind this task to a deadline."""
    _deadline.set((_current_task(), time.monotonic() + seconds_left))


def _current_task() -> "asyncio.Task[object] | None":
    return asyncio.current_task()
