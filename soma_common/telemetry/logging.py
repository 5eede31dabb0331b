"""JSON log lines that never hold up the event loop.

A line is made on the calling thread and handed to a writer thread through a bounded queue; when the disk is slower
than the logging, lines are dropped and counted, and the next line that gets through says how many. The standard
library's loggers (grpc, nats, asyncio) end in the same place.

Each line: ts (UTC, ISO 8601), level, service, instance, event, logger, tenant and trace_id where there are any, and
the facts given. Secrets are redacted and long values cut (redaction.py).
"""

import atexit
import logging
import os
import sys
import threading
from collections.abc import MutableMapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, Final

import orjson
import structlog

from soma_common.telemetry.metrics import counter
from soma_common.telemetry.redaction import clean_event
from soma_common.telemetry.trace import current_trace

QUEUE_LINES: Final = 10_000
"""Lines that may wait for the writer before new ones are dropped."""
MAX_FILE_BYTES: Final = 32 * 1024 * 1024
"""A log file of this size is moved to `<file>.1` and a new one begun."""
KEPT_FILES: Final = 3
"""Old log files kept beside the present one."""

_DROPPED = counter("soma_log_lines_dropped_total", "Log lines dropped because the writer could not keep up.")
_LEADING_KEYS = ("ts", "level", "service", "instance", "event")
_NOISY_LOGGERS = ("asyncio", "grpc", "nats", "httpx", "httpx2", "openai")


class LogWriter:
    """Writes lines to a file (rotated) or to standard error from its own thread. `offer` never blocks."""

    def __init__(
        self,
        path: Path | None,
        *,
        queue_lines: int = QUEUE_LINES,
        max_bytes: int = MAX_FILE_BYTES,
        kept: int = KEPT_FILES,
    ) -> None:
        self._path, self._queue_lines, self._max_bytes, self._kept = path, queue_lines, max_bytes, kept
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._dropped = 0
        self._closed = False
        self._size = 0
        self._out = self._open()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def offer(self, line: bytes) -> None:
        """Queue one line (with its newline), or drop and count it when the queue is full."""
        if self._closed:
            return
        if self._queue.qsize() >= self._queue_lines:
            self._dropped += 1
            _DROPPED.inc()
            return
        if self._dropped:
            count, self._dropped = self._dropped, 0
            self._queue.put(orjson.dumps({"level": "warning", "event": "log.lines_dropped", "count": count}) + b"\n")
        self._queue.put(line)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is queued and stop; lines offered later are lost."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._write(line)
            except OSError:
                _DROPPED.inc()  # A full disk must not end the writer: later lines may fit again.
        if self._path is not None:
            self._out.close()

    def _write(self, line: bytes) -> None:
        self._out.write(line)
        self._size += len(line)
        if self._queue.empty():
            self._out.flush()
        if self._path is not None and self._size >= self._max_bytes:
            self._rotate(self._path)

    def _rotate(self, path: Path) -> None:
        self._out.close()
        for number in range(self._kept, 0, -1):
            older = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{number}"))
        self._out = self._open()

    def _open(self) -> BinaryIO:
        if self._path is None:
            return sys.stderr.buffer
        self._path.parent.mkdir(parents=True, exist_ok=True)
        out = self._path.open("ab")
        self._size = os.fstat(out.fileno()).st_size
        return out


def setup_logging(service: str, instance: str, log_file: Path | None = None, level: str = "info") -> LogWriter:
    """Send all log lines of the process to `log_file` (or standard error) and return the writer to close at the end.

    `level` is `debug`, `info`, `warning` or `error`. Call it once, before anything logs.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    writer = LogWriter(log_file)
    atexit.register(writer.close)

    def add_origin(logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"], event["instance"] = service, instance
        event.setdefault("logger", getattr(logger, "name", ""))
        if (trace := current_trace()) is not None:
            event.setdefault("trace_id", trace.trace_id)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        add_origin,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        clean_event,
    ]
    structlog.configure(
        processors=[*shared, _to_line],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *names: _QueueLogger(writer, *names),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_StdlibHandler(writer, shared)]
    root.setLevel(number)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    return writer


def _to_line(_logger: object, _method: str, event: MutableMapping[str, Any]) -> bytes:
    # What a reader looks for first comes first.
    line = {key: event.pop(key) for key in _LEADING_KEYS if key in event}
    line.update(event)
    return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE)


class _QueueLogger:
    """The end of structlog's chain: every level hands the finished line to the writer."""

    def __init__(self, writer: LogWriter, name: str = "") -> None:
        self.name = name
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = self.msg = writer.offer


class _StdlibHandler(logging.Handler):
    """Takes the standard library's records through the same processors into the same file."""

    def __init__(self, writer: LogWriter, processors: list[structlog.typing.Processor]) -> None:
        super().__init__()
        self._writer, self._processors = writer, processors

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event: Any = {"event": record.getMessage(), "logger": record.name, "exc_info": record.exc_info}
            for processor in self._processors:
                event = processor(None, record.levelname.lower(), event)
            self._writer.offer(_to_line(None, "", event))
        except Exception:  # noqa: BLE001 - boundary: a bad log call must not break its caller
            self.handleError(record)
