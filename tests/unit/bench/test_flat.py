"""Verdicts and figures of the benchmarks of flatness."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest
from soma.common.v1.message_pb2 import Message
from soma.common.v1.turn_pb2 import StepBody

from soma_common import ids
from tests.bench import flat, history, history_load, idle, long_run, processes, tenants
from tests.bench.history_load import CHANNELS, History, Rows
from tests.bench.memory import MIB, SHARED, Samples
from tests.bench.stack import TENANT


def rounds(*rates: float) -> list[dict[str, float]]:
    return [{"turns_per_s": rate, "p50_ms": 64_000 / rate, "cpu_s_per_1000": 1000 / rate} for rate in rates]


def test_a_bar_is_kept_on_its_bounds_and_not_beyond() -> None:
    assert [flat.Bar("x", value, 1.0, 2.0).holds for value in (0.99, 1.0, 2.0, 2.01)] == [False, True, True, False]
    assert str(flat.Bar("x", 1.0, least=2.0)).startswith("MISSED x: 1.00 (at least 2.00)")


def test_a_ratio_is_that_of_rounds_beside_each_other() -> None:
    # The machine was half as fast in the second round: for both.
    assert flat.ratio(rounds(900, 450, 950), rounds(1000, 500, 1000), "turns_per_s") == 0.9


def test_history_is_flat_only_if_all_loads_are() -> None:
    same = {
        f"{case} {side}": rounds(1000, 1000, 1000) for case in ("new", "known", "one") for side in ("small", "full")
    }
    assert all(bar.holds for bar in history.bars(same))
    slower = history.bars({**same, "known full": rounds(1000, 880, 880)})
    assert [bar.name for bar in slower if not bar.holds] == ["known: turns/s full by small", "known: p50 full by small"]


def test_the_price_of_tenants_is_told_apart_from_that_of_streams() -> None:
    told = tenants.cost({"usual": rounds(1000), "streams": rounds(500), "many": rounds(250)})
    assert list(told.values()) == [0.5, 0.5, 2.0, 2.0]


def grows(name: str, by: float, since: float = 0) -> Samples:
    samples = Samples()
    for progress in range(0, 1000, 10):
        samples.add(name, progress, int(100 * MIB + by * max(0.0, progress - since)))
    return samples


def test_growth_is_judged_from_where_caches_are_full() -> None:
    samples = grows("router", 100.0)
    assert round(samples.slope("router", 200)) == 100
    assert samples.slope("router", 980) == 0.0, "two looks are no line"
    early = Samples()
    for progress in range(0, 1000, 10):
        early.add("router", progress, min(progress, 200) * MIB)
    assert early.slope("router", 200) == 0.0


def test_what_turns_cost_is_not_the_sessions_doing() -> None:
    told = idle.compared(grows("nats", 300.0), grows("nats", 320.0), 200)
    turns, sessions = told["nats"]
    assert round(sessions - turns) == 20


def test_a_long_run_may_neither_slow_down_nor_grow() -> None:
    steady = [{"turns_per_s": 1000.0, "errors": 0}] * 12
    slower = [{"turns_per_s": 1000.0, "errors": 0}] * 9 + [{"turns_per_s": 890.0, "errors": 1}] * 3
    # 1 % of 100 MiB in 600 s.
    by = MIB / 600
    alike = {"old": steady[:3], "young": steady[:3]}
    apart = {"old": slower[-3:], "young": steady[:3]}
    assert all(bar.holds for bar in long_run.bars(steady, alike, grows("router", 0.9 * by), 100))
    missed = [bar.name for bar in long_run.bars(steady, apart, grows("router", 1.1 * by), 0) if not bar.holds]
    assert missed == ["errors", "turns/s by a young stack's", "growth in 10 minutes, router"]
    assert [bar.name for bar in long_run.bars(slower, alike, grows("router", 0), 0) if not bar.holds] == ["errors"]
    assert len(long_run.bars(steady, alike, grows(SHARED, 100 * by), 0)) == 2, "buffers are a cache of a fixed size"
    assert long_run.edges(slower) == (1000.0, 890.0)


def test_memory_is_that_of_one_look() -> None:
    samples = Samples()
    for at, (router, nats) in enumerate([(100, 10), (50, 100), (60, 20)]):
        samples.add("router", at, router * MIB)
        samples.add("nats", at, nats * MIB)
    assert (samples.total_mib, samples.peak_mib) == (80.0, 150.0)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells sizes")
def test_what_is_allocated_is_told_apart_from_what_is_mapped(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(bytes(16 * MIB))
    before, _ = processes.anonymous(os.getpid())
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0, "every page is in memory"
        assert processes.anonymous(os.getpid())[0] - before < 8 * MIB
        held = bytearray(b"x") * (16 * MIB)
        assert processes.anonymous(os.getpid())[0] - before > 15 * MIB
        del held


def test_loaded_rows_are_dense_and_named_as_the_product_does() -> None:
    loaded = History("echo", 50, 3)
    rows = Rows(loaded, "r", 8, dict.fromkeys(range(8), (5, 2)))
    turns = [rows.turn(number) for number in (1, 2, 3)]
    positions: dict[int, list[int]] = {}
    for batch in turns:
        for row in batch["messages"]:
            positions.setdefault(row[0], []).append(row[1])
    assert sum(map(len, positions.values())) == 150
    for partition, taken in positions.items():
        assert taken == list(range(6, 6 + len(taken))), "from behind what was there, without a gap"
        assert rows.heads[partition] == (5 + len(taken), 2 + len(taken))
    sessions = list(rows.sessions())
    assert {row[5] for row in sessions} == {loaded.session(number)[1] for number in range(50)}
    assert len({row[4] for row in sessions}) == CHANNELS
    message, turn, step = (turns[2][table][7] for table in ("messages", "turns", "steps"))
    at, name = loaded.session(7)
    key = (TENANT, "echo", history_load.channel(at), name)
    assert message[2] == turn[1] == ids.session_id(*key)
    assert message[3] == ids.message_id(*key, "3")
    assert turn[0] == step[0] == ids.turn_id(ids.session_id(*key), message[3])
    assert sessions[7][9] == sessions[7][10] == turn[6] == message[1], "the last message has its outcome"
    said = Message.FromString(message[13]).parts[0].text
    assert said == StepBody.FromString(step[6]).final.message.parts[0].text
    assert said.startswith(f"message 3 of {name} ")
    assert message[4] == ids.content_hash(message[13])
