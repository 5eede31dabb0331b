"""Fail when proto/ breaks a contract that somebody may already rely on.

A branch is compared with the commit where it left main, main itself with its last release: the newest tag v*, else the
newest that tests/contract/golden/releases.toml names. Where there is nothing to compare with (a shallow clone holds
neither), it says so and passes.
BREAKING_AGAINST=<revision> chooses another revision.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ROOT / "tests" / "contract" / "golden" / "releases.toml"
CONTRACTS = ("buf.yaml", "proto", "third_party")


def main() -> int:
    """Return buf's verdict, or 0 when there is nothing to compare with."""
    revision = os.environ.get("BREAKING_AGAINST") or _baseline()
    if revision is None:
        print("nothing to compare with: no earlier state of main and no release is in reach of this commit")
        return 0
    contracts = _git("archive", revision, *CONTRACTS)
    if contracts is None:
        print(f"nothing to compare with: {revision} holds no contracts")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=contracts, check=True)
        print(f"comparing with {revision}", flush=True)
        return subprocess.run(["buf", "breaking", "--against", folder], cwd=ROOT).returncode


def _baseline() -> str | None:
    """Return the revision that others rely on: where a branch left main, or the last release when on main."""
    head = _git("rev-parse", "--verify", "--quiet", "HEAD")
    on_main = _git("symbolic-ref", "--quiet", "--short", "HEAD") == b"main\n"
    for trunk in () if on_main else ("origin/main", "main"):
        left_at = _git("merge-base", "HEAD", trunk)
        if left_at is not None and left_at != head:
            return left_at.decode().strip()
    tag = _git("describe", "--tags", "--abbrev=0", "--match", "v*")
    if tag is not None:
        return tag.decode().strip()
    commit: str = tomllib.loads(RELEASES.read_text(encoding="utf-8"))["release"][-1]["commit"]
    return commit if _git("cat-file", "-e", f"{commit}^{{commit}}") is not None else None


def _git(*arguments: str) -> bytes | None:
    """Return git's output, or None when it fails (not a repository, no such revision or path)."""
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    return result.stdout if result.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
