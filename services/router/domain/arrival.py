"""What a message does that arrives while others run or wait, and which messages the next turn takes.

Messages of a session keep their order, whatever their policies: the inputs of a turn are always the next ones in line.
So the rules are few, and every owner of a session comes to the same answer from what is stored:

- a message that steers becomes an input of the running turn when nothing waits before it;
- a message that interrupts or rolls back stops the turn that runs, and the next turn takes everything that waits up to
  and with it;
- messages that accumulate are taken together, once no companion is waited for any more;
- a message that is refused when the session is busy ends at once, before those that were there first.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final

from services.router.domain.turn import Outcome, TurnStatus

if TYPE_CHECKING:
    from services.router.domain.session import QueuedMessage, Session, Turn

_ROLLED_BACK: Final = 1 << 63
MAX_INPUTS: Final = 64
"""Most messages that one turn answers; what comes after them waits for the next."""
MAX_INPUT_BYTES: Final = 4 * 1024 * 1024
"""Most bytes of messages that one turn answers, unless a single one has more: what starts a turn has to fit a frame,
and a frame that is too large would cost the brain's other turns their stream.
"""


class Policy(IntEnum):
    """What a message does that arrives while a turn runs; the numbers are those of soma.common.v1.ArrivalPolicy."""

    ENQUEUE = 1
    ACCUMULATE = 2
    STEER = 3
    INTERRUPT = 4
    ROLLBACK = 5
    REJECT = 6


class Arrival(Enum):
    """What becomes of a message when it arrives."""

    WAITS = "it waits in line"
    REFUSED = "it ends at once"
    STOPS = "it waits, and stops what runs"


STOPS: Final = {Policy.INTERRUPT: Outcome.INTERRUPTED, Policy.ROLLBACK: Outcome.ABSORBED}
"""How a turn ends that a message of this policy stops."""


def replacement(number: int) -> int:
    """The generation (`ids.turn_id`) of a turn that begins with a message that an earlier turn had taken and was rolled
    back; `number` is the turn's own. No position of a message is as high, and those are generations too.
    """
    return _ROLLED_BACK | number


def arrival_of(session: Session, message: QueuedMessage) -> Arrival:
    """What a message does that is next to come to `session`, where it does not wait yet."""
    if message.fault:
        return Arrival.WAITS
    if message.policy == Policy.REJECT and (session.turn is not None or session.queue):
        return Arrival.REFUSED
    if message.policy in STOPS and session.turn is not None:
        return Arrival.STOPS
    return Arrival.WAITS


def may_join(turn: Turn, message: QueuedMessage) -> bool:
    """Whether the first waiting message becomes an input of the turn that runs."""
    return (
        message.policy == Policy.STEER
        and not message.ends_alone
        and turn.status is TurnStatus.RUNNING
        and not turn.ending
        and len(turn.inputs) < MAX_INPUTS
        and sum(each.size for each in turn.inputs) + message.size <= MAX_INPUT_BYTES
    )


def next_inputs(queue: Sequence[QueuedMessage]) -> int:
    """How many of the waiting messages the next turn takes; a message that has to end on its own is taken alone.

    `queue` holds at least one message.
    """
    head = queue[0]
    if head.ends_alone:
        return 1
    together = _run_length(queue)
    last_stop = max((i for i in range(together) if queue[i].policy in STOPS), default=-1)
    if last_stop >= 0:
        return last_stop + 1
    if head.policy == Policy.ACCUMULATE:
        return next((i for i in range(together) if queue[i].policy != Policy.ACCUMULATE), together)
    return 1


def due_in_s(queue: Sequence[QueuedMessage], now: float) -> float:
    """How long the first of the waiting messages is to wait for companions still, in seconds; not above 0: no more.

    A group is complete when the turn can take no more, or when a message of another policy is behind it: what comes
    later could not be taken with it any more.
    """
    head = queue[0]
    if head.policy != Policy.ACCUMULATE or head.ends_alone:
        return 0.0
    count = next_inputs(queue)
    if count < len(queue) or count == MAX_INPUTS:
        return 0.0
    last = queue[count - 1]
    return min(last.ingested_at + last.debounce_s, head.ingested_at + head.debounce_max_s) - now


def _run_length(queue: Sequence[QueuedMessage]) -> int:
    """Messages from the first on that one turn can take: none of them has to end on its own."""
    size = 0
    for i, message in enumerate(queue):
        size += message.size
        if i == MAX_INPUTS or message.ends_alone or (i and size > MAX_INPUT_BYTES):
            return i
    return len(queue)
