"""The peers' own environment, .peers: Python packages from the hash-pinned lock, Restate's server from its npm lock.

Made or renewed when a lock changed. The product's environment stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOME = ROOT / ".peers"
PYTHON = HOME / "bin" / "python"
NODE = HOME / "node"
LOCK = HERE / "requirements.lock"
NODE_FILES = (HERE / "node" / "package.json", HERE / "node" / "package-lock.json")


class NotInstalled(Exception):
    """A peer's packages could not be installed; the message ends with what the installer said."""


def python_packages(say: Callable[[str], None]) -> None:
    """Make .peers and install the lock into it, unless that was done.

    Raises:
        NotInstalled: pip failed.
    """
    if _stamped(HOME / ".installed", LOCK, str(sys.version_info[:2])):
        return
    say("installing the peers' Python packages into .peers, each checked against its hash ...")
    shutil.rmtree(HOME, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(HOME)])
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "install", "--require-hashes", "-r", str(LOCK)])
    _run([*pip, "check"])
    _stamp(HOME / ".installed", LOCK, str(sys.version_info[:2]))


def restate_server(say: Callable[[str], None]) -> Path:
    """Restate's server, a native program that comes as an npm package; installed unless that was done.

    Raises:
        NotInstalled: there is no npm, it failed, or there is no program for this machine.
    """
    if not _stamped(NODE / ".installed", *NODE_FILES):
        npm = shutil.which("npm")
        if npm is None:
            raise NotInstalled("npm (of Node.js) is not on the path")
        say("installing Restate's server from its npm package, checked against its hash ...")
        shutil.rmtree(NODE, ignore_errors=True)
        NODE.mkdir(parents=True)
        for file in NODE_FILES:
            shutil.copy(file, NODE)
        # No scripts: the package's only one reports the installation to a third party.
        _run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], directory=NODE)
        _stamp(NODE / ".installed", *NODE_FILES)
    found = sorted(NODE.glob("node_modules/@restatedev/restate-server-*/bin/restate-server"))
    if not found:
        raise NotInstalled("Restate publishes no server for this machine")
    return found[0]


def _fingerprint(parts: tuple[Path | str, ...]) -> str:
    read = [part.read_text() if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256("\0".join(read).encode()).hexdigest()


def _stamped(stamp: Path, *parts: Path | str) -> bool:
    return stamp.exists() and stamp.read_text() == _fingerprint(parts)


def _stamp(stamp: Path, *parts: Path | str) -> None:
    stamp.write_text(_fingerprint(parts))


def _run(command: list[str], directory: Path = ROOT) -> None:
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    ended = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise NotInstalled(f"{' '.join(command)} failed:\n{ended.stdout}{ended.stderr}")
