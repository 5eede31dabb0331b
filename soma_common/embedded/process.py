"""One child process: started through `launch.py`, watched without polling, ended within a time limit.

A pid alone is not an identity (pids are recycled), so whatever is remembered across runs is a `ProcessIdentity`, and
nothing is ever signalled by a bare pid.
"""

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from soma_common.embedded import launch

OUTPUT_TAIL_BYTES = 2000
"""How much of a dead process's output an error message quotes."""


class PartFailed(Exception):
    """A part of the stack cannot run. `advice` says what the person in front of the machine can do about it."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message} -> {self.advice}"


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told apart from a later one with the same pid by the moment it started."""

    pid: int
    started: str
    """Clock ticks since boot (Linux, /proc) or the date `ps` prints: only ever compared for equality."""

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """The identity of the running process `pid`; None when there is none.

        A zombie counts as none once its last thread is gone. Until then it is still there: a killed process's first
        thread can be a zombie while others hold on to its ports and locks.
        """
        if sys.platform == "linux":
            try:
                # The name in the second field may hold blanks and brackets: count the fields after its last bracket.
                status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
                fields = status.rpartition(")")[2].split()
                # Field 20 counts the threads, a zombie first thread among them.
                gone = fields[0] in "ZX" and int(fields[17]) <= 1
            except OSError:
                return None
            return None if gone else cls(pid, fields[19])
        shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return cls(pid, shown.stdout.strip()) if shown.stdout.strip() else None

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return ProcessIdentity.of(self.pid) == self

    def send(self, number: signal.Signals) -> bool:
        """Signal this very process; False when it is gone."""
        if not self.alive():
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    async def end(self, polite: signal.Signals, timeout_s: float) -> None:
        """End a process that is not our child: ask with `polite`, and kill it when it still runs after `timeout_s`."""
        for number, limit_s in ((polite, timeout_s), (signal.SIGKILL, 5.0)):
            if not self.send(number):
                return
            deadline = time.monotonic() + limit_s
            while self.alive() and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody tells us of its end
                await asyncio.sleep(0.02)


def descendants(pid: int) -> list[ProcessIdentity]:
    """The processes that `pid` started, and those that they started (Linux only; elsewhere none are found)."""
    parents: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = (directory / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        except OSError:
            continue  # It ended while we looked.
        parents.setdefault(int(parent), []).append(int(directory.name))
    found, wanted = [], list(parents.get(pid, ()))
    while wanted:
        child = wanted.pop()
        wanted += parents.get(child, ())
        identity = ProcessIdentity.of(child)
        if identity is not None:
            found.append(identity)
    return found


class ChildProcess:
    """A running (or ended) child. Usable from any event loop and from none: its end is a thread's future."""

    def __init__(self, popen: subprocess.Popen[bytes], output: Path) -> None:
        self._popen = popen
        self._output = output
        self._end: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._end.set_running_or_notify_cancel()  # From here on a cancelled waiter cannot cancel the future itself.
        self.identity = ProcessIdentity.of(popen.pid)
        """None when the child was dead before it could be looked at."""
        # A daemon, so that a child that outlives us never holds up our own exit.
        threading.Thread(target=self._reap, name=f"reap-{popen.pid}", daemon=True).start()

    @classmethod
    def start(
        cls,
        command: Sequence[str | Path],
        *,
        output: Path,
        identity: str = "self",
        environment: Mapping[str, str] | None = None,
        directory: Path = Path("/"),
        on_parent_death: signal.Signals = signal.SIGTERM,
    ) -> "ChildProcess":
        """Start `command` in a session of its own (a Ctrl-C on the terminal reaches only the supervisor).

        `output` is emptied and receives stdout and stderr. `identity` and `on_parent_death` are explained in `launch`.
        Call it from the thread that lives longest: on Linux the child dies with the thread that started it.
        """
        arguments = launch_command(command, identity=identity, on_parent_death=on_parent_death)
        with open(output, "wb", opener=open_private) as file:
            popen = subprocess.Popen(
                arguments,
                cwd=directory,
                env=None if environment is None else dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,
            )
        return cls(popen, output)

    @property
    def pid(self) -> int:
        """Process id; valid as long as the child has not been seen to end."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; otherwise as `subprocess` gives it (minus the signal's number when a signal ended it)."""
        return self._end.result() if self._end.done() else None

    def send(self, number: signal.Signals) -> None:
        """Signal the child; nothing happens when it has ended."""
        self._popen.send_signal(number)

    async def ended(self) -> int:
        """Wait for the child's end and return its exit code. Cancelling the wait leaves the child alone."""
        return await asyncio.wrap_future(self._end)

    async def stop(self, polite: signal.Signals, timeout_s: float) -> bool:
        """Ask with `polite`, kill after `timeout_s`; True when asking was enough."""
        self.send(polite)
        try:
            await asyncio.wait_for(self.ended(), timeout_s)
            return True
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.ended()
            return False

    def output_tail(self) -> str:
        """The last lines the child wrote to stdout and stderr."""
        return self._output.read_bytes()[-OUTPUT_TAIL_BYTES:].decode(errors="replace").strip()

    def _reap(self) -> None:
        self._end.set_result(self._popen.wait())


def launch_command(
    command: Sequence[str | Path], *, identity: str = "self", on_parent_death: signal.Signals | None = None
) -> list[str]:
    """`command` wrapped so that `launch.py` starts it as a child of this very process."""
    death_signal = 0 if on_parent_death is None else int(on_parent_death)
    wrapped = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(death_signal), identity, *command]
    return [str(part) for part in wrapped]


def open_private(path: str, flags: int) -> int:
    """An `opener` for `open`: the file it makes is readable by this user alone."""
    return os.open(path, flags, 0o600)


def private_directory(path: Path) -> Path:
    """Create `path` (and its parents) for this user alone, mode 0700; one that exists is narrowed, if we may."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.geteuid() in (0, path.stat().st_uid):
        path.chmod(0o700)
    return path


def write_private(path: Path, text: str, *, sync: bool = True) -> None:
    """Replace the file `path` in one step, readable by this user alone; a reader sees the old text or the new.

    With `sync` the new text survives the machine.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with open(draft, "w", encoding="utf-8", opener=open_private) as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    draft.replace(path)
