"""A partition as its owner holds it: the fence values of its row, the lane cursor, and what is not done yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from services.router.domain.session import Session

_SPARSE: Final = 1024


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last lane message that is in the mailbox.

    `stream` names the incarnation of the lane's stream and `batch` the message at `seq`, so that a lane that was made
    anew, restored or cut is noticed: then everything is read again and what is known already is dropped.
    """

    stream: str = ""
    seq: int = 0
    batch: str = ""


class Pending:
    """Positions in growing order, of which any may leave: a set, and the order they came in. There is one for each
    message that waits, so it is kept small: 50 bytes, where an OrderedDict takes 170.
    """

    __slots__ = ("_open", "_order")

    def __init__(self, positions: Iterable[int] = ()) -> None:
        self._open = set(positions)
        self._order = deque(sorted(self._open))

    def add(self, position: int) -> None:
        """Adds a position above all others."""
        self._open.add(position)
        self._order.append(position)

    def discard(self, position: int) -> None:
        """Removes a position, if it is there."""
        self._open.discard(position)
        if len(self._order) > 2 * len(self._open) + _SPARSE:
            # One that stays for long must not keep all that came and went behind it.
            self._order = deque(position for position in self._order if position in self._open)

    @property
    def first(self) -> int | None:
        """The lowest position."""
        while self._order and self._order[0] not in self._open:
            self._order.popleft()
        return self._order[0] if self._order else None

    def __contains__(self, position: object) -> bool:
        return position in self._open

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._open))

    def __len__(self) -> int:
        return len(self._open)


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
    pending: Pending = field(default_factory=lambda: Pending())
    """Positions of messages without outcome."""
    attached: bool = False
    """True once its lane is read from `read_seq` on: until then what the lane brings is not for it, or it would skip
    what lies between.
    """
    restoring: bool = False
    """What was pending when it was taken is being put back: sessions may be missing."""
    lost: bool = False
    """True once the term has ended: nothing of this object may be written any more."""
    known_seq: int | None = None
    """Last lane message that others may have read before this term, or that is read again in it; None: the lane was
    not looked at yet.
    """

    @property
    def running_turns(self) -> int:
        """Turns that run in it."""
        return sum(session.turn is not None for session in self.sessions.values())

    @property
    def floor(self) -> int:
        """Every message below this position has its outcome."""
        first = self.pending.first
        return self.mail_head + 1 if first is None else first
