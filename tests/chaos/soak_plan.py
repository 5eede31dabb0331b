"""What a soak does and when: a pure function of its seed. What the load and the machine do meanwhile is never the same.

for fault in plan_round(seed=7, number=0, seconds=45, parts=..., links=..., tenants=...).faults:
    print(fault)                            # +12.3 s  blackhole router-0->postgres, 3.2 s
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from soma.common.v1.turn_pb2 import ArrivalPolicy as Policy

from tests.chaos.load import Mix

POINTS: Final = {
    "gateway": ("gateway.after_publish_before_ack", "gateway.after_delivery_before_ack"),
    "router": (
        "router.after_answer_before_start",
        "router.after_ingest_before_dispatch",
        "router.after_step_before_confirm",
        "router.after_commit_before_delivery",
    ),
    "cognition": (
        "cognition.after_confirm_before_tool",
        "cognition.after_tool_before_result",
        "cognition.before_proposal",
        "cognition.mid_tokens",
    ),
    "toolgw": ("toolgw.before_run", "toolgw.after_run_before_store", "toolgw.after_store_before_answer"),
}
"""Where a process can be made to die, by service."""

KINDS: Final = {
    "kill": 3.0,
    "freeze": 2.5,
    "failpoint": 1.5,
    "cut": 1.5,
    "refuse": 1.0,
    "delay": 1.5,
    "blackhole": 2.0,
    "one-way": 1.0,
    "deaf": 0.7,
    "adapter": 0.7,
}
"""Kinds of fault and how often each comes beside the others."""
ON_PARTS: Final = ("kill", "freeze", "failpoint")
ON_LINKS: Final = ("cut", "refuse", "delay", "blackhole", "one-way")
ON_TENANTS: Final = ("deaf", "adapter")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong. `where` is a part, a link (`router-0->postgres`) or a tenant."""

    at_s: float
    """From the beginning of the round."""
    kind: str
    where: str
    for_s: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        lasts = f", {self.for_s:.1f} s" if self.for_s else ""
        return f"+{self.at_s:5.1f} s  {self.kind} {self.where}{f' ({self.detail})' if self.detail else ''}{lasts}"


@dataclass(frozen=True, slots=True)
class Round:
    """Some time of faults under one load, after which everything heals, drains and is checked."""

    number: int
    seconds: float
    load_seed: int
    mix: Mix
    faults: tuple[Fault, ...]


def plan_round(
    seed: int,
    number: int,
    seconds: float,
    *,
    parts: Sequence[str],
    links: Sequence[tuple[str, str]],
    tenants: Sequence[str],
    policies: Sequence[Policy.ValueType] = (Policy.ARRIVAL_POLICY_UNSPECIFIED,),
    kinds: Sequence[str] = tuple(KINDS),
) -> Round:
    """One round of a soak. The same arguments give the same round."""
    drawn = random.Random(f"{seed}/{number}")
    mix = drawn.choice(_mixes(tuple(policies)))
    faults: list[Fault] = []
    at_s = drawn.uniform(0.2, 2.0)
    while at_s < seconds:
        kind = drawn.choices(kinds, [KINDS[kind] for kind in kinds])[0]
        faults.append(_fault(drawn, kind, at_s, seconds - at_s, parts, links, tenants))
        at_s += drawn.uniform(0.2, 3.5)
    return Round(number, seconds, drawn.randrange(2**32), mix, tuple(faults))


def _fault(
    drawn: random.Random,
    kind: str,
    at_s: float,
    left_s: float,
    parts: Sequence[str],
    links: Sequence[tuple[str, str]],
    tenants: Sequence[str],
) -> Fault:
    for_s = min(drawn.choice((drawn.uniform(0.1, 1.0), drawn.uniform(1.0, 6.0))), max(left_s, 0.1))
    if kind in ON_LINKS:
        detail = ""
        if kind == "delay":
            detail = f"{drawn.choice((20, 100, 400, 900))} ms"
        elif kind == "one-way":
            detail = drawn.choice(("there", "back"))
        return Fault(at_s, kind, "->".join(drawn.choice(links)), 0.0 if kind == "cut" else for_s, detail)
    if kind in ON_TENANTS:
        return Fault(at_s, kind, drawn.choice(tenants), for_s)
    if kind == "failpoint":
        service = drawn.choice(sorted(POINTS))
        part = drawn.choice([part for part in parts if part.rpartition("-")[0] == service])
        return Fault(at_s, kind, part, 0.0, f"{drawn.choice(POINTS[service])}=kill@{drawn.randint(1, 30)}")
    return Fault(at_s, kind, drawn.choice(parts), for_s if kind == "freeze" else 0.0)


def _mixes(policies: tuple[Policy.ValueType, ...]) -> tuple[Mix, ...]:
    """The loads of a soak; every round has one of them."""
    talk = Mix(
        echo=3, slow=2, clerk=2, pause_s=0.5, ahead=2, policies=policies,
        cancel=0.1, interrupt=0.05, pause=0.02, repeat=0.1, nack=0.02, watch=0.2,
    )  # fmt: skip
    return (
        talk,
        replace(talk, slow=1, pause_s=0.6, ahead=20, cancel=0.02, interrupt=0.02, repeat=0.2, nack=0.05, watch=0.1),
        replace(talk, echo=2, clerk=3, pause_s=0.3, ahead=1, cancel=0.05, nack=0.0, watch=0.4),
    )
