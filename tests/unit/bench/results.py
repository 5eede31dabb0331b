"""Results of a run that never was, small enough to be read."""

from typing import Any

from tests.bench.load import QUANTILES
from tests.bench.report import PROCESSES


def row(case: str, number: int, **figures: Any) -> dict[str, Any]:
    """A case's row of one round; figures are what the test is about."""
    agent, _, shape = case.partition(" ")
    live = agent == "tokens"
    sessions, _, streams = shape.partition("/")
    made = {
        "round": number,
        "case": case,
        "agent": "clock" if live else agent,
        "sessions": int(sessions.removesuffix(" spread")),
        "streams": int(streams or 4),
        "live": live,
        "turns_per_s": 1000.0,
        "p50_ms": 10.0,
        "p99_ms": 20.0,
        "accept_p50_ms": 1.0,
        "accept_p99_ms": 2.0,
        "quantiles_ms": [float(q) for q in QUANTILES],
        "accept_quantiles_ms": [q / 10 for q in QUANTILES],
        "cpu_s_per_1000": 0.5,
        "cpu_by_process": dict.fromkeys(PROCESSES, 0.05),
        "foreign_cores": 0.0,
        "steal_cores": 0.0,
        "errors": 0,
    }
    if live:
        made |= {"tokens_per_s": 900.0, "token_p50_ms": 1.0, "token_p99_ms": 5.0}
        made |= {"token_quantiles_ms": [q / 20 for q in QUANTILES]}
    return made | figures


def results(*rows: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A run with these rows; what is not given is empty."""
    empty: dict[str, Any] = {
        "complete": True,
        "plan": {"rounds": 3, "sweep_rounds": 2, "seconds": 6.0, "warm_s": 1.5},
        "machine": {"CPU": "a fast one", "Python": "3.11"},
        "limits": [],
        "cases": list(rows),
        "waterfall": [],
        "recovery": [],
        "memory": {},
    }
    return empty | parts


def whole() -> dict[str, Any]:
    """A run that has something of everything."""
    limit = {f"{name}_{p}_ms": 0.4 for name in ("publish", "grpc", "commit", "fdatasync") for p in ("p50", "p99")}
    cases = ("echo 1/1", "echo 4/4", "echo 64/4", "echo 64/64", "slow 64/4", "tokens 20", "tokens 500")
    hop = {"name": "router.commit", "turns": 100, "mean_us": 900.0, "p50_us": 800.0, "p99_us": 2000.0}
    return results(
        *(row(case, number, turns_per_s=1000.0 + number) for number in (1, 2) for case in cases),
        limits=[{"round": number, **limit} for number in (1, 2)],
        waterfall=[{"sessions": 1, "streams": 1, "hops": [hop]}],
        recovery=[{"round": 1, "part": "nats", "next_answer_s": 0.7, "all_s": 0.9}],
        memory={when: dict.fromkeys(PROCESSES[1:], size) for when, size in (("idle", 40.0), ("loaded", 60.0))},
    )
