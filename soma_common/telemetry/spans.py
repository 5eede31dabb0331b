"""Spans of sampled turns: how long a message or its turn was in each stage of this process.

A message is followed if its W3C `traceparent` has the sampled flag. Each process it passes notes when it leaves one
stage for the next; the newest spans are kept in memory and shown on the admin port (`GET /tracez`), nothing is sent
anywhere. `python -m tests.bench waterfall` joins those of all processes.

What is not sampled must cost nothing: `watched` is empty nearly always, and the code on the way of every turn asks only
that, once per batch or frame where it can:

    if spans.watched:
        spans.stage("gateway.gather", (item.message_id for item in items))
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

import orjson

from soma_common import ids
from soma_common.telemetry.trace import parse_traceparent

_PLAIN_LENGTH: Final = 55
"""Of a `traceparent` whose last two digits are its flags."""
_SPANS_KEPT: Final = 8192
_WATCHED_MOST: Final = 1024
_WATCHED_NS: Final = 60 * 10**9
"""What has not moved on for so long is forgotten: the hooks look items up as long as anything is watched."""
_FLAG: Final = slice(54, 55)
"""The last digit of the flags; the sampled flag is its lowest bit."""
_UNSAMPLED: Final = "02468ace"
"""Also no digit at all is among these."""


class Span(NamedTuple):
    """A stage that is over. Nanoseconds on CLOCK_MONOTONIC, which all processes of a machine share."""

    trace_id: str
    name: str
    start_ns: int
    duration_ns: int


class Followed:
    """A sampled item in this process, under one or more keys."""

    __slots__ = ("keys", "since_ns", "trace_id")

    def __init__(self, trace_id: str, keys: tuple[bytes, ...], since_ns: int) -> None:
        self.trace_id = trace_id
        self.keys = keys
        self.since_ns = since_ns
        """When its present stage began."""


watched: Final[dict[bytes, Followed]] = {}
"""Sampled items that are in this process, by message id and turn id, those that came first in front."""

_finished: Final[deque[Span]] = deque(maxlen=_SPANS_KEPT)


def follow_message(traceparent: str, session_id: bytes, message_id: bytes) -> None:
    """Watches a message, and the turn that it will most likely start, if its trace is sampled."""
    follow(traceparent, message_id, ids.turn_id(session_id, message_id))


def follow(traceparent: str, *keys: bytes) -> None:
    """Watches an item from now on under `keys`, if its trace is sampled."""
    if len(traceparent) == _PLAIN_LENGTH and traceparent.endswith("00"):
        return  # nearly always, so it is seen without parsing
    if traceparent[_FLAG] in _UNSAMPLED:  # most are, and reading one as a whole takes microseconds
        return
    trace = parse_traceparent(traceparent)
    if trace is None or not trace.sampled:
        return
    now = time.monotonic_ns()
    while watched:
        first = next(iter(watched.values()))
        if len(watched) < _WATCHED_MOST and now - first.since_ns < _WATCHED_NS:
            break
        _forget(first)
    followed = Followed(trace.trace_id, keys, now)
    for key in keys:
        watched.pop(key, None)  # tried again: it goes to the end of the line
        watched[key] = followed


def begin(keys: Iterable[bytes]) -> None:
    """A stage begins here for those of `keys` that are watched; what was between is not this process's."""
    now = time.monotonic_ns()
    for key in keys:
        followed = watched.get(key)
        if followed is not None:
            followed.since_ns = now


def stage(name: str, keys: Iterable[bytes], *, last: bool = False) -> list[Followed]:
    """The stage `name` ends, and the next begins, for those of `keys` that are watched; these are returned. After the
    `last` one they are not watched any more.
    """
    return end_stage(name, found(keys), last=last)


def found(keys: Iterable[bytes]) -> list[Followed]:
    """Those of `keys` that are watched."""
    return [watched[key] for key in keys if key in watched]


def end_stage(name: str, items: list[Followed], *, last: bool = False) -> list[Followed]:
    """As `stage`, for items that an earlier stage returned."""
    now = time.monotonic_ns()
    for followed in items:
        if followed.since_ns != now:  # else it was given under two keys
            _finished.append(Span(followed.trace_id, name, followed.since_ns, now - followed.since_ns))
            followed.since_ns = now
        if last:
            _forget(followed)
    return items


def beside(name: str, items: Iterable[tuple[Followed, int]]) -> None:
    """Something ends that ran beside the stages of these items since the time given with each."""
    now = time.monotonic_ns()
    for followed, since_ns in items:
        _finished.append(Span(followed.trace_id, name, since_ns, now - since_ns))


def _forget(followed: Followed) -> None:
    for key in followed.keys:
        if watched.get(key) is followed:
            del watched[key]


def render(service: str, instance: str) -> bytes:
    """Returns the spans kept, oldest first, as JSON; `unix_offset_ns` added to a start makes it Unix time."""
    body = {
        "service": service,
        "instance": instance,
        "unix_offset_ns": time.time_ns() - time.monotonic_ns(),
        "spans": [span._asdict() for span in _finished],
    }
    return orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE)
