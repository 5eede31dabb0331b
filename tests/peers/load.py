"""The load on a peer that speaks HTTP: the same closed loop as the product's (`tests/bench/load.py`), and its check.

Each session posts a message of 256 characters with an idempotency key, waits for the answer, and posts the next. Every
answer must carry the text that was sent and the next number of its session. At the end the last key is sent again,
which must give the same answer and leave the state as it is.
"""

from __future__ import annotations

import asyncio
import gc
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import monotonic

import orjson

from tests.bench.load import Result
from tests.peers import http_client

MESSAGE_CHARS = 256
CONTEXT_MESSAGES = 20
LAST_ANSWERS_S = 30.0


@dataclass(frozen=True, slots=True)
class Routes:
    """Where a peer's turn and a session's state are; `{session}` is replaced."""

    ports: tuple[int, ...]
    turn: str
    state: str


@dataclass(slots=True)
class Run:
    """The state that all sessions of a run share."""

    routes: Routes
    result: Result
    label: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    measuring: bool = False
    stopping: bool = False
    wrong: list[str] = field(default_factory=list)


async def turns(
    routes: Routes,
    sessions: int,
    connections: int,
    seconds: float,
    *,
    http2: bool,
    warm_s: float,
    window: AbstractContextManager[object],
) -> tuple[Result, list[str]]:
    """Runs the loops; returns what they saw and what was wrong, nothing when all is as promised.

    `window` is entered when the measured time begins and left when it ends.
    """
    run = Run(routes, Result(sessions, connections))
    ports = [routes.ports[number % len(routes.ports)] for number in range(connections)]
    links = [await http_client.connect(port, http2=http2) for port in ports]
    # As the product's load does.
    gc.collect()
    gc.freeze()
    loops = [asyncio.create_task(_session(run, links[number % connections], number)) for number in range(sessions)]
    await asyncio.sleep(warm_s)
    with window:
        run.measuring, began = True, monotonic()
        await asyncio.sleep(seconds)
        run.measuring, run.result.seconds = False, monotonic() - began
    run.stopping = True
    try:
        await asyncio.wait_for(asyncio.gather(*loops), LAST_ANSWERS_S)
    except TimeoutError:
        run.wrong.append(f"answers did not come within {LAST_ANSWERS_S:.0f} s")
    gc.unfreeze()
    for link in links:
        link.close()
    run.result.errors += len(run.wrong)
    return run.result, run.wrong


async def _session(run: Run, link: http_client.Connection, number: int) -> None:
    name = f"{run.label}-{number}"
    path = run.routes.turn.format(session=name)
    sent, status, key, body, raw = 0, 0, "", b"", b""
    texts: list[str] = []
    try:
        while not run.stopping:
            sent += 1
            text = f"{sent:08d} ".ljust(MESSAGE_CHARS, "x")
            body = orjson.dumps({"text": text})
            key = uuid.uuid4().hex
            began = monotonic()
            status, raw = await link.request("POST", path, key, body)
            took = monotonic() - began
            if status != 200 or orjson.loads(raw) != {"number": sent, "text": text}:
                run.wrong.append(f"session {number}, turn {sent}: {status} {raw[:200]!r}")
                return
            texts = [*texts, text][-CONTEXT_MESSAGES // 2 :]
            if run.measuring:
                run.result.turns += 1
                run.result.latencies.append(took)
        if (again := await link.request("POST", path, key, body)) != (status, raw):
            run.wrong.append(f"session {number}: the key of turn {sent} again: {again}, not {raw!r}")
        await _check_state(run, link, number, sent, texts)
    except (ConnectionError, OSError, ValueError) as error:
        run.wrong.append(f"session {number}, turn {sent}: {error!r}")


async def _check_state(run: Run, link: http_client.Connection, number: int, sent: int, texts: list[str]) -> None:
    """The stored state counts every turn and ends with the last ones."""
    path = run.routes.state.format(session=f"{run.label}-{number}")
    status, raw = await link.request("GET", path, "", b"")
    expected = [[role, text] for text in texts for role in ("user", "assistant")]
    if status != 200 or orjson.loads(raw) != {"turns": sent, "messages": expected}:
        run.wrong.append(f"session {number}: after {sent} turns its state is {status} {raw[:200]!r}")
