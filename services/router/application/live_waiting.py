"""Which waiting message is to begin which turn, for watchers of turns that have not begun.

A turn's id is a digest of its first message's: which message is meant is found only by making the ids of all that
wait, up to a thousand in a session, and watchers ask every two seconds. So the ids are kept while somebody asks.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from soma_common import ids

if TYPE_CHECKING:
    from services.router.domain.session import Session

KNOWN_TURNS: Final = 100_000
"""Most ids kept, about 15 MB: of as many messages as may wait of a tenant. Beyond it those of the sessions that were
not asked about for longest are made anew.
"""
_SPARSE: Final = 64


class WaitingTurns:
    """The turns of waiting messages, by message and session. `most` bounds the ids kept."""

    def __init__(self, most: int = KNOWN_TURNS) -> None:
        self._most = most
        self._turns: OrderedDict[bytes, dict[bytes, bytes]] = OrderedDict()
        """By session, the one asked about last at the end: turn ids by message id."""
        self._kept = 0

    def ahead(self, session: Session, turn_id: bytes) -> int | None:
        """How many messages wait before the one that is to begin the turn; None if none of those that wait is."""
        if not turn_id or not session.queue:
            return None
        known = self._known(session)
        before = len(known)
        found = None
        for ahead, message in enumerate(session.queue):
            id_ = known.get(message.message_id)
            if id_ is None:
                id_ = known[message.message_id] = ids.turn_id(session.id, message.message_id)
            if id_ == turn_id:
                found = ahead
                break
        self._kept += len(known) - before
        while self._kept > self._most:
            self.forget(next(iter(self._turns)))
        return found

    def forget(self, session_id: bytes) -> None:
        """Nobody asks about a session any more."""
        self._kept -= len(self._turns.pop(session_id, ()))

    def _known(self, session: Session) -> dict[bytes, bytes]:
        """The ids kept of a session, without too many of messages that wait no more."""
        known = self._turns.setdefault(session.id, {})
        self._turns.move_to_end(session.id)
        if len(known) > 2 * len(session.queue) + _SPARSE:
            waiting = [message.message_id for message in session.queue if message.message_id in known]
            self._kept -= len(known)
            known = self._turns[session.id] = {id_: known[id_] for id_ in waiting}
            self._kept += len(known)
        return known
