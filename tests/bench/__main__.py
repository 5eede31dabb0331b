"""`make bench`: turns per second, latencies, CPU and memory of the echo turn, beside what the machine's parts can do.

    python -m tests.bench [--quick] [--json FILE]
    python -m tests.bench fairness [--model echo/delay-20-60] [--brain-turns 32] [--rounds 3] [--turns 2000]
    python -m tests.bench frozen [--messages 100000]

The load client runs in this process, on the same two cores as the stack, and its CPU is in the table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from tests.bench import fairness, frozen_brain, limits, load, processes, stack

console = Console(width=150)


def main() -> None:
    """Runs the benchmark and prints its tables."""
    others = {"fairness": fairness.main, "frozen": frozen_brain.main}
    if len(sys.argv) > 1 and sys.argv[1] in others:
        sys.exit(0 if others[sys.argv[1]](sys.argv[2:], console.print) else 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two minutes instead of ten")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    results = uvloop.run(_measure(2.0 if arguments.quick else 5.0, 1 if arguments.quick else 3))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


async def _measure(seconds: float, rounds: int) -> dict[str, Any]:
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    console.print("starting a stack of its own ...")
    running = await stack.start()
    try:
        for name, model in (("echo", "echo/echo"), ("slow", "echo/delay-0-20"), ("clock", "echo/clock-40x20ms")):
            await running.agent(name, model)
        results: dict[str, Any] = {"limits": await _limits(running, seconds), "turns": [], "tokens": {}}
        for number in range(rounds):
            for agent, sessions, streams in (
                ("echo", 1, 1), ("echo", 16, 4), ("echo", 64, 4), ("echo", 64, 64), ("echo", 256, 4), ("slow", 64, 4),
            ):  # fmt: skip
                console.print(f"round {number + 1}/{rounds}: {agent}, {sessions} sessions over {streams} streams ...")
                results["turns"].append(await _turns(running, agent, sessions, streams, seconds))
        for streaming in (20, 500):
            console.print(f"live tokens: {streaming} streaming turns ...")
            seen = await load.turns(running, "clock", streaming, 4, max(seconds, 3.0), live=True, warm_s=2.0)
            results["tokens"][streaming] = {
                "tokens_per_s": len(seen.tokens) / seen.seconds,
                "p50_ms": load.percentile(seen.tokens, 50),
                "p99_ms": load.percentile(seen.tokens, 99),
                "errors": seen.errors,
            }
        results["pss_mb"] = {name: processes.pss_mb(pid) for name, pid in running.pids.items()}
    finally:
        await stack.stop(running)
    _print(results)
    return results


async def _limits(running: stack.Stack, seconds: float) -> dict[str, float]:
    console.print("the machine's limits: synced publish, gRPC echo ...")
    publish = await limits.synced_publish(running, seconds)
    echo = await limits.grpc_echo(seconds)
    return {
        "synced_publish_p50_ms": load.percentile(publish, 50),
        "synced_publish_p99_ms": load.percentile(publish, 99),
        "grpc_echo_p50_ms": load.percentile(echo, 50),
        "grpc_echo_p99_ms": load.percentile(echo, 99),
    }


async def _turns(running: stack.Stack, agent: str, sessions: int, streams: int, seconds: float) -> dict[str, Any]:
    everybody = {**running.pids, "client": os.getpid()}
    task = asyncio.create_task(load.turns(running, agent, sessions, streams, seconds))
    await asyncio.sleep(1.0)
    before = {name: processes.cpu_s(pid) for name, pid in everybody.items()}
    await asyncio.sleep(seconds)
    used = {name: processes.cpu_s(pid) - before[name] for name, pid in everybody.items()}
    result = await task
    thousands = max(result.turns, 1) / 1000
    return {
        "agent": agent,
        "sessions": sessions,
        "streams": streams,
        "turns_per_s": result.rate,
        "p50_ms": load.percentile(result.latencies, 50),
        "p99_ms": load.percentile(result.latencies, 99),
        "accept_p50_ms": load.percentile(result.accepts, 50),
        "accept_p99_ms": load.percentile(result.accepts, 99),
        "cpu_s_per_1000": sum(used.values()) / thousands,
        "cpu_by_process": {name: seconds_used / thousands for name, seconds_used in used.items()},
        "errors": result.errors,
    }


def _print(results: dict[str, Any]) -> None:
    table = Table(title="turns", show_lines=False)
    for column in ("brain", "sessions", "streams", "turns/s", "p50 ms", "p99 ms", "accept p50", "accept p99",
                   "CPU s/1000", "errors"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in sorted(results["turns"], key=lambda r: (r["agent"], r["sessions"], r["streams"])):
        table.add_row(
            row["agent"], str(row["sessions"]), str(row["streams"]), f"{row['turns_per_s']:.0f}",
            *(f"{row[key]:.2f}" for key in ("p50_ms", "p99_ms", "accept_p50_ms", "accept_p99_ms", "cpu_s_per_1000")),
            str(row["errors"]),
        )  # fmt: skip
    console.print(table)
    split = next((r for r in results["turns"] if r["agent"] == "echo" and r["sessions"] == 64), None)
    if split is not None:
        shares = ", ".join(f"{name} {value:.3f}" for name, value in split["cpu_by_process"].items())
        console.print(f"CPU seconds per 1000 turns, 64 sessions over {split['streams']} streams: {shares}")
    for streaming, seen in results["tokens"].items():
        console.print(
            f"live tokens, {streaming} streaming turns: {seen['tokens_per_s']:.0f}/s,"
            f" added p50 {seen['p50_ms']:.2f} ms, p99 {seen['p99_ms']:.2f} ms"
        )
    memory = results["pss_mb"]
    console.print(f"memory (PSS, MB): {sum(memory.values()):.0f} in all; "
                  + ", ".join(f"{name} {value:.0f}" for name, value in memory.items()))  # fmt: skip
    console.print("the machine: " + ", ".join(f"{name} {value:.2f}" for name, value in results["limits"].items()))


if __name__ == "__main__":
    main()
