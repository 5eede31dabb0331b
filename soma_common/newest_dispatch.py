"""Which live events of a turn still count: those of its newest dispatch.

A router or brain that was replaced while it stood still may go on to say what it had in hand. Its words belong to an
older dispatch of the turn than those that were shown since, and are dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

REMEMBERED_TURNS: Final = 4096
"""About 400 kB at most; a turn is forgotten when so many others were shown after it began."""


class NewestDispatch:
    """What one stream, or one adapter over all its streams, was shown."""

    def __init__(self) -> None:
        self._newest: OrderedDict[bytes, int] = OrderedDict()

    def admits(self, turn_id: bytes, dispatch: int) -> bool:
        """Whether an event may be shown; if so, older dispatches of its turn may not from now on."""
        newest = self._newest.get(turn_id)
        if newest is None:
            self._newest[turn_id] = dispatch
            if len(self._newest) > REMEMBERED_TURNS:
                self._newest.popitem(last=False)
        elif dispatch > newest:
            self._newest[turn_id] = dispatch
        return newest is None or dispatch >= newest
