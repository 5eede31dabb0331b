"""The systems that are compared: how each is set up and tuned, in which shapes it is loaded.

What a reader who knows a peer asks about its set-up is in `facts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tests.peers import servers
from tests.peers.servers import Server

OURS: Final = "SomaStack"
SHAPES: Final = {
    "few": "64 sessions over few connections, echo brain",
    "each": "64 sessions with a connection each, echo brain",
    "one": "1 session, echo brain",
    "slow-few": "64 sessions over few connections, brain of 0-20 ms",
    "slow-each": "64 sessions with a connection each, brain of 0-20 ms",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One load on one system: the first shape is where it is measured, it is shown in all."""

    name: str
    shapes: tuple[str, ...]
    sessions: int
    connections: int
    brain: str = "echo"
    http2: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """A system that speaks HTTP."""

    name: str
    start: Callable[[], AbstractAsyncContextManager[Server]]
    cases: tuple[Case, ...]
    turn: str = "/{brain}/{session}"
    state: str = "/state/{session}"


# 64 sessions over HTTP/1.1 need 64 connections: one request is under way on each. So these are shown in both shapes.
_HTTP1: Final = (
    Case("HTTP/1.1, 64 connections", ("each", "few"), 64, 64),
    Case("HTTP/1.1, 1 connection", ("one",), 1, 1),
    Case("HTTP/1.1, 64 connections", ("slow-each", "slow-few"), 64, 64, brain="slow"),
)
_HTTP2: Final = (
    Case("HTTP/2, 4 connections", ("few",), 64, 4, http2=True),
    Case("HTTP/2, 4 connections", ("slow-few",), 64, 4, brain="slow", http2=True),
)
_DURABLE_STEP: Final = (
    Case("HTTP/1.1, 64 connections, brain in ctx.run", ("slow-each", "slow-few"), 64, 64, brain="slow_step"),
)
OUR_CASES: Final = (
    Case("gRPC, 4 streams", ("few",), 64, 4),
    Case("gRPC, 64 streams", ("each",), 64, 64),
    Case("gRPC, 1 stream", ("one",), 1, 1),
    Case("gRPC, 4 streams", ("slow-few",), 64, 4, brain="slow"),
    Case("gRPC, 64 streams", ("slow-each",), 64, 64, brain="slow"),
)
BRAINS: Final = {"echo": "echo/echo", "slow": "echo/delay-0-20"}


def peers(restate_server: Path | None) -> list[Peer]:
    """Every peer, in the order in which each round takes them; without Restate when there is no server for it."""
    found: list[Peer] = []
    if restate_server is not None:
        for name, partitions, further in (
            ("Restate, 1 partition", 1, (*_HTTP2, *_DURABLE_STEP)),
            ("Restate, default partitions", None, _HTTP2[:1]),
        ):
            start = partial(servers.restate, restate_server, partitions)
            cases = (*_HTTP1, *further)
            found.append(Peer(name, start, cases, "/Session/{session}/{brain}", "/Session/{session}/state"))
    for name, application, settings, processes in (
        ("FastAPI, row lock", "rowlock_app", {"PEER_POOL": "8"}, 2),
        ("FastAPI, group commit", "groupcommit_app", {}, 1),
        ("DBOS", "dbos_app", {"PEER_POOL": "8"}, 2),
    ):
        found.append(Peer(name, partial(servers.on_postgres, application, settings, processes), _HTTP1))
    return found
