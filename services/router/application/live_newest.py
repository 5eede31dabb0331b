"""The newest of what a running turn has said and done, as events that fit a number of bytes.

What is left out is what came first, and nothing says so but the places of what is shown: a text begins beyond offset
0, a call or result in a step behind the turn's first. What was lost on its way leaves the same gap.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Final

from soma.common.v1.turn_pb2 import LiveEvent, TextDelta

from services.router.application.step_events import TEXT_PIECE, StepContent
from services.router.application.watch_pages import origin_of, running_state

if TYPE_CHECKING:
    from services.router.domain.session import Turn

_FRAMING: Final = 16
"""Most bytes of a text event beside its text and its place in the turn: tags, lengths and the offset."""


def newest_that_fit(turn: Turn, room: int) -> list[LiveEvent]:
    """The turn's state, which names its messages and is there even without room, and then the newest events, in order,
    that fit `room` bytes together with it.
    """
    state = running_state(turn)
    room -= state.ByteSize()
    newest: list[LiveEvent] = []
    for event in _backwards(turn, room):
        room -= event.ByteSize()
        if room < 0:
            break
        newest.append(event)
    return [state, *reversed(newest)]


def content_bytes(turn: Turn) -> int:
    """About how much all events of a turn take, in bytes; asked without reading them."""
    return sum(map(len, turn.journal)) + turn.text_length


def _backwards(turn: Turn, room: int) -> Iterator[LiveEvent]:
    """Events from the newest on. Nothing is read that is larger than `room` bytes and so cannot fit."""
    if room <= 0 or not (yield from _newest_text(turn, room)):
        return
    origin = origin_of(turn)
    for number in range(turn.step_count, 0, -1):
        body = turn.journal[number - 1]
        if len(body) > room:
            return
        yield from reversed(list(StepContent.of(body).events(origin, turn.dispatch, number)))


def _newest_text(turn: Turn, room: int) -> Generator[LiveEvent, None, bool]:
    """What the model said last in the running step, as much as fits, the newest piece first. Returns whether that is
    all of it.
    """
    origin, step = origin_of(turn), turn.step_count + 1
    place = origin.event(turn.dispatch, step).ByteSize() + _FRAMING
    room -= place * (1 + room // TEXT_PIECE)
    if room <= 0:
        return not turn.text_length
    said: list[str] = []
    length = 0
    for piece in reversed(turn.text):
        if length >= room:
            break
        said.append(piece)
        length += len(piece)
    # Cut in bytes, of which a code point may have several: what is left of one at the cut is dropped.
    text = "".join(reversed(said)).encode()[-room:].decode(errors="ignore")
    begin = turn.text_length - len(text)
    for offset in reversed(range(0, len(text), TEXT_PIECE)):
        event = origin.event(turn.dispatch, step)
        event.text.CopyFrom(TextDelta(offset=begin + offset, text=text[offset : offset + TEXT_PIECE]))
        yield event
    return begin == 0
