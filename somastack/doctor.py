"""What `somastack doctor` looks at: everything a stack needs, each with what to do when it is not so."""

import asyncio
import importlib.metadata
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from soma_common.embedded.identity import server_identity
from soma_common.embedded.nats import server_binary
from soma_common.embedded.postgres import binary
from soma_common.embedded.process import PartFailed
from somastack.auth_material import AuthMaterial
from somastack.control import running_state
from somastack.home import Home
from somastack.layout import Layout
from somastack.parts import Unresponsive, parts_of
from somastack.state import Phase, StackState

MIN_PYTHON = (3, 11)
ENOUGH_DISK_BYTES = 5 * 1024**3
LEAST_DISK_BYTES = 1024**3
ENOUGH_FILES = 4096


class Verdict(StrEnum):
    """How a check went."""

    GOOD = "good"
    DOUBTFUL = "doubtful"
    """It works, but not for long or not well."""
    BAD = "bad"


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    verdict: Verdict
    seen: str
    advice: str = ""
    """What to do; empty when all is well."""


async def diagnose(home: Home, layout: Layout) -> list[Finding]:
    """Look at everything. Nothing is changed, and nothing is started that stays."""
    state = running_state(home)
    findings = [
        _python(),
        _packages(),
        _nats_program(),
        await asyncio.to_thread(_postgres_program, home),
        _open_files(),
    ]
    findings += [_home(home), _private_files(home), _disk(home)]
    findings += [_ports_free(layout)] if state is None else await _running_parts(home, state)
    return findings


def _python() -> Finding:
    seen = ".".join(str(number) for number in sys.version_info[:3]) + f" ({sys.executable})"
    if sys.version_info < MIN_PYTHON:
        return Finding("python", Verdict.BAD, seen, "use Python 3.11 or newer: make setup PYTHON=/path/to/python3.11")
    return Finding("python", Verdict.GOOD, seen)


def _packages() -> Finding:
    try:
        needed = importlib.metadata.requires("somastack") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", Verdict.BAD, "somastack itself is not installed", "run `make setup`")
    missing = [name for name in map(_distribution, needed) if not _installed(name)]
    if missing:
        return Finding("packages", Verdict.BAD, "missing: " + ", ".join(missing), "run `make setup`")
    return Finding("packages", Verdict.GOOD, f"{len(needed)} direct dependencies are installed")


def _distribution(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _nats_program() -> Finding:
    try:
        program = server_binary()
    except PartFailed as failure:
        return Finding("nats-server", Verdict.BAD, failure.message, failure.advice)
    return _runs("nats-server", program)


def _postgres_program(home: Home) -> Finding:
    try:
        found = _runs("postgres", binary("postgres"))
        identity = server_identity(home.postgres, binary("postgres"))
    except PartFailed as failure:
        return Finding("postgres", Verdict.BAD, failure.message, failure.advice)
    how = {"self": "as you", "userns": "in a user namespace", "setuid": "as nobody"}[identity.partition(":")[0]]
    return Finding(found.what, found.verdict, f"{found.seen}, would run {how}", found.advice)


def _runs(what: str, program: Path) -> Finding:
    try:
        shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(what, Verdict.BAD, f"{program} does not run: {error}", "install it again: make clean-venv setup")
    return Finding(what, Verdict.GOOD, shown.stdout.strip())


def _open_files() -> Finding:
    # The supervisor raises the soft limit itself.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < ENOUGH_FILES:
        return Finding(
            "open files", Verdict.DOUBTFUL, f"at most {hard} per process", f"allow more: ulimit -n {ENOUGH_FILES}"
        )
    return Finding(
        "open files", Verdict.GOOD, f"at most {'any number' if hard == resource.RLIM_INFINITY else hard} per process"
    )


def _home(home: Home) -> Finding:
    path = home.path
    if not path.exists():
        parent = next(parent for parent in path.parents if parent.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            return Finding("home", Verdict.BAD, f"{path} cannot be made in {parent}", "choose another with --home")
        return Finding("home", Verdict.GOOD, f"{path} will be made at the first start")
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0) or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return Finding(
            "home",
            Verdict.BAD,
            f"{path} belongs to uid {status.st_uid}, and you are uid {os.geteuid()}",
            "run as its owner, or choose another with --home",
        )
    if status.st_mode & 0o022:
        return Finding("home", Verdict.BAD, f"other users can write to {path}", f"close it: chmod go-w {path}")
    return Finding("home", Verdict.GOOD, str(path))


def _private_files(home: Home) -> Finding:
    open_to_others = [path for path in _secrets(home) if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if open_to_others:
        names = " ".join(str(path) for path in open_to_others)
        return Finding("secrets", Verdict.BAD, f"readable by others: {names}", f"close them: chmod go= {names}")
    return Finding("secrets", Verdict.GOOD, "keys and tokens are readable by you alone")


def _secrets(home: Home) -> Iterator[Path]:
    directories = (home.auth, home.auth / "services", home.auth / "tenants", home.nats, home.run)
    yield from (path for path in directories if path.exists())
    yield from (path for path in home.auth.rglob("*") if path.is_file())
    yield from (path for path in (home.nats / "token", home.nats / "server.json") if path.exists())


def _disk(home: Home) -> Finding:
    place = next(path for path in (home.path, *home.path.parents) if path.exists())
    free = shutil.disk_usage(place).free
    seen = f"{free / 1024**3:.1f} GiB free at {place}"
    if free < ENOUGH_DISK_BYTES:
        verdict = Verdict.BAD if free < LEAST_DISK_BYTES else Verdict.DOUBTFUL
        return Finding("disk", verdict, seen, "make room, or choose a --home on another disk")
    return Finding("disk", Verdict.GOOD, seen)


def _ports_free(layout: Layout) -> Finding:
    try:
        layout.refuse_taken_ports()
    except PartFailed as failure:
        return Finding("ports", Verdict.BAD, failure.message, failure.advice)
    return Finding("ports", Verdict.GOOD, f"all of {layout.base} to {max(port for port, _ in layout.ports())} are free")


async def _running_parts(home: Home, state: StackState) -> list[Finding]:
    """Ask every part of the running stack, not only its supervisor."""
    replicas: dict[str, int] = {}
    for part in state.parts:
        service, _, number = part.name.rpartition("-")
        if service:
            replicas[service] = max(replicas.get(service, 1), int(number) + 1)
    parts = {each.name: each for each in parts_of(home, Layout(state.port_base, replicas), AuthMaterial(home), "", {})}
    findings = []
    for told in state.parts:
        seen = f"{told.phase} since {told.since}, {told.restarts} restarts"
        try:
            await parts[told.name].check()
        except Unresponsive as silence:
            advice = f"read {told.log}; a part that stays silent is replaced by the supervisor"
            findings.append(Finding(told.name, Verdict.BAD, f"{seen}, does not answer: {silence}", advice))
            continue
        verdict = Verdict.GOOD if told.phase is Phase.READY else Verdict.DOUBTFUL
        advice = "" if verdict is Verdict.GOOD else f"{told.trouble or 'wait a moment'}; its log is {told.log}"
        findings.append(Finding(told.name, verdict, f"{seen}, answers", advice))
    return findings
