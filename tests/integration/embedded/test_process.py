"""Child processes: started through the launcher, watched, ended in time, never confused with strangers."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from soma_common.embedded.launch import NOT_STARTED
from soma_common.embedded.process import ChildProcess, ProcessIdentity, descendants, write_private
from soma_common.testing.eventually import eventually

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]

BEHEADED = [
    sys.executable,
    "-c",
    "import ctypes, threading, time\n"
    "threading.Thread(target=time.sleep, args=(600,)).start()\n"
    "print('up', flush=True)\n"
    "ctypes.CDLL(None).pthread_exit(None)\n",
]
"""Its first thread ends and is a zombie, the other goes on: so a killed process looks until its last thread is gone."""


async def started(command: list[str], output: Path) -> ChildProcess:
    child = ChildProcess.start(command, output=output)
    while child.output_tail() != "up" and child.exit_code is None:
        await asyncio.sleep(0.01)
    return child


async def test_a_polite_request_is_enough_for_most(tmp_path: Path) -> None:
    child = await started(SLEEPER, tmp_path / "out")
    assert child.identity is not None
    assert child.identity.alive()
    assert await child.stop(signal.SIGTERM, timeout_s=5.0)
    assert child.exit_code == -signal.SIGTERM
    assert not child.identity.alive()


async def test_a_stubborn_child_is_killed_in_time(tmp_path: Path) -> None:
    child = await started(STUBBORN, tmp_path / "out")
    began = time.monotonic()
    assert not await child.stop(signal.SIGTERM, timeout_s=0.2)
    assert time.monotonic() - began < 10.0
    assert child.exit_code == -signal.SIGKILL


async def test_a_cancelled_wait_leaves_the_child_alone(tmp_path: Path) -> None:
    child = await started(SLEEPER, tmp_path / "out")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(child.ended(), 0.05)
    assert child.exit_code is None
    await child.stop(signal.SIGKILL, timeout_s=5.0)


async def test_a_program_that_cannot_start_says_why(tmp_path: Path) -> None:
    child = ChildProcess.start([tmp_path / "nothing"], output=tmp_path / "out")
    assert await child.ended() == NOT_STARTED
    assert "No such file" in child.output_tail()


async def test_signals_of_the_terminal_do_not_reach_it(tmp_path: Path) -> None:
    child = await started(SLEEPER, tmp_path / "out")
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    await child.stop(signal.SIGKILL, timeout_s=5.0)


async def test_an_identity_outlives_its_process_only_as_a_memory(tmp_path: Path) -> None:
    child = await started(SLEEPER, tmp_path / "out")
    identity = child.identity
    assert identity is not None
    assert identity in descendants(os.getpid())
    stranger = ProcessIdentity(identity.pid, "another moment")
    assert not stranger.alive()
    assert not stranger.send(signal.SIGKILL)
    await identity.end(signal.SIGTERM, timeout_s=5.0)
    assert await child.ended() == -signal.SIGTERM
    assert not identity.send(signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="only /proc tells zombies apart")
async def test_a_process_is_alive_until_its_last_thread_is_gone(tmp_path: Path) -> None:
    child = await started(BEHEADED, tmp_path / "output")
    identity = child.identity
    assert identity is not None
    status = Path(f"/proc/{child.pid}/stat")
    await eventually(lambda: status.read_text().rpartition(")")[2].split()[0] == "Z")
    assert identity.alive()
    await identity.end(signal.SIGTERM, timeout_s=5.0)
    assert not identity.alive()
    await child.ended()


def test_a_private_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_private(file, "one")
    with file.open() as reader:
        write_private(file, "two")
        assert reader.read() == "one"
    assert file.read_text() == "two"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
