"""Make or renew `.venv` from the hash-pinned lock; do nothing when it is already right.

Runs on the bare standard library, before anything is installed. "Already right" is a stamp in the environment that
names the lock, the project's metadata, the interpreter and the place of the checkout: a change in any installs again.
Two runs at the same time wait for each other.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

from tools.python_builds import faster_build

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements" / "dev.lock"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".installed"
GUARD = ROOT / ".setup.lock"


def main() -> int:
    """Return the process's exit code: 0 when the environment is usable."""
    with GUARD.open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == _fingerprint():
            return 0
        _go_on_with_a_faster_build()
        return _install()


def _go_on_with_a_faster_build() -> None:
    """Starts over with another build of this version if that is much faster. Returns if there is none; what was asked
    for (PYTHON) and an environment that exists stay as they are.
    """
    if os.environ.get("PYTHON") or PYTHON.exists():
        return
    if (found := faster_build(os.environ.get("PATH", ""))) is None:
        return
    build, times = found
    _say(
        f"{build.executable} ({build.version}) runs Python {times:.1f} times as fast as {sys.executable}: taking it"
        " (make setup PYTHON=/path/to/python3 chooses another)"
    )
    chosen = {**os.environ, "PYTHON": build.executable}
    os.execve(build.executable, [build.executable, "-m", "tools.setup_venv"], chosen)


def _install() -> int:
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    version = ".".join(map(str, sys.version_info[:3]))
    _say(f"virtual environment in .venv, Python {version}")
    # Another interpreter's packages are of no use to this one: start over.
    venv.create(VENV, with_pip=True, clear=not _made_by_this_python(), symlinks=True)
    pins = sum(1 for line in LOCK.read_text().splitlines() if line[:1].isalnum())
    _say(f"up to {pins} packages from requirements/dev.lock, each checked against its hash (about half a minute)")
    # The editable install comes from the checkout alone: its build backend is one of the packages just installed.
    steps = (
        ("installing the locked packages", ["install", "--require-hashes", "-r", str(LOCK)]),
        ("putting the checkout on the path", ["install", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]),
        ("checking that all of it fits together", ["check"]),
    )
    for what, arguments in steps:
        if not _pip(what, arguments):
            return 1
    STAMP.write_text(_fingerprint())
    _say(f"done in {time.monotonic() - started:.0f} s")
    return 0


def _made_by_this_python() -> bool:
    return PYTHON.exists() and (VENV / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}").is_dir()


def _pip(what: str, arguments: list[str]) -> bool:
    _say(what)
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore", "PIP_PROGRESS_BAR": "off"}
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode == 0:
        return True
    sys.stderr.buffer.write(result.stdout)
    print(
        f"\nsetup: {what} failed (pip's words are above).\n"
        "  - No answer from the package index: check the network, a proxy, or pip's own configuration\n"
        "    (`pip config list`), and run `make setup` again; what was downloaded is kept.\n"
        "  - A hash that does not match: the index serves another file than the one that was locked. Do not go on\n"
        "    with it; `make lock` renews the lock if the change is meant.\n"
        "  - No matching distribution: this Python or platform has no wheel; try `make setup PYTHON=python3.11`.\n"
        "  - Anything else: `make clean-venv setup` starts over.",
        file=sys.stderr,
    )
    return False


def _fingerprint() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    installed = [project.get("project"), project.get("build-system"), project["tool"].get("hatch")]
    parts = [LOCK.read_text(), installed, sys.version_info[:2], str(ROOT)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
