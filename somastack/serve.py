"""Serving a stack: in the foreground, or detached from the terminal with its story in the log files only.

`python -m somastack.serve` is the detached supervisor; `somastack up --detach` starts it.
"""

import argparse
import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from soma_common.embedded.process import PartFailed, open_private
from soma_common.telemetry.logging import setup_logging
from somastack.home import Home
from somastack.layout import DEFAULT_BASE, Layout
from somastack.state import Phase, StackState
from somastack.story import SUPERVISOR
from somastack.supervisor import StackOptions, Supervisor, running_stack

DETACHED_READY_TIMEOUT_S = 180.0
POLL_S = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_AT_ONCE = 130
MANY_FILES = 10_240
"""The most that macOS allows a process; plenty for a stack on one machine."""

_log = structlog.get_logger()

WhenReady = Callable[[Supervisor], Awaitable[None]]


async def serve(options: StackOptions, when_ready: WhenReady | None = None) -> None:
    """Run a stack until SIGINT, SIGTERM or SIGHUP, then stop it in order. `when_ready` runs once, while it serves.

    A second signal ends this process at once: its children follow by themselves, and the next start recovers.

    Raises:
        PartFailed: the stack could not start, or `when_ready` failed; everything is stopped again.
    """
    os.umask(0o077)  # Whatever is written from here on is ours alone.
    options.home.make()
    _allow_many_files()
    logs = setup_logging(SUPERVISOR, SUPERVISOR, options.home.logs / f"{SUPERVISOR}.log")
    work = asyncio.create_task(_run(options, when_ready))
    asked: list[int] = []

    def stop(number: int) -> None:
        if asked:
            os._exit(EXIT_AT_ONCE)
        asked.append(number)
        _log.info("stack.stopping", why=signal.Signals(number).name)
        work.cancel()

    loop = asyncio.get_running_loop()
    # A signal that is ignored stays so: `nohup somastack up` outlives its terminal.
    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heeded:
        loop.add_signal_handler(number, stop, number)
    try:
        await work
    except asyncio.CancelledError:
        if not asked:
            raise
    except PartFailed as failure:
        _log.error("stack.failed", why=failure.message, advice=failure.advice)
        raise
    finally:
        for number in heeded:
            loop.remove_signal_handler(number)
        logs.close()


async def _run(options: StackOptions, when_ready: WhenReady | None) -> None:
    async with running_stack(options) as stack:
        if when_ready is not None:
            await when_ready(stack)
        await stack.watch()


def _allow_many_files() -> None:
    """Raise our limit of open files, which the children inherit: a stream is a file, and shells allow as few as 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def start_detached(options: StackOptions) -> "subprocess.Popen[bytes]":
    """Start a supervisor that outlives this process and its terminal."""
    options.home.make()
    arguments = ["--home", options.home.path, "--port-base", options.layout.base]
    for service, count in options.layout.replicas.items():
        arguments += ["--replicas", f"{service}={count}"]
    with open(options.home.logs / f"{SUPERVISOR}.out", "wb", opener=open_private) as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "somastack.serve", *(str(argument) for argument in arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


async def until_ready(home: Home, supervisor: "subprocess.Popen[bytes]") -> StackState:
    """Wait until the detached `supervisor` says that its stack is ready.

    Raises:
        PartFailed: it ended, or did not get ready in time.
    """
    deadline = time.monotonic() + DETACHED_READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if supervisor.poll() is not None:
            said = (home.logs / f"{SUPERVISOR}.out").read_text(encoding="utf-8", errors="replace").strip()
            message, _, advice = said.rpartition(" -> ")
            raise PartFailed(message or "the supervisor ended", advice or f"read {home.logs / SUPERVISOR}.log")
        state = StackState.load(home.state_file)
        if state is not None and state.supervisor.pid == supervisor.pid and state.phase is Phase.READY:
            return state
        await asyncio.sleep(POLL_S)
    raise PartFailed(f"not ready within {DETACHED_READY_TIMEOUT_S:.0f} s", f"look: {home.command('status')}")


def replicas_from(texts: list[str]) -> dict[str, int]:
    """Read `router=3,gateway=2` (any number of them) into a mapping.

    Raises:
        PartFailed: one is not of this form.
    """
    replicas: dict[str, int] = {}
    for item in (item.strip() for text in texts for item in text.split(",")):
        service, _, count = item.partition("=")
        if not count.isdigit():
            raise PartFailed(f"{item!r} is not SERVICE=COUNT", "write for example --replicas router=2")
        replicas[service] = int(count)
    return replicas


def main() -> int:
    """Serve detached; the exit code is 1 when the stack could not start (the reason is on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m somastack.serve", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port-base", type=int, default=DEFAULT_BASE)
    parser.add_argument("--replicas", action="append", default=[])
    given = parser.parse_args()
    try:
        layout = Layout(given.port_base, replicas_from(given.replicas))
        asyncio.run(serve(StackOptions(Home(given.home), layout)))
    except PartFailed as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
