"""Waiting for a condition instead of sleeping for a time."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")


@overload
async def eventually(
    predicate: Callable[[], Awaitable[T]], timeout_s: float = ..., what: str = ..., interval_s: float = ...
) -> T: ...


@overload
async def eventually(
    predicate: Callable[[], T], timeout_s: float = ..., what: str = ..., interval_s: float = ...
) -> T: ...


async def eventually(
    predicate: Callable[[], Any], timeout_s: float = 15.0, what: str = "", interval_s: float = 0.02
) -> Any:
    """Return the first true result of `predicate` (plain or async), asked every `interval_s` seconds.

    Raises AssertionError naming `what` and the last result, or the last AssertionError of the predicate itself,
    when it does not come true within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        failure: AssertionError | None = None
        result: Any = None
        try:
            answer = predicate()
            result = await answer if inspect.isawaitable(answer) else answer
        except AssertionError as error:
            failure = error
        if result:
            return result
        if time.monotonic() >= deadline:
            told = what or getattr(predicate, "__name__", "the condition")
            raise AssertionError(f"not within {timeout_s:g} s: {told} (last: {failure or result!r})") from failure
        await asyncio.sleep(interval_s)
