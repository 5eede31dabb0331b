"""The life of a service process: start, run, stop in order, always within a bounded time.

`run_service` gives the service's `main` a `Lifecycle`. While starting, `main` registers a stop step for each part
right after that part has started; on SIGTERM or SIGINT the steps run in reverse: what started last (the intake) stops
first, what everything else stands on (connections, logs) stops last. A second signal ends the process at once.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
import uvloop

from soma_common.enums import keep_enum_values
from soma_common.failpoints import arm_failpoints
from soma_common.settings import EXIT_BAD_SETTINGS, ServiceSettings, StartRefused
from soma_common.telemetry.logging import setup_logging

EXIT_CRASHED = 1
"""Exit code when a critical task ended or a stop step failed to: the supervisor starts the process again."""

LAST_BREATH_S = 1.0
"""What the interpreter has for its own end after the last stop step."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _StopStep:
    name: str
    run: Callable[[], Awaitable[object]]
    timeout_s: float


class Lifecycle:
    """What a service's `main` uses to say what runs and how it stops. Belongs to one event loop."""

    def __init__(self, stop_timeout_s: float = 8.0) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._steps: list[_StopStep] = []
        self._tasks: set[asyncio.Task[object]] = set()
        self._stop_asked = asyncio.Event()
        self._ready = False
        self.exit_code = 0
        """Exit code of the process: 0 after a signal, 1 after a crash."""

    @property
    def stopping(self) -> bool:
        """True from the first stop signal or crash on."""
        return self._stop_asked.is_set()

    def on_stop(self, name: str, step: Callable[[], Awaitable[object]], timeout_s: float = 5.0) -> None:
        """Register a stop step. Steps run once each, last registered first; one that overruns is logged and cut off."""
        self._steps.append(_StopStep(name, step, timeout_s))

    def spawn(self, name: str, work: Coroutine[Any, Any, object], *, critical: bool = True) -> asyncio.Task[object]:
        """Run `work` as a background task and return the task.

        A critical task that fails, or returns before the stop, takes the process down with exit code 1; a failed
        task that is not critical is logged. Whoever needs it to end at a certain point registers a stop step that
        cancels it; what is left is cancelled after the last step.
        """
        task: asyncio.Task[object] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._task_ended(done, critical))
        return task

    def request_stop(self, reason: str, exit_code: int = 0) -> None:
        """Begin the shutdown; the first request's reason is logged, a later one can only raise the exit code."""
        self.exit_code = max(self.exit_code, exit_code)
        if not self._stop_asked.is_set():
            _log.info("service.stopping", reason=reason)
            self._stop_asked.set()

    async def wait_stop(self) -> None:
        """Return when the shutdown begins."""
        await self._stop_asked.wait()

    def ready(self, **facts: object) -> None:
        """Log the line `service.ready` with `facts` (addresses) that the supervisor waits for. Only the first call
        counts."""
        if self._ready or self.stopping:
            return
        self._ready = True
        # What exists now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        _log.info("service.ready", pid=os.getpid(), **facts)

    async def stop(self) -> None:
        """Run the stop steps and cancel what still runs, within the time limit. Safe to call again: steps run once."""
        self._stop_asked.set()
        deadline = time.monotonic() + self._stop_timeout_s
        while self._steps:
            await self._run_step(self._steps.pop(), deadline)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=max(0.1, deadline - time.monotonic()))
            for task in left:
                _log.error("service.task_would_not_stop", task=task.get_name())

    async def _run_step(self, step: _StopStep, deadline: float) -> None:
        allowed_s = min(step.timeout_s, deadline - time.monotonic())
        if allowed_s <= 0:
            _log.error("service.stop_step_skipped", step=step.name, why="the time for the whole shutdown is over")
            return
        started = time.monotonic()
        try:
            async with asyncio.timeout(allowed_s):
                await step.run()
        except TimeoutError:
            _log.error("service.stop_step_cut_off", step=step.name, after_s=round(allowed_s, 3))
        except Exception:  # noqa: BLE001 - boundary: one failing step must not keep the next from running
            _log.exception("service.stop_step_failed", step=step.name)
        else:
            _log.debug("service.stop_step_done", step=step.name, took_s=round(time.monotonic() - started, 3))

    def _task_ended(self, task: asyncio.Task[object], critical: bool) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            if critical and not self.stopping:
                self.request_stop(f"critical task {task.get_name()} was cancelled", EXIT_CRASHED)
            return
        error = task.exception()
        if error is not None:
            _log.error("service.task_failed", task=task.get_name(), critical=critical, exc_info=error)
        if critical and not self.stopping:
            self.request_stop(f"critical task {task.get_name()} ended", EXIT_CRASHED)


def run_service(main: Callable[[Lifecycle], Awaitable[None]], settings: ServiceSettings) -> None:
    """Run a service until a signal or a crash ends it, then exit the process with the fitting code.

    `main` starts everything and returns (or waits for `Lifecycle.wait_stop`); the process lives on until it is told
    to stop. An exception from `main` is a failed start: it is logged and the exit code is 1, or 2 for a StartRefused,
    which no restart helps.
    """
    logs = setup_logging(settings.service, settings.service_instance, settings.log_file, settings.log_level)
    try:
        arm_failpoints(settings.failpoints)
        keep_enum_values()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            exit_code = runner.run(_live(main, settings.stop_timeout_s))
    finally:
        logs.close()
    raise SystemExit(exit_code)


async def _live(main: Callable[[Lifecycle], Awaitable[None]], stop_timeout_s: float) -> int:
    lifecycle = Lifecycle(stop_timeout_s)
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, _on_signal, lifecycle, number)
    loop.set_exception_handler(_log_loop_error)
    start = asyncio.ensure_future(main(lifecycle))
    stop_asked = asyncio.create_task(lifecycle.wait_stop())
    try:
        await asyncio.wait({start, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
        if start.done() and not lifecycle.stopping:
            start.result()
            lifecycle.ready()
            await stop_asked
    except StartRefused as refusal:
        _log.error("service.start_refused", why=str(refusal))
        sys.stderr.write(f"{refusal}\n")  # To the console, too, as load_settings does.
        lifecycle.request_stop("the start was refused", EXIT_BAD_SETTINGS)
    except Exception:  # noqa: BLE001 - boundary: the process's last word on a start that failed
        _log.exception("service.start_failed")
        lifecycle.request_stop("the start failed", EXIT_CRASHED)
    finally:
        start.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await start
        await lifecycle.stop()
        stop_asked.cancel()
        _log.info("service.stopped", exit_code=lifecycle.exit_code)
        _end_within(LAST_BREATH_S, lifecycle.exit_code)
    return lifecycle.exit_code


def _end_within(seconds: float, exit_code: int) -> None:
    """End the process even if a thread or a task refuses to: the interpreter would wait for both for minutes."""
    watchdog = threading.Timer(seconds, os._exit, (exit_code,))
    watchdog.daemon = True
    watchdog.start()


def _on_signal(lifecycle: Lifecycle, number: signal.Signals) -> None:
    if lifecycle.stopping:
        os._exit(128 + number)
    lifecycle.request_stop(number.name)


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    logging.getLogger("asyncio").error(
        context.get("message", "error in the event loop"), exc_info=context.get("exception")
    )
