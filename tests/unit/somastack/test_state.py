"""The state file, and what `status` makes of it."""

import json
import os
import stat
from pathlib import Path

from soma_common.embedded.process import ProcessIdentity
from somastack.home import Home
from somastack.state import PartState, Phase, StackState
from somastack.status import as_json, exit_code


def stack(*parts: PartState) -> StackState:
    return StackState(Phase.READY, "2026-01-01T00:00:00.000Z", ProcessIdentity(1, "7"), 7400, list(parts))


ROUTER = PartState(
    "router-0", Phase.READY, "2026-01-01T00:00:00.000Z", ProcessIdentity(42, "9"), {"grpc": "127.0.0.1:7420"}, 2, "/log"
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = stack(ROUTER, PartState("nats"))
    state.save(tmp_path / "stack.json")
    assert StackState.load(tmp_path / "stack.json") == state
    assert stat.S_IMODE((tmp_path / "stack.json").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["stack.json"]


def test_a_strange_file_is_no_state(tmp_path: Path) -> None:
    file = tmp_path / "stack.json"
    assert StackState.load(file) is None
    for text in ("", "{}", "[1]", '{"format": 99}', '{"format": 1, "phase": "dancing"}'):
        file.write_text(text)
        assert StackState.load(file) is None, text


def test_status_names_every_component(tmp_path: Path) -> None:
    shown = as_json(Home(tmp_path), stack(ROUTER))
    assert json.loads(json.dumps(shown)) == shown
    assert shown["components"] == [
        {
            "name": "router-0",
            "pid": 42,
            "state": "ready",
            "since": "2026-01-01T00:00:00.000Z",
            "addresses": {"grpc": "127.0.0.1:7420"},
            "restarts": 2,
            "log": "/log",
            "trouble": "",
        }
    ]


def test_the_exit_code_tells_ready_from_not_ready_from_not_running() -> None:
    assert exit_code(stack(ROUTER)) == 0
    assert exit_code(stack(ROUTER, PartState("nats", Phase.RESTARTING))) == 1
    assert exit_code(None) == 3


def test_targets_are_the_addresses_of_all_replicas() -> None:
    second = PartState("router-1", addresses={"grpc": "127.0.0.1:7421"})
    assert stack(ROUTER, second).targets("router") == "127.0.0.1:7420,127.0.0.1:7421"
