"""What a run measures, in which order, how often and for how long. Nothing here measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

AGENTS: Final = {"echo": "echo/echo", "slow": "echo/delay-0-20", "clock": "echo/clock-40x20ms"}
"""Agents of the run, with their built-in models: no model's own time is measured."""
STREAMED_S: Final = 0.8
"""How long the streaming brain takes for an answer. Turns that all take the same time and begin at once stay in step
for ever: they start and end in storms. Conversations of people are spread.
"""
STREAMS: Final = 4
"""Adapter streams that the sessions of the sweep share, as far as there are as many sessions."""
SWEEP: Final = (1, 4, 16, 64, 256, 1024)
PARTS: Final = ("router-0", "cognition-0", "gateway-0", "nats", "postgres")
"""Whom the recovery times are about."""

WATERFALLS: Final = ((1, 1), (64, STREAMS))
"""Sessions and streams of the shapes whose turns are followed hop by hop."""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of load."""

    agent: str
    sessions: int
    streams: int
    live: bool = False
    """The brain streams its answer, and what is measured is the way of each word."""
    spread_s: float = 0.0
    """Time over which the sessions send their first messages; 0: all at once."""
    bar: bool = True
    """A bar names this shape: it is measured in every round."""

    @property
    def name(self) -> str:
        """For example `echo 64/4`: brain, sessions, streams; `tokens 500` of a streaming brain."""
        if self.live:
            return f"tokens {self.sessions}" + (" spread" if self.spread_s else "")
        return f"{self.agent} {self.sessions}/{self.streams}"


CASES: Final = (
    Case("echo", 1, 1),
    Case("echo", 4, 4, bar=False),
    Case("echo", 16, STREAMS, bar=False),
    Case("echo", 64, STREAMS),
    Case("echo", 64, 64),
    Case("slow", 64, STREAMS),
    Case("echo", 256, STREAMS),
    Case("echo", 1024, STREAMS, bar=False),
    Case("clock", 20, STREAMS, live=True),
    Case("clock", 500, STREAMS, live=True),
    Case("clock", 500, STREAMS, live=True, spread_s=STREAMED_S, bar=False),
)
"""In the order in which every round takes them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a run takes, and how much of it there is. Times in seconds."""

    rounds: int = 5
    sweep_rounds: int = 2
    """Rounds that also take the shapes that no bar names."""
    kills: int = 3
    """Of each part."""
    seconds: float = 6.0
    """Measured time of a case."""
    warm_s: float = 1.5
    limits_s: float = 1.5
    """Of each of the machine's limits."""
    idle_s: float = 3.0
    """From the start of the stack to the look at its memory."""
    kill_every_s: float = 7.0
    """So far apart that a part has been up for long enough when its turn comes again that the supervisor restarts it
    as after a first death."""
    only: tuple[str, ...] = ()
    """Names of the cases to take; all if empty. If there are some, nothing is killed and no turn is followed."""

    @property
    def waterfalls(self) -> tuple[tuple[int, int], ...]:
        """Sessions and streams of the shapes whose turns are followed."""
        return () if self.only else WATERFALLS

    @property
    def kills_of_each(self) -> int:
        """Kills of each part."""
        return 0 if self.only else self.kills

    def cases(self, number: int) -> list[Case]:
        """The cases of a round; rounds count from 0. The sweep's rounds are spread over the run."""
        every = -(-self.rounds // max(self.sweep_rounds, 1))
        sweep = self.sweep_rounds > 0 and number % every == 0
        chosen = [case for case in CASES if case.bar or sweep]
        return [case for case in chosen if not self.only or case.name in self.only]

    def case_s(self, case: Case) -> float:
        """About how long a case takes, with connecting and the last answers."""
        return self.warm_s + self.seconds + (2.5 if case.live else 0.7)

    def steps(self) -> Iterator[float]:
        """About how long each step of the run takes, in order: start, then limits and cases by round,
        then waterfalls and kills."""
        yield 10.0 + self.idle_s
        for number in range(self.rounds):
            yield 4 * self.limits_s + 0.5
            yield from (self.case_s(case) for case in self.cases(number))
        yield from [self.seconds + self.warm_s + 3.0] * len(self.waterfalls)
        yield from [self.kill_every_s] * (self.kills_of_each * len(PARTS))

    @property
    def total_s(self) -> float:
        """About how long the whole run takes."""
        return sum(self.steps())


QUICK: Final = Plan(rounds=1, sweep_rounds=1, kills=1, seconds=2.5, warm_s=1.0, limits_s=0.7, kill_every_s=5.0)
"""Everything once, in about two minutes."""


class Progress:
    """How much time is left, from how long the steps so far took against what was planned."""

    def __init__(self, plan: Plan) -> None:
        self._left = list(plan.steps())
        self._planned = self._taken = 0.0

    def done(self, taken_s: float) -> None:
        """A step is over."""
        if self._left:
            self._planned += self._left.pop(0)
            self._taken += taken_s

    @property
    def left_s(self) -> float:
        """Estimate of what is left, in seconds."""
        pace = self._taken / self._planned if self._planned else 1.0
        return sum(self._left) * pace


def told(seconds: float) -> str:
    """A time for people: `40 s`, `7 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
