"""One story out of log files of three formats."""

import json
from pathlib import Path

import pytest

from somastack.story import Line, Source, Story, Tail, read_line, worth_telling
from somastack.terminal import render_line

NATS = "[77] 2026/11/20 10:46:45.945879 [INF] Listening for client connections on 127.0.0.1:7450"


def test_a_line_of_ours() -> None:
    record = {
        "ts": "2026-11-20T10:46:45.945879Z",
        "level": "warning",
        "event": "part.restarting",
        "part": "router-0",
        "service": "supervisor",
        "instance": "supervisor",
        "delay_s": 0.2,
        "empty": "",
    }
    line = read_line("supervisor", json.dumps(record))
    assert line == Line("router-0", "part.restarting", "warning", "10:46:45.945", {"delay_s": "0.2"})


def test_a_line_of_nats() -> None:
    line = read_line("nats", NATS)
    assert (line.who, line.level, line.time, line.of_server) == ("nats", "info", "10:46:45.945", True)
    assert line.event == "Listening for client connections on 127.0.0.1:7450"


@pytest.mark.parametrize(
    ("severity", "state", "level"),
    [("LOG", None, "info"), ("ERROR", "42P01", "error"), ("FATAL", "57P03", "info"), ("FATAL", "28000", "error")],
)
def test_a_line_of_postgres(severity: str, state: str | None, level: str) -> None:
    record = {"timestamp": "2026-11-20 10:46:45.945 UTC", "error_severity": severity, "message": "said"}
    line = read_line("postgres", json.dumps({**record, "state_code": state} if state else record))
    assert (line.event, line.level, line.time) == ("said", level, "10:46:45.945")


@pytest.mark.parametrize("raw", ["Traceback (most recent call last):", "{not json", "[1] strange"])
def test_any_other_line_is_told_as_it_stands(raw: str) -> None:
    assert read_line("router-0", raw) == Line("router-0", raw)


def test_the_console_hears_of_the_servers_only_their_troubles() -> None:
    assert worth_telling(Line("router-0", "service.ready"))
    assert not worth_telling(Line("router-0", "detail", "debug"))
    assert not worth_telling(Line("router-0", "router.lane_attached"))
    assert worth_telling(Line("router-0", "router.lane_attached", "warning"))
    assert not worth_telling(read_line("nats", NATS))
    assert worth_telling(read_line("nats", NATS.replace("INF", "ERR")))


def test_long_values_are_cut_and_markup_is_text() -> None:
    shown = render_line(Line("gateway-0", "[bold]event[/]", facts={"why": "x" * 500})).plain
    assert "[bold]event[/]" in shown
    assert "[truncated]" in shown
    assert len(shown) < 300


class TestTail:
    """Reading what is added to a file that may be replaced."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "router-0.log"

    @staticmethod
    def tail(path: Path, *, from_start: bool = False) -> Tail:
        return Tail(Source("router-0", lambda: path if path.exists() else None), from_start=from_start)

    @staticmethod
    def events(tail: Tail) -> list[str]:
        return [line.event for line in tail.read()]

    def test_only_what_is_new_and_complete(self, path: Path) -> None:
        path.write_text("old\n")
        tail = self.tail(path)
        assert self.events(tail) == []
        with path.open("a") as file:
            file.write("one\ntw")
            file.flush()
            assert self.events(tail) == ["one"]
            file.write("o\n")
        assert self.events(tail) == ["two"]

    def test_from_the_start_when_asked(self, path: Path) -> None:
        path.write_text("old\n")
        assert self.events(self.tail(path, from_start=True)) == ["old"]

    def test_a_file_that_appears_later_is_read_whole(self, path: Path) -> None:
        tail = self.tail(path)
        assert self.events(tail) == []
        path.write_text("first\n")
        assert self.events(tail) == ["first"]

    def test_a_rotated_file_loses_nothing(self, path: Path) -> None:
        path.write_text("one\n")
        tail = self.tail(path, from_start=True)
        assert self.events(tail) == ["one"]
        with path.open("a") as file:
            file.write("two\n")
        path.rename(path.with_name("router-0.log.1"))
        path.write_text("three\n")
        assert self.events(tail) == ["two", "three"]


def test_a_held_story_tells_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "supervisor.log"
    path.write_text("")
    told: list[str] = []
    story = Story([Tail(Source("supervisor", lambda: path))], lambda line: told.append(line.event))
    with story.hold():
        path.write_text("meanwhile\n")
        story.catch_up()
        assert told == []
    assert told == ["meanwhile"]
