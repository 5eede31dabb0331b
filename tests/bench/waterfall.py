"""Where a turn's time goes, hop by hop: spans of sampled turns of all processes, joined by trace.

    python -m tests.bench waterfall [--shapes 1/1,64/4,64/64] [--seconds 8] [--model echo/echo] [--json FILE]

The client samples some of its messages (W3C traceparent) and notes when it sent them and when their answers came. The
services keep their spans (`/tracez`); all clocks are this machine's CLOCK_MONOTONIC. What is between two spans of
different processes is a hop: the wire, the runtimes at both ends, and the time until the receiver's event loop gets to
it. So the rows of a turn add up to its latency exactly, and the means of all rows to the mean latency.

PostgreSQL is looked at from the side: which part of the time the router's writer was at work there, or waiting for the
disk, or for the router.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, quantiles
from time import monotonic_ns
from typing import Any, ClassVar, Final

import uvloop
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery
from soma.gateway.v1.channel_service_pb2 import Cancel, InboundMessage

from soma_common.client.channel_client import ChannelClient
from soma_common.postgres.connect import connect
from soma_common.telemetry.trace import new_trace
from somastack.home import Home
from somastack.state import StackState
from tests.bench import load, processes, stack

BESIDE: Final = frozenset({"gateway.store", "router.brain", "router.commit_ahead", "router.acked", "cognition.confirm"})
"""Spans beside the way of the answer: the receipt, what a brain's own spans tell better, a commit that is under way
while the brain thinks, what comes after it.
"""
WHOLE: Final = frozenset({"gateway.gather", "router.gather", "router.commit", "cognition.step", "gateway.deliver"})
"""Spans that a turn has to have of each process."""
SAMPLES: Final = 500
"""About so many turns of a run are sampled; a process keeps the spans of more."""
_LOOK_S: Final = 0.02
_RARE: Final = 0.05
"""Rows that fewer turns have are not shown: another order of things, or one more dispatch."""


@dataclass(slots=True)
class Hop:
    """A span, or what is between two: microseconds of each turn that has it."""

    name: str
    us: list[float] = field(default_factory=list)
    order: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """A sampled message as its client saw it; nanoseconds on CLOCK_MONOTONIC, 0: not yet."""

    trace_id: str
    sent: int
    receipt: int = 0
    answer: int = 0


class SamplingClient(ChannelClient):
    """A client that has every `every`-th of its messages traced."""

    every: ClassVar[int] = 16
    seen: ClassVar[dict[str, Sent]] = {}

    def __init__(self, target: str, *, on_delivery: Callable[[Delivery], None] | None = None, **options: Any) -> None:
        super().__init__(target, on_delivery=self._answered, **options)
        self._next = on_delivery
        self._posted = 0
        self._of_session: dict[str, str] = {}

    def post(self, item: InboundMessage | Cancel, answer: Callable[[bytes, Error | None], None]) -> int:
        """As the client's, sampled at times."""
        self._posted += 1
        if self._posted % self.every or isinstance(item, Cancel):
            return super().post(item, answer)
        trace = new_trace(sampled=True)
        item.traceparent = str(trace)
        self._of_session[item.session] = trace.trace_id
        sent = Sent(trace.trace_id, monotonic_ns())
        self.seen[trace.trace_id] = sent

        def stored(message_id: bytes, error: Error | None) -> None:
            self.seen[trace.trace_id] = Sent(trace.trace_id, sent.sent, receipt=monotonic_ns())
            answer(message_id, error)

        return super().post(item, stored)

    def _answered(self, delivery: Delivery) -> None:
        trace_id = self._of_session.pop(delivery.session, None)
        if trace_id is not None:
            sent = self.seen[trace_id]
            self.seen[trace_id] = Sent(trace_id, sent.sent, sent.receipt, monotonic_ns())
        if self._next is not None:
            self._next(delivery)


def waterfall(sent: Iterable[Sent], spans: Iterable[dict[str, Any]]) -> tuple[list[Hop], list[Hop]]:
    """The hops of the turns, in order, and what happened beside them. `spans` of all processes, as `/tracez` has them
    with `service` added.
    """
    by_trace: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for span in spans:
        by_trace[span["trace_id"]].append(span)
    hops: dict[str, Hop] = {}
    beside: dict[str, Hop] = {}
    for turn in sent:
        of_turn = sorted(by_trace.get(turn.trace_id, ()), key=lambda span: span["start_ns"])
        # A process that has more spans than it keeps forgets the oldest: turns without some would be other turns.
        if not turn.answer or not {span["name"] for span in of_turn} >= WHOLE:
            continue
        for number, (name, ns) in enumerate(_chain(turn, [s for s in of_turn if s["name"] not in BESIDE])):
            hop = hops.setdefault(name, Hop(name))
            hop.us.append(ns / 1000)
            hop.order += number
        for span in of_turn:
            if span["name"] in BESIDE:
                beside.setdefault(span["name"], Hop(span["name"])).us.append(span["duration_ns"] / 1000)
        beside.setdefault("client: receipt", Hop("client: receipt")).us.append((turn.receipt - turn.sent) / 1000)
        beside.setdefault("client: answer", Hop("client: answer")).us.append((turn.answer - turn.sent) / 1000)
    return sorted(hops.values(), key=lambda hop: hop.order / len(hop.us)), list(beside.values())


def _chain(turn: Sent, spans: list[dict[str, Any]]) -> Iterable[tuple[str, int]]:
    """Spans and what is between them, from the client and back to it: names and nanoseconds."""
    seen: Counter[str] = Counter()
    at, service = turn.sent, "client"
    for span in spans:
        if span["start_ns"] + span["duration_ns"] > turn.answer:
            break
        if span["start_ns"] > at or span["service"] != service:
            yield f"{service} -> {span['service']}", span["start_ns"] - at
        seen[span["name"]] += 1
        again = f" ({seen[span['name']]})" if seen[span["name"]] > 1 else ""
        yield span["name"] + again, span["duration_ns"]
        at, service = span["start_ns"] + span["duration_ns"], span["service"]
    yield f"{service} -> client", turn.answer - at


async def _spans(home: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for url in _admin_pages(home):
        body = json.loads(await asyncio.to_thread(_get, f"{url}/tracez"))
        found += [{**span, "service": body["service"]} for span in body["spans"]]
    return found


def _admin_pages(home: Path, service: str = "") -> list[str]:
    state = StackState.load(Home(home).state_file)
    assert state is not None, "the stack runs"
    return [p.addresses["admin"] for p in state.parts if "admin" in p.addresses and p.name.startswith(service)]


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


async def _groups(home: Path) -> dict[str, float]:
    """Sums of the routers' group metrics so far."""
    sums: dict[str, float] = defaultdict(float)
    for url in _admin_pages(home, "router"):
        for name, value in re.findall(
            r"^soma_router_group_(items_sum|items_count|seconds_sum) (\S+)$",
            await asyncio.to_thread(_get, f"{url}/metrics"),
            re.MULTILINE,
        ):
            sums[name] += float(value)
    return dict(sums)


async def _look_at_writer(dsn: str, seen: Counter[str]) -> None:
    """Counts what the router's writer does in PostgreSQL, looked at every `_LOOK_S`."""
    connection = await connect(dsn, application_name="waterfall")
    try:
        pid = await connection.fetchval(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'router-% writer' LIMIT 1"
        )
        look = await connection.prepare("SELECT state, wait_event FROM pg_stat_get_activity($1)")
        while True:
            row = await look.fetchrow(pid)
            assert row is not None, "the writer's backend runs"
            seen[(row["wait_event"] or "working") if row["state"] == "active" else "waits for the router"] += 1
            await asyncio.sleep(_LOOK_S)
    finally:
        connection.terminate()


async def measure(running: stack.Stack, sessions: int, streams: int, seconds: float, warm_s: float) -> dict[str, Any]:
    """Runs one shape and returns its rows."""
    SamplingClient.seen = {}
    SamplingClient.every = 1
    first = await load.turns(running, "echo", sessions, streams, 1.0, warm_s=warm_s, kind=SamplingClient)
    SamplingClient.every = max(1, round(first.rate * seconds / SAMPLES))
    SamplingClient.seen = {}
    writer: Counter[str] = Counter()
    looking = asyncio.create_task(_look_at_writer(running.postgres_dsn(), writer))
    before = await _groups(running.home)
    everybody = {**running.pids, "client": os.getpid()}
    cpu, began = {name: processes.cpu_s(pid) for name, pid in everybody.items()}, monotonic_ns()
    result = await load.turns(running, "echo", sessions, streams, seconds, warm_s=0.5, kind=SamplingClient)
    wall_s = (monotonic_ns() - began) / 1e9
    cores = {name: (processes.cpu_s(pid) - cpu[name]) / wall_s for name, pid in everybody.items()}
    after = await _groups(running.home)
    looking.cancel()
    await asyncio.wait({looking})
    await asyncio.sleep(0.2)  # the last acknowledgements
    hops, beside = waterfall(SamplingClient.seen.values(), await _spans(running.home))
    groups = {name: after[name] - before[name] for name in after}
    total = sum(writer.values())
    return {
        "sessions": sessions,
        "streams": streams,
        "turns_per_s": result.rate,
        "p50_ms": load.percentile(result.latencies, 50),
        "errors": result.errors,
        "groups_per_s": groups["items_count"] / wall_s,
        "items_per_group": groups["items_sum"] / max(groups["items_count"], 1),
        "commit_ms": 1000 * groups["seconds_sum"] / max(groups["items_count"], 1),
        "cores": cores,
        "writer_in_postgres": {what: count / total for what, count in writer.most_common()},
        "hops": [_row(hop) for hop in hops],
        "beside": [_row(hop) for hop in beside],
    }


def _row(hop: Hop) -> dict[str, Any]:
    cuts = quantiles(hop.us, n=100, method="inclusive") if len(hop.us) > 1 else hop.us * 99
    return {"name": hop.name, "turns": len(hop.us), "mean_us": fmean(hop.us), "p50_us": cuts[49], "p99_us": cuts[98]}


def table(found: dict[str, Any]) -> str:
    """One shape's rows as text."""
    lines = [
        f"{found['sessions']} sessions over {found['streams']} streams: {found['turns_per_s']:.0f} turns/s,"
        f" p50 {found['p50_ms']:.2f} ms, {found['errors']} errors",
        f"group commit: {found['groups_per_s']:.0f} groups/s of {found['items_per_group']:.1f} items,"
        f" {found['commit_ms']:.2f} ms until the router has the answer; the writer in PostgreSQL: "
        + ", ".join(f"{what} {share:.0%}" for what, share in found["writer_in_postgres"].items() if share >= 0.005),
        f"cores in use: {sum(found['cores'].values()):.2f}; "
        + ", ".join(f"{name} {share:.2f}" for name, share in found["cores"].items() if share >= 0.01),
        f"{'hop':<28}{'p50 us':>9}{'p99 us':>9}{'mean us':>9}{'share':>7}{'turns':>7}",
    ]
    most = max((row["turns"] for row in found["hops"]), default=1)
    everything = sum(row["mean_us"] * row["turns"] for row in found["hops"]) or 1.0
    for row in found["hops"]:
        if row["turns"] >= most * _RARE:
            share = row["mean_us"] * row["turns"] / everything
            lines.append(_line(row) + f"{share:>7.1%}{row['turns']:>7}")
    shown = sum(row["mean_us"] * row["turns"] for row in found["hops"] if row["turns"] >= most * _RARE)
    lines.append(f"{'all rows':<28}{'':>9}{'':>9}{shown / most:>9.0f}")
    lines += ["beside:", *(_line(row) for row in found["beside"])]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    return f"{row['name']:<28}{row['p50_us']:>9.0f}{row['p99_us']:>9.0f}{row['mean_us']:>9.0f}"


async def _run(shapes: list[tuple[int, int]], seconds: float, model: str, say: Callable[[str], None]) -> list[Any]:
    running = await stack.start()
    try:
        await running.agent("echo", model)
        found = []
        for number, (sessions, streams) in enumerate(shapes):
            found.append(await measure(running, sessions, streams, seconds, 1.0 if number else 3.0))
            say(table(found[-1]) + "\n")
        return found
    finally:
        await stack.stop(running)


def main(arguments: list[str], say: Callable[[str], None]) -> bool:
    """Measures and prints; True if every turn was answered."""
    parser = argparse.ArgumentParser(prog="tests.bench waterfall", description=__doc__)
    parser.add_argument("--shapes", default="1/1,64/4,64/64", help="sessions/streams, separated by commas")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--model", default="echo/echo")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    shapes = [(int(a), int(b)) for a, b in (shape.split("/") for shape in options.shapes.split(","))]
    found = uvloop.run(_run(shapes, options.seconds, options.model, say))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return not any(shape["errors"] for shape in found)


if __name__ == "__main__":
    import sys

    sys.exit(0 if main(sys.argv[1:], print) else 1)
