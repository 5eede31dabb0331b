"""The choice among builds of one Python version. The others are scripts that say what a build would say."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tools.python_builds import Build, faster_build, told_by

NAME = f"python{sys.version_info[0]}.{sys.version_info[1]}"
SAME = ".".join(map(str, sys.version_info[:3]))
FAST_MS, SLOW_MS = 1e-6, 1e9


def put(folder: Path, script: str) -> Path:
    """An executable of the name that is looked for."""
    folder.mkdir(exist_ok=True)
    file = folder / NAME
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def saying(folder: Path, *, version: str = SAME, loop_ms: float = FAST_MS, usable: bool = True) -> Path:
    """A build that says this of itself."""
    said = json.dumps(asdict(Build(str(folder / NAME), version, loop_ms, usable)))
    return put(folder, f"echo '{said}'")


def test_an_interpreter_tells_of_itself() -> None:
    build = told_by(sys.executable)
    assert build is not None
    assert (build.executable, build.version) == (sys.executable, SAME)
    assert build.loop_ms > 0
    assert build.usable is (sys.prefix == sys.base_prefix)


def test_a_much_faster_build_is_found_wherever_it_is(tmp_path: Path) -> None:
    for number in range(3):
        saying(tmp_path / str(number), loop_ms=FAST_MS * abs(number - 1) + FAST_MS)
    found = faster_build(os.pathsep.join(str(tmp_path / str(number)) for number in range(3)))
    assert found is not None
    build, times = found
    assert build.executable == str(tmp_path / "1" / NAME)
    assert times > 1000


@pytest.mark.parametrize("patch", [0, 99], ids=["older", "newer"])
def test_another_patch_release_may_take_its_place(tmp_path: Path, patch: int) -> None:
    saying(tmp_path, version=f"{sys.version_info[0]}.{sys.version_info[1]}.{patch}")
    assert faster_build(str(tmp_path)) is not None


def test_a_time_that_something_disturbed_does_not_decide(tmp_path: Path) -> None:
    build = Build(str(tmp_path / NAME), SAME, FAST_MS, usable=True)
    fast, slow = json.dumps(asdict(build)), json.dumps(asdict(replace(build, loop_ms=SLOW_MS)))
    asked = tmp_path / "asked"
    put(tmp_path, f"[ -e {asked} ] && echo '{fast}' || echo '{slow}'; touch {asked}")
    found = faster_build(str(tmp_path))
    assert found is not None
    assert found[0] == build


@pytest.mark.parametrize(
    "script",
    ["exit 1", "echo no JSON", "echo '[]'", "echo '{}'"],
    ids=["fails", "says no JSON", "says a list", "says nothing"],
)
def test_what_does_not_answer_is_passed_over(tmp_path: Path, script: str) -> None:
    put(tmp_path / "broken", script)
    assert faster_build(str(tmp_path / "broken")) is None


def test_no_other_version_no_slower_one_and_none_without_environments(tmp_path: Path) -> None:
    major, minor = sys.version_info[:2]
    saying(tmp_path / "other", version=f"{major}.{minor + 1}.0")
    saying(tmp_path / "slow", loop_ms=SLOW_MS)
    saying(tmp_path / "bare", usable=False)
    folders = [str(tmp_path / name) for name in ("other", "slow", "bare", "empty")]
    assert faster_build(os.pathsep.join([*folders, ""])) is None


def test_the_interpreter_that_asks_is_not_another_build(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(sys.executable)
    assert faster_build(str(tmp_path)) is None
