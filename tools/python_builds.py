"""Which build of a Python version runs fastest here.

Builds of one version differ by half: those of distributions and container images are compiled with profile-guided
optimisation and have the interpreter in the executable itself; what version managers compile by default has neither.
Run as a program it tells about the interpreter that runs it, as JSON (`Build`).

Works on the bare standard library, before anything is installed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

WORTH_IT = 1.15
"""How much faster another build must be to be taken instead of the one that the path has first."""
_TRIES = 15
_ROUNDS = 3
_ANSWER_S = 20.0


@dataclass(frozen=True)
class Build:
    """One interpreter. `loop_ms` is how long it takes for a fixed piece of work, in milliseconds."""

    executable: str
    version: str
    loop_ms: float
    usable: bool
    """It can make virtual environments, and is not in one itself."""


def faster_build(path: str) -> tuple[Build, float] | None:
    """A build of the version that runs this, with how many times as fast it is; None: none is worth a change. `path`
    is where to look, as in the variable PATH. Any patch release will do: all of 3.11 and later are supported, and what
    distributions ship has the later security fixes under an older number.
    """
    here = told_by(sys.executable)
    if here is None:
        return None
    seen = {os.path.realpath(sys.executable)}
    others = []
    for candidate in _named(f"python{sys.version_info[0]}.{sys.version_info[1]}", path):
        if (real := os.path.realpath(candidate)) in seen:
            continue
        seen.add(real)
        build = told_by(candidate)
        if build is not None and build.usable and _minor(build) == _minor(here):
            others.append(build)
    if not others:
        return None
    here, *others = _timed_again([here, *others])
    best = min(others, key=lambda build: build.loop_ms)
    times = here.loop_ms / best.loop_ms
    return (best, times) if times >= WORTH_IT else None


def _timed_again(builds: list[Build]) -> list[Build]:
    """The same builds with the best of several times, taken in turns: what else runs disturbs some of them only."""
    for _ in range(_ROUNDS):
        again = [told_by(build.executable) or build for build in builds]
        builds = [min(both, key=lambda build: build.loop_ms) for both in zip(builds, again, strict=True)]
    return builds


def told_by(executable: str | Path) -> Build | None:
    """What an interpreter says of itself; None: it does not run."""
    try:
        asked = subprocess.run(
            [str(executable), "-I", __file__], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_ANSWER_S
        )
        return Build(**json.loads(asked.stdout)) if asked.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, TypeError):
        return None


def loop_ms() -> float:
    """How long the interpreter that runs this takes for a fixed piece of work, in milliseconds: the best of some."""
    return min(_timed() for _ in range(_TRIES))


def _named(name: str, path: str) -> Iterator[Path]:
    for folder in path.split(os.pathsep):
        candidate = Path(folder) / name
        if folder and os.access(candidate, os.X_OK):
            yield candidate


def _minor(build: Build) -> list[str]:
    return build.version.split(".")[:2]


class _Item:
    def __init__(self, key: str, value: int) -> None:
        self.key, self.value = key, value

    def sized(self) -> int:
        return len(self.key) + self.value


def _work() -> list[tuple[int, str]]:
    """What services do most: small objects, attributes, calls, dictionaries, short texts."""
    kept: dict[str, _Item] = {}
    total = 0
    for number in range(10_000):
        item = _Item(f"k{number & 1023}", number)
        kept[item.key] = item
        total += item.sized()
        if item.key in kept and total % 3:
            total -= 1
    return sorted((item.value, key) for key, item in kept.items())


def _timed() -> float:
    began = perf_counter()
    _work()
    return (perf_counter() - began) * 1000


def _of_this_interpreter() -> Build:
    usable = sys.prefix == sys.base_prefix and all(find_spec(name) for name in ("venv", "ensurepip"))
    version = ".".join(map(str, sys.version_info[:3]))
    return Build(sys.executable, version, loop_ms(), usable)


if __name__ == "__main__":
    print(json.dumps(asdict(_of_this_interpreter())))
