"""What the gates say of tests that failed."""

import subprocess
import sys
from pathlib import Path

from tools import gates

FAILING = """
import pytest

def test_passes() -> None:
    pass

def test_fails() -> None:
    pytest.fail("\\n".join(f"line {number}" for number in range(200)))

@pytest.fixture
def broken() -> None:
    raise RuntimeError("no such thing")

@pytest.mark.parametrize("case", ["a"])
def test_has_no_fixture(broken: None, case: str) -> None:
    pass
"""


def test_failing_tests_are_told_with_what_they_found(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "deep"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(FAILING)
    report = tmp_path / "report.xml"
    options = ("--import-mode=importlib", f"--rootdir={tmp_path}", f"--junitxml={report}")
    subprocess.run([sys.executable, "-m", "pytest", *options, "tests"], cwd=tmp_path, capture_output=True, check=False)
    failures = dict(gates._failures(report))
    assert list(failures) == ["tests/deep/test_some.py::test_fails", "tests/deep/test_some.py::test_has_no_fixture[a]"]
    fails, has_no_fixture = failures.values()
    assert (fails[0], fails[20], fails[-1]) == ("E       Failed: line 0", "...", "E       line 199")
    assert len(fails) == gates.TOLD_LINES + 1
    assert has_no_fixture == ["E       RuntimeError: no such thing"]


def test_a_level_that_was_ended_has_no_report(tmp_path: Path) -> None:
    assert not list(gates._failures(tmp_path / "none.xml"))
