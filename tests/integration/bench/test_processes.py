"""CPU and memory of process trees, as the kernel counts them."""

import os
import subprocess
import sys
import time

from tests.bench import processes

CHILD = "import time; print(flush=True); time.sleep(60)"


def test_a_process_that_is_counted_for_itself_is_not_counted_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            assert child.pid in processes.tree(os.getpid())
            assert child.pid not in processes.tree(os.getpid(), {child.pid})
            alone, both = processes.pss_mb(os.getpid(), {child.pid}), processes.pss_mb(os.getpid())
            assert both > alone
        finally:
            child.kill()


def test_cpu_in_the_block_is_counted_and_time_before_it_is_not() -> None:
    _work(0.2)
    with processes.Usage({"me": os.getpid()}) as usage:
        _work(0.3)
    assert 0.2 <= usage.by_process["me"] < 0.5
    assert usage.seconds >= 0.3


def _work(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
