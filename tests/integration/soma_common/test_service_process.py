"""A whole service process: its start, its admin port, its log, and every way it can end."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from soma_common.lifecycle import EXIT_CRASHED
from soma_common.settings import EXIT_BAD_SETTINGS
from soma_common.testing.embedded import FaultyPostgres
from soma_common.testing.eventually import eventually


class Process:
    """A running service and its log."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process, self._log = process, log

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def line(self, event: str) -> dict[str, Any] | None:
        return next((line for line in self.lines() if line["event"] == event), None)

    async def logged(self, event: str) -> dict[str, Any]:
        line = await eventually(lambda: self.line(event), 15, f"a log line {event}")
        assert line is not None
        return line

    async def ended(self, timeout_s: float = 10) -> int:
        return await asyncio.wait_for(self.process.wait(), timeout_s)

    async def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Return status and body of a request to the admin port."""
        port = (await self.logged("service.ready"))["admin_port"]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = (await reader.read()).decode()
        writer.close()
        head, _, body = answer.partition("\r\n\r\n")
        return int(head.split()[1]), body


Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Return a context manager that runs tests/integration/soma_common/probe_service.py with environment variables."""

    @asynccontextmanager
    async def run(**variables: str) -> AsyncIterator[Process]:
        log = tmp_path / "probe-0.log"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SOMA_")},
            "SOMA_SERVICE_INSTANCE": "probe-0",
            "SOMA_LOG_FILE": str(log),
            **variables,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.integration.soma_common.probe_service",
            env=environment,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            yield Process(process, log)
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    return run


async def test_it_starts_serves_and_stops_in_order(start: Start) -> None:
    async with start() as probe:
        ready = await probe.logged("service.ready")
        assert (ready["service"], ready["instance"], ready["level"]) == ("probe", "probe-0", "info")
        assert list(ready)[:5] == ["ts", "level", "service", "instance", "event"]
        probe.process.send_signal(signal.SIGTERM)
        assert await probe.ended() == 0
        steps = [line["step"] for line in probe.lines() if line["event"] == "probe.step"]
        assert steps == ["intake", "store"]
        assert probe.line("service.stopped") is not None
        stopping = probe.line("service.stopping")
        assert stopping is not None
        assert stopping["reason"] == "SIGTERM"


async def test_the_admin_port_tells_metrics_and_health(start: Start) -> None:
    async with start(PROBE_READY="store=1,bus=0") as probe:
        assert await probe.get("/health/live") == (200, "live\n")
        assert await probe.get("/health/ready") == (503, "not ready\n")
        status, body = await probe.get("/health?verbose")
        assert status == 503
        assert json.loads(body) == {
            "service": "probe",
            "instance": "probe-0",
            "ready": False,
            "components": {"store": True, "bus": False},
        }
        status, body = await probe.get("/metrics")
        assert status == 200
        assert "process_cpu_seconds_total" in body
        assert "soma_log_lines_dropped_total 0.0" in body
        assert (await probe.get("/nothing"))[0] == 404
        assert (await probe.get("/metrics", "POST"))[0] == 405
        assert await probe.get("/health/live", "HEAD") == (200, "")


async def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    async with start(PROBE_STOP_S="30") as probe:
        await probe.logged("service.ready")
        probe.process.send_signal(signal.SIGTERM)
        await probe.logged("service.stopping")
        probe.process.send_signal(signal.SIGINT)
        assert await probe.ended(2) == 128 + signal.SIGINT


async def test_a_stop_that_hangs_is_cut_off(start: Start) -> None:
    async with start(PROBE_STOP_S="30", SOMA_STOP_TIMEOUT_S="0.5") as probe:
        await probe.logged("service.ready")
        started = time.monotonic()
        probe.process.send_signal(signal.SIGTERM)
        await probe.ended(15)
        assert time.monotonic() - started < 10
        assert probe.line("service.stop_step_cut_off") is not None


async def test_a_thread_that_hangs_does_not_keep_it_alive(start: Start) -> None:
    async with start(PROBE_STUCK_THREAD="1") as probe:
        await probe.logged("service.ready")
        probe.process.send_signal(signal.SIGTERM)
        assert await probe.ended(4) == 0


async def test_a_crash_of_a_critical_task_ends_it_in_order(start: Start) -> None:
    async with start(PROBE_CRASH="1") as probe:
        assert await probe.ended() == EXIT_CRASHED
        failed = probe.line("service.task_failed")
        assert failed is not None
        assert "RuntimeError: the probe's task fails" in failed["exception"]
        assert probe.line("probe.step") is not None


async def test_a_failed_start_is_told(start: Start) -> None:
    async with start(PROBE_FAIL_START="1") as probe:
        assert await probe.ended() == EXIT_CRASHED
        failed = probe.line("service.start_failed")
        assert failed is not None
        assert "the probe cannot start" in failed["exception"]
        assert probe.line("service.ready") is None


async def test_a_refused_start_says_what_to_change_and_nothing_else(start: Start) -> None:
    async with start(PROBE_REFUSE_START="1") as probe:
        assert await probe.ended() == EXIT_BAD_SETTINGS
        assert await probe.process.stderr.read() == b"PROBE_REFUSE_START is set: unset it\n"
        refused = probe.line("service.start_refused")
        assert refused is not None
        assert refused["why"] == "PROBE_REFUSE_START is set: unset it"
        assert "exception" not in refused


async def test_a_start_waits_for_a_database_that_is_not_up_yet(start: Start, own_postgres: FaultyPostgres) -> None:
    await own_postgres.kill9()
    async with start(SOMA_POSTGRES_DSN=own_postgres.dsn()) as probe:
        waits = await probe.logged("service.start_waits")
        assert waits["level"] == "warning"
        assert waits["why"].startswith("the database does not answer")
        await own_postgres.restart()  # it recovers first
        await probe.logged("service.ready")
        probe.process.send_signal(signal.SIGTERM)
        assert await probe.ended() == 0


async def test_a_start_does_not_wait_for_ever(start: Start, tmp_path: Path) -> None:
    nowhere = f"postgresql:///soma?host={tmp_path}&port=5432&user=soma"
    async with start(SOMA_POSTGRES_DSN=nowhere, SOMA_START_PATIENCE_S="0.7") as probe:
        assert await probe.ended() == EXIT_CRASHED
        failed = probe.line("service.start_failed")
        assert failed is not None
        assert "the database does not answer" in failed["exception"]


async def test_a_signal_ends_the_waiting(start: Start, tmp_path: Path) -> None:
    async with start(SOMA_POSTGRES_DSN=f"postgresql:///soma?host={tmp_path}&port=5432&user=soma") as probe:
        await probe.logged("service.start_waits")
        probe.process.send_signal(signal.SIGTERM)
        assert await probe.ended(5) == 0


async def test_a_signal_during_the_start_ends_it(start: Start) -> None:
    async with start(PROBE_START_S="30") as probe:
        await probe.logged("probe.starting")
        probe.process.send_signal(signal.SIGTERM)
        assert await probe.ended(5) == 0


async def test_bad_settings_are_told_on_the_console(start: Start) -> None:
    async with start(SOMA_LOG_LEVEL="loud") as probe:
        assert await probe.ended() == 2
        assert b"SOMA_LOG_LEVEL" in await probe.process.stderr.read()


@pytest.mark.parametrize(("spec", "code"), [("probe.tick=kill", -signal.SIGKILL), ("probe.tick=raise@2", EXIT_CRASHED)])
async def test_failpoints_come_from_the_environment(start: Start, spec: str, code: int) -> None:
    async with start(SOMA_FAILPOINTS=spec) as probe:
        assert await probe.ended() == code
        assert probe.line("failpoint.hit") is not None


async def test_a_stopped_process_can_be_woken(start: Start) -> None:
    async with start(SOMA_FAILPOINTS="probe.tick=stop@3") as probe:
        await probe.logged("failpoint.hit")
        state = Path(f"/proc/{probe.process.pid}/stat")
        await eventually(lambda: state.read_text().split()[2] == "T", what="the process stands still")
        probe.process.send_signal(signal.SIGCONT)
        probe.process.send_signal(signal.SIGTERM)
        assert await probe.ended() == 0


async def test_other_libraries_logs_come_out_alike_and_clean(start: Start) -> None:
    async with start() as probe:
        line = await probe.logged("library says password=[redacted]")
        assert (line["level"], line["logger"], line["instance"]) == ("warning", "some.library", "probe-0")
        own = await probe.logged("probe.secret")
        assert own["token"] == "[redacted]"
        assert own["logger"] == "__main__"
