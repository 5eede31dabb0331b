"""The turn that every peer serves: append the user's message and the echoed answer to the session's state.

State is one value, `{"turns": n, "messages": [[role, text], ...]}`, with the last 20 messages: what an agent of the
product with `context_messages=20` shows its brain. The answer carries the turn's number, so that a client sees a turn
that was lost, repeated or run out of order.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

CONTEXT_MESSAGES = 20


def append(state: dict[str, Any] | None, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state after a turn, and the turn's answer."""
    before = state or {"turns": 0, "messages": []}
    messages = [*before["messages"], ["user", text], ["assistant", text]][-CONTEXT_MESSAGES:]
    number = before["turns"] + 1
    return {"turns": number, "messages": messages}, {"number": number, "text": text}


async def think() -> None:
    """A brain that takes a random 0 to 20 ms, as `echo/delay-0-20` of the product does."""
    await asyncio.sleep(random.uniform(0.0, 0.020))
