"""The earlier releases, and their code: taken out of the repository by commit.

python -m tests.contract.golden.releases      # writes the examples of the newest release in releases.toml
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).parent
ROOT = GOLDEN.parents[2]


@dataclass(frozen=True)
class Release:
    """One entry of releases.toml."""

    name: str
    commit: str

    @property
    def examples(self) -> Path:
        """The folder of its examples."""
        return GOLDEN / self.name

    @property
    def recorded(self) -> Path:
        """What its services wrote in a conversation (record.py)."""
        return self.examples / "recorded" / "conversation.json"

    @property
    def absent(self) -> str:
        """Why its code cannot be had; empty when it can."""
        found = subprocess.run(["git", "cat-file", "-e", f"{self.commit}^{{commit}}"], cwd=ROOT, capture_output=True)
        if found.returncode == 0:
            return ""
        return f"release {self.name} (commit {self.commit[:7]}) is not in this clone: git fetch --unshallow"

    def extract(self, folder: Path) -> Path:
        """Put its code into `folder` and return that."""
        archive = subprocess.run(["git", "archive", self.commit], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            # Not the parameter `filter`: Python knows it since 3.11.4 only.
            files.extraction_filter = getattr(tarfile, "data_filter", None)
            files.extractall(folder)
        return folder

    def write_examples(self, code: Path, out: Path) -> None:
        """Have the release's own code, extracted to `code`, write its examples to `out`."""
        command = [sys.executable, "-P", str(GOLDEN / "examples.py"), str(code / "gen"), str(out)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(code / "gen")})


def releases() -> list[Release]:
    """All of them, oldest first."""
    listed = tomllib.loads((GOLDEN / "releases.toml").read_text(encoding="utf-8"))["release"]
    return [Release(entry["name"], entry["commit"]) for entry in listed]


def previous() -> Release:
    """The newest one: what is running when an upgrade to today's code begins."""
    return releases()[-1]


def must_be_there() -> bool:
    """Whether a clone without an earlier release is a failure: in CI, unless its clone is cut off on purpose."""
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True)
    return os.environ.get("CI") == "true" and shallow.stdout.strip() != b"true"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        previous().write_examples(previous().extract(Path(scratch)), previous().examples)
