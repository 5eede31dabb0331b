"""Tables for people, JSON for programs."""

import json

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from soma.router.v1.session_service_pb2 import Session

from somastack.tables import as_block, as_table, at, between, lasting, one_line, print_json, print_json_line, since


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [
        (-5, "0.0 s"),
        (0, "0.0 s"),
        (650, "0.6 s"),
        (9_999, "9.9 s"),
        (10_000, "10 s"),
        (119_000, "1 min"),
        (3_600_000, "1 h"),
        (90_000_000, "1 d"),
    ],
)
def test_durations(milliseconds: float, shown: str) -> None:
    assert lasting(milliseconds) == shown


def test_moments_that_have_not_been_are_shown_as_nothing() -> None:
    assert (at(Timestamp()), since(Timestamp())) == ("-", "-")
    assert at(Timestamp(seconds=1_900_000_000)) == "2030-03-17T17:46:40Z"
    assert between(Timestamp(seconds=5), Timestamp(seconds=7)) == "2.0 s"


def test_columns_are_as_wide_as_what_stands_in_them() -> None:
    lines = [line.plain for line in as_table(("session", "queue"), [("a-long-name", "3"), ("b", "")])]
    assert lines == ["session      queue", "a-long-name  3", "b"]
    assert [line.plain for line in as_table(("session", "queue"), [])] == ["session  queue"]


def test_a_block_leaves_out_what_is_not_there() -> None:
    lines = [line.plain for line in as_block([("turn", "x"), ("error", ""), ("ended", "-")])]
    assert lines == ["turn   x"]


def test_what_would_act_on_a_terminal_is_shown_instead() -> None:
    assert one_line("a\x1b[31mb\nc\td\x07") == "a\N{REPLACEMENT CHARACTER}[31mb c d\N{REPLACEMENT CHARACTER}"
    assert len(one_line("word " * 100)) == 60


def test_json_has_the_fields_that_are_not_set_too(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"session": Session(name="a:smile:b"), "messages": []})
    shown = json.loads(capsys.readouterr().out)
    assert shown["messages"] == []
    assert (shown["session"]["name"], shown["session"]["paused"]) == ("a:smile:b", False)


def test_json_of_a_stream_is_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a\nb", "ü"):
        print_json_line(Session(name=name))
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"name": "a\nb"}, {"name": "ü"}]
