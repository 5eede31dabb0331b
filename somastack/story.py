"""One readable story out of many log files: the console of `somastack up` and the output of `somastack logs`.

Three formats are read: the JSON lines of our own processes, PostgreSQL's JSON lines, and the text lines of NATS. A line
in none of them (a traceback, a library's print) is told as it stands.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soma_common.telemetry.redaction import TRUNCATED
from somastack.home import Home

SUPERVISOR = "supervisor"
POLL_S = 0.1
MAX_VALUE_CHARS = 160
"""Longest value shown of a fact; the file has the whole."""
EMOJI = {
    SUPERVISOR: "🎬",
    "gateway": "🚪",
    "router": "🧭",
    "cognition": "🧠",
    "toolgw": "🔧",
    "controlplane": "📋",
    "nats": "📮",
    "postgres": "🐘",
}
LEVEL_STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red"}
_UNTOLD = frozenset({"ts", "level", "service", "instance", "event", "logger", "part", "trace_id"})
_NATS_LINE = re.compile(r"^\[\d+\] (?P<date>[\d/]+) (?P<time>[\d:.]+) \[(?P<level>\w+)\] (?P<text>.*)$")
_NATS_LEVELS = {"WRN": "warning", "ERR": "error", "FTL": "error", "DBG": "debug", "TRC": "debug"}
_POSTGRES_LEVELS = {"WARNING": "warning", "ERROR": "error", "FATAL": "error", "PANIC": "error"}
_DETAILS = frozenset({"router.lane_attached"})
"""Events that come many times at each start and say nothing to who only looks on."""
_POSTGRES_EXPECTED = frozenset({"57P01", "57P03"})
"""SQLSTATEs that every start and stop shows: cut off by the shutdown, and still starting up."""


@dataclass(frozen=True)
class Line:
    """One line of the story."""

    who: str
    """The part it is about: `router-0`, `nats` ..."""
    event: str
    level: str = "info"
    time: str = ""
    """Time of day, UTC, milliseconds; empty when the line did not say."""
    facts: Mapping[str, str] = field(default_factory=dict)
    of_server: bool = False
    """Written by NATS or PostgreSQL themselves."""

    @property
    def told(self) -> str:
        """Event and facts in plain words, each fact cut to a line."""
        return "  ".join([self.event, *(f"{name}={cut(value)}" for name, value in self.facts.items())])


def cut(value: str) -> str:
    """One line of bounded length; of several lines the last, which in a traceback says what happened."""
    first, *others = value.strip().splitlines() or [""]
    value = f"... {others[-1]}" if others else first
    return value if len(value) <= MAX_VALUE_CHARS else value[:MAX_VALUE_CHARS] + TRUNCATED


def read_line(source: str, raw: str) -> Line:
    """Understand one line of the log of `source`."""
    if raw.startswith("{"):
        try:
            record = json.loads(raw)
        except ValueError:
            return Line(source, raw)
        return _postgres(record) if "error_severity" in record else _ours(source, record)
    if match := _NATS_LINE.match(raw):
        return Line(source, match["text"], _NATS_LEVELS.get(match["level"], "info"), match["time"][:12], of_server=True)
    return Line(source, raw)


def _ours(source: str, record: dict[str, Any]) -> Line:
    level = str(record.get("level", "info"))
    facts = {name: str(value) for name, value in record.items() if name not in _UNTOLD and value not in ("", None)}
    return Line(
        who=str(record.get("part") or record.get("instance") or source),
        event=str(record.get("event", "")),
        level=level if level in LEVEL_STYLES else "error",
        time=_time_of_day(str(record.get("ts", ""))),
        facts=facts,
    )


def _postgres(record: dict[str, Any]) -> Line:
    expected = record.get("state_code") in _POSTGRES_EXPECTED
    level = "info" if expected else _POSTGRES_LEVELS.get(str(record["error_severity"]), "info")
    told: tuple[str, ...] = ("user", "detail", "hint", "statement")
    facts = {name: str(record[name]) for name in told if name in record}
    time = _time_of_day(str(record.get("timestamp", "")))
    return Line("postgres", str(record.get("message", "")), level, time, facts, of_server=True)


def _time_of_day(timestamp: str) -> str:
    return timestamp[11:23].rstrip("Z+") if len(timestamp) > 19 else ""


@dataclass(frozen=True)
class Source:
    """The log of one part, which may be a sequence of files."""

    who: str
    newest: Callable[[], Path | None]
    """The file written to now; None while there is none."""


def sources(home: Home, parts: Iterable[str]) -> list[Source]:
    """The logs of `parts` (instances, `nats`, `postgres`, `supervisor`) in `home`."""
    return [Source(part, _newest_file(home, part)) for part in parts]


def _newest_file(home: Home, part: str) -> Callable[[], Path | None]:
    if part == "postgres":
        # One file per weekday.
        return lambda: max((home.postgres / "log").glob("*.json"), key=lambda path: path.stat().st_mtime, default=None)
    path = home.nats / "nats.log" if part == "nats" else home.logs / f"{part}.log"
    return lambda: path if path.exists() else None


class Tail:
    """What is added to one log, across its rotations."""

    def __init__(self, source: Source, *, from_start: bool = False) -> None:
        self._source = source
        self._path: Path | None = None
        self._inode = 0
        self._position = 0
        self._time = ""
        if not from_start:
            self._path = source.newest()
            if self._path is not None:
                status = self._path.stat()
                self._inode, self._position = status.st_ino, status.st_size

    def read(self) -> list[Line]:
        """The lines completed since the last call."""
        try:
            return self._read()
        except FileNotFoundError:
            return []  # Being rotated at this moment: the next call finds it.

    def _read(self) -> list[Line]:
        path = self._source.newest()
        if path is None:
            return []
        status = path.stat()
        lines: list[Line] = []
        if (path, status.st_ino) != (self._path, self._inode) or status.st_size < self._position:
            lines = self._rest_of_the_old()
            self._path, self._inode, self._position = path, status.st_ino, 0
        return lines + self._added_to(path)

    def _rest_of_the_old(self) -> list[Line]:
        """What was added to the file before it was moved away; it has another name beside the new one now."""
        old = self._path
        if old is None:
            return []
        moved = [path for path in old.parent.glob(f"{old.name}*") if path.stat().st_ino == self._inode]
        return [line for path in moved for line in self._added_to(path)]

    def _added_to(self, path: Path) -> list[Line]:
        if path.stat().st_size <= self._position:
            return []
        with open(path, "rb") as file:
            file.seek(self._position)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._position += len(complete)
        texts = complete.decode(errors="replace").splitlines()
        return [self._timed(read_line(self._source.who, text)) for text in texts if text.strip()]

    def _timed(self, line: Line) -> Line:
        """A line that does not say when it was written was written when the one before it was."""
        self._time = line.time or self._time
        return line if line.time else replace(line, time=self._time)


class Story:
    """Tells what is added to the logs from its making on, except while `hold` gives the console to somebody else."""

    def __init__(self, tails: Iterable[Tail], tell: Callable[[Line], None]) -> None:
        self._tails = list(tails)
        self._tell = tell
        self._held = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Tell nothing inside the block; what happens meanwhile is told after it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.catch_up()

    def catch_up(self) -> None:
        """Tell what is new. Lines of one log keep their order; those of several are told by their times."""
        if not self._held:
            gathered = [line for tail in self._tails for line in tail.read()]
            for line in sorted(gathered, key=lambda line: line.time):
                self._tell(line)

    async def run(self) -> None:
        """Go on telling; never ends."""
        while True:
            self.catch_up()
            await asyncio.sleep(POLL_S)


def worth_telling(line: Line) -> bool:
    """What belongs on the console: of our processes nearly everything from `info` on, of the servers only trouble."""
    if line.level in ("warning", "error"):
        return True
    return line.level == "info" and not line.of_server and line.event not in _DETAILS
