"""A partition as its owner holds it: the fence values of its row, the lane cursor, and what is not done yet."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from uuid import UUID

from services.router.domain.session import Session


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last lane message that is in the mailbox.

    `stream` names the incarnation of the lane's stream and `batch` the message at `seq`, so that a lane that was made
    anew, restored or cut is noticed: then everything is read again and what is known already is dropped.
    """

    stream: str = ""
    seq: int = 0
    batch: str = ""


@dataclass(slots=True)
class Partition:
    """One unit of ownership. All fields but `id` and `term` move with each commit."""

    id: int
    term: UUID
    epoch: int
    head: int
    mail_head: int
    cursor: Cursor
    read_seq: int
    """Last lane message handed to the writer: at or ahead of `cursor.seq`."""
    sessions: dict[bytes, Session] = field(default_factory=dict)
    """Sessions with something to do, and as many idle ones as the cache keeps."""
    pending: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Positions of messages without outcome, in order."""
    attached: bool = False
    """True once its lane is read from `read_seq` on: until then what the lane brings is not for it, or it would skip
    what lies between.
    """
    lost: bool = False
    """True once the term has ended: nothing of this object may be written any more."""

    @property
    def running_turns(self) -> int:
        """Turns that run in it."""
        return sum(session.turn is not None for session in self.sessions.values())

    @property
    def floor(self) -> int:
        """Every message below this position has its outcome."""
        return next(iter(self.pending), self.mail_head + 1)
