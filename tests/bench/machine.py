"""What a run was made on and with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Final

from tools.python_builds import loop_ms

PACKAGES: Final = ("grpcio", "asyncpg", "nats-py", "protobuf", "uvloop")
ROOT: Final = Path(__file__).parents[2]


def described() -> dict[str, str]:
    """Machine and versions, by what they are called in the report; the servers' are added once they run."""
    return {
        "SomaStack": version("somastack") + _commit(),
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, {platform.machine()}{_virtual()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_version()}, {loop_ms():.1f} ms for the loop of tools/python_builds.py",
        **{package: version(package) for package in PACKAGES},
    }


def _commit() -> str:
    """The checkout's commit, and whether it was changed since; empty outside of a checkout."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" ({told.stdout.strip()})"


def _cpu_model() -> str:
    return next(
        (line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")), "unknown CPU"
    )


def _virtual() -> str:
    flags = next((line for line in _cpu_info() if line.startswith("flags")), "")
    return ", virtual" if " hypervisor" in flags else ""


def _cpu_info() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
