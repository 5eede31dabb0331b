"""A tool call under its idempotency key: which states it goes through, and who may move it.

    (no row) --claim--> RUNNING --result------------------------> DONE
        |                  |
        |                  +--runner died, may run again--------> RUNNING (next attempt)
        |                  +--runner died, or cut off in the middle--> UNKNOWN
        |                  +--given up: a cancel waited long enough--> UNKNOWN
        |                  +--runner died, cancelled, left nothing--> CANCELLED
        +----cancel------------------------------------------> CANCELLED

DONE, CANCELLED and UNKNOWN are final. Each attempt has a claim of its own, a random id, and every way out of RUNNING
names the claim it ends: of two that try only one succeeds, a runner that was thought dead and wakes cannot overwrite
what was decided without it, and a claim whose commit was cut off is recognised as one's own. A result that comes when
its claim has ended as UNKNOWN is kept beside the call, for the record; it changes no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import Final

import orjson

from services.toolgw.domain.outcome import Outcome
from services.toolgw.domain.refusals import call_cancelled, key_reused, outcome_unknown
from services.toolgw.domain.tool import Effect, Json
from soma_common.ids import session_id

COMPENSATION_SUFFIX: Final = "/compensation"
"""Behind the key of a call: the key of its compensation. Nobody else may use such a key."""
MAX_ATTEMPTS: Final = 5
"""Runs of one call that may die with their runner before the tool is held to be what kills them."""


class State(Enum):
    """Where a call is."""

    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class Runner(Enum):
    """What is known of the process that runs a call."""

    ALIVE = "alive"
    """It has shown within its lease that it lives."""
    SILENT = "silent"
    """It has not: it is dead, or its heartbeats do not get through."""
    GONE = "gone"
    """It said itself that it stops working on the call, or its successor said that it is dead."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as it was asked for."""

    tenant: str
    agent: str
    channel: str
    session: str
    tool: str
    arguments: dict[str, Json]
    key: str
    """Idempotency key, unique in the tenant."""
    turn_id: str
    """32 hex digits or empty; for the record."""
    step: int

    @property
    def session_id(self) -> bytes:
        """The derived id of its session, 16 bytes."""
        return session_id(self.tenant, self.agent, self.channel, self.session)

    @property
    def compensates(self) -> str:
        """The key of the call that this one undoes; empty: it is none that undoes another."""
        return self.key.removesuffix(COMPENSATION_SUFFIX) if is_compensation(self.key) else ""

    @property
    def digest(self) -> bytes:
        """Tells a retry from a key that is used again for something else: session, tool and arguments, 16 bytes."""
        content = orjson.dumps([self.tool, self.arguments], option=orjson.OPT_SORT_KEYS)
        return blake2b(self.session_id + content, digest_size=16, person=b"soma-tool-call").digest()


@dataclass(frozen=True, slots=True)
class Invocation:
    """A call as it is stored."""

    key: str
    session_id: bytes
    tool: str
    """Empty for a key that was cancelled before it came."""
    digest: bytes | None
    """None for a key that was cancelled before it came."""
    effect: Effect
    state: State
    claim: str
    """Id of the attempt that made it RUNNING; empty for a key that was cancelled before it came."""
    attempt: int
    """Counts the claims, from 1."""
    runner: Runner
    """Means something only while RUNNING."""
    outcome: Outcome | None
    """Set when DONE."""
    asked_to_end_s: float = 0.0
    """Seconds since it was first asked to end while it ran; 0: it was not."""

    def answer_to(self, call: Call) -> Outcome | None:
        """What `call` gets from this stored call; None while it runs.

        Raises:
            AlreadyExists: IDEMPOTENCY_KEY_REUSED, the key belongs to another call.
            Conflict: TOOL_CANCELLED or TOOL_OUTCOME_UNKNOWN.
        """
        if self.session_id != call.session_id or self.digest not in (None, call.digest):
            raise key_reused(call.key)
        match self.state:
            case State.CANCELLED:
                raise call_cancelled(call.key)
            case State.UNKNOWN:
                raise outcome_unknown(call.key, self.tool)
            case State.DONE:
                return self.outcome
            case State.RUNNING:
                return None

    @property
    def cancelled_after_runner_death(self) -> State:
        """The state of this call when it is cancelled and its runner is dead."""
        return State.CANCELLED if self.effect.vanishes_with_runner else State.UNKNOWN


def is_compensation(key: str) -> bool:
    """Whether `key` is one of those under which compensations run."""
    return key.endswith(COMPENSATION_SUFFIX)
