"""Restate: a virtual object per session. The server runs at most one exclusive handler of an object at a time."""

# The packages of .peers are not there where types are checked.
# mypy: disable-error-code="import-not-found, misc, no-any-return, untyped-decorator"

from __future__ import annotations

from datetime import timedelta
from typing import Any

import orjson
import restate
from restate.serde import Serde

from tests.peers.apps import turn


class FastJson(Serde[Any]):
    """JSON by orjson: the SDK's default serializer is the standard library's, which is slower."""

    def deserialize(self, buf: bytes) -> Any:
        """None of nothing: a state that was never set."""
        return orjson.loads(buf) if buf else None

    def serialize(self, obj: Any) -> bytes:
        """An empty value for None."""
        return b"" if obj is None else orjson.dumps(obj)


JSON = FastJson()
# The answer is kept a day for its key, as by default; the journal of a finished turn, for people to look at, is not.
session = restate.VirtualObject("Session", journal_retention=timedelta(0))


async def _append(context: restate.ObjectContext, request: Any) -> Any:
    state, answer = turn.append(await context.get("state", serde=JSON), request["text"])
    context.set("state", state, serde=JSON)
    return answer


@session.handler(input_serde=JSON, output_serde=JSON)
async def echo(context: restate.ObjectContext, request: Any) -> Any:
    """The brain answers at once."""
    return await _append(context, request)


@session.handler(input_serde=JSON, output_serde=JSON)
async def slow(context: restate.ObjectContext, request: Any) -> Any:
    """The brain takes 0 to 20 ms, as a plain await: after a crash it would be asked again."""
    await turn.think()
    return await _append(context, request)


@session.handler(input_serde=JSON, output_serde=JSON)
async def slow_step(context: restate.ObjectContext, request: Any) -> Any:
    """The brain takes 0 to 20 ms in a durable step, as Restate's guides call a model: its answer is journaled."""

    async def answer() -> str:
        await turn.think()
        return str(request["text"])

    await context.run_typed("brain", answer)
    return await _append(context, request)


@session.handler(kind="shared", input_serde=JSON, output_serde=JSON)
async def state(context: restate.ObjectSharedContext) -> Any:
    """The session's state, for the check after a run."""
    return await context.get("state", serde=JSON)


app = restate.app(services=[session])
