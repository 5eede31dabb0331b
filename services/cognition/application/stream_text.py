"""Text of a running step on its way to those who watch: coalesced, in order, without gaps.

The first piece goes at once, later ones at most once per `linger_s` and turn. While the router is behind, text waits
here and goes out as one longer piece: a slow router costs delay and bounded memory (a step's text), never a hole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from services.cognition.application.ports import Journal
from soma_common.failpoints import failpoint

_BEHIND_LINGERS: Final = 5


class Timer(Protocol):
    """Something that will happen."""

    def cancel(self) -> object:
        """It will not."""
        ...


class Timers(Protocol):
    """The part of an event loop that knows the time."""

    def time(self) -> float:
        """Now, in seconds of its own clock."""
        ...

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Calls at that time."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Calls in so many seconds."""
        ...


class TextStream:
    """The text of one step, for one event loop. `add` takes pieces; `finish` sends the rest; `close` forgets it."""

    __slots__ = ("_journal", "_linger_s", "_loop", "_next_send", "_pending", "_sent", "_step", "_timer")

    def __init__(self, journal: Journal, step: int, linger_s: float, loop: Timers) -> None:
        self._journal = journal
        self._step = step
        self._linger_s = linger_s
        self._loop = loop
        self._pending: list[str] = []
        self._sent = 0  # code points
        self._next_send = 0.0
        self._timer: Timer | None = None

    @property
    def started(self) -> bool:
        """Whether the model has said anything."""
        return self._sent > 0 or bool(self._pending)

    def add(self, piece: str) -> None:
        """Takes a further piece of the text. Never blocks."""
        if not piece:
            return
        self._pending.append(piece)
        if self._timer is not None:
            return
        if self._loop.time() >= self._next_send:
            self._send()
        else:
            self._timer = self._loop.call_at(self._next_send, self._send)

    def finish(self) -> None:
        """Sends what is left, as far as the router takes it: the step that follows holds the whole text anyway."""
        if self._pending:  # only then there is a timer
            self.close()
            self._send()
            self.close()

    def close(self) -> None:
        """Sends nothing more by itself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send(self) -> None:
        self._timer = None
        if not self._pending:
            return
        if self._sent:
            failpoint("cognition.mid_tokens")
        text = "".join(self._pending)
        if self._journal.show(self._step, self._sent, text):
            self._sent += len(text)
            self._pending.clear()
            self._next_send = self._loop.time() + self._linger_s
        else:
            self._pending[:] = [text]
            self._timer = self._loop.call_later(self._linger_s * _BEHIND_LINGERS, self._send)
