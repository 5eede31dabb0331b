"""Live text: complete, in order, no more often than allowed, and patient with a router that is behind. On a clock that
only the tests move, so that the bounds are counted and not timed."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import example, given
from hypothesis import strategies as st
from soma.common.v1 import turn_pb2

from services.cognition.application.ports import GoOn
from services.cognition.application.run_turn import RunPolicy
from services.cognition.application.stream_text import TextStream, Timer

LINGER_MS = 20


class HandMovedTimer:
    """Something that happens when time is moved, unless it is cancelled."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self._callback = None

    def happen(self) -> None:
        if self._callback is not None:
            self._callback()


class HandMovedTimers:
    """Timers whose time is moved by hand, in whole milliseconds."""

    def __init__(self) -> None:
        self.now_ms = 0
        self._due: list[tuple[int, int, HandMovedTimer]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now_ms / 1000

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        timer = HandMovedTimer(callback)
        heapq.heappush(self._due, (round(when * 1000), next(self._numbers), timer))
        return timer

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return self.call_at(self.time() + delay, callback)

    def move(self, milliseconds: int) -> None:
        """Lets time pass, and what is due happen when it is due."""
        until = self.now_ms + milliseconds
        while self._due and self._due[0][0] <= until:
            self.now_ms, _, timer = heapq.heappop(self._due)
            timer.happen()
        self.now_ms = until


@dataclass(frozen=True)
class Frame:
    """A text as it was shown."""

    at_ms: int
    offset: int
    text: str


class Shown:
    """A router that takes texts, or refuses while `behind`."""

    def __init__(self, timers: HandMovedTimers) -> None:
        self.frames: list[Frame] = []
        self.behind = False
        self._timers = timers

    def show(self, step: int, offset: int, text: str) -> bool:
        if self.behind:
            return False
        assert offset == len(self.whole), "a gap or a repetition"
        self.frames.append(Frame(self._timers.now_ms, offset, text))
        return True

    @property
    def inputs(self) -> list[bytes]:
        raise AssertionError("text reads nothing")

    async def record(self, step: int, body: turn_pb2.StepBody) -> None:
        raise AssertionError("text journals nothing")

    def conclude(self, step: int, body: turn_pb2.StepBody, inputs_seen: int, go_on: GoOn) -> bool:
        raise AssertionError("text ends nothing")

    def fail(self, step: int, body: turn_pb2.StepBody) -> None:
        raise AssertionError("text ends nothing")

    @property
    def whole(self) -> str:
        return "".join(frame.text for frame in self.frames)

    @property
    def shown(self) -> list[tuple[int, str]]:
        return [(frame.at_ms, frame.text) for frame in self.frames]


def stage() -> tuple[HandMovedTimers, Shown, TextStream]:
    timers = HandMovedTimers()
    shown = Shown(timers)
    return timers, shown, TextStream(shown, 1, LINGER_MS / 1000, timers)


def test_the_first_piece_goes_at_once_and_the_rest_is_gathered() -> None:
    timers, shown, text = stage()
    timers.move(7)
    for piece in ("one", " two", " three"):
        text.add(piece)
    assert shown.shown == [(7, "one")]
    timers.move(LINGER_MS - 1)
    assert shown.shown == [(7, "one")]
    timers.move(1)
    assert shown.shown == [(7, "one"), (7 + LINGER_MS, " two three")]


def test_a_piece_after_a_pause_goes_at_once() -> None:
    timers, shown, text = stage()
    text.add("one")
    timers.move(500)
    text.add(" two")
    assert shown.shown == [(0, "one"), (500, " two")]


gaps_and_pieces = st.lists(st.tuples(st.integers(0, 60), st.text(min_size=1, max_size=3)), min_size=1, max_size=60)


@given(gaps_and_pieces)
@example([(0, "a")] + [(1, "b")] * 400)  # a model far faster than the bound
def test_frames_are_as_few_as_allowed_and_no_piece_waits_longer(pieces: list[tuple[int, str]]) -> None:
    timers, shown, text = stage()
    added: list[int] = []  # when each character came
    for gap_ms, piece in pieces:
        timers.move(gap_ms)
        text.add(piece)
        added += [timers.now_ms] * len(piece)
    lasted_ms = timers.now_ms - added[0]
    timers.move(LINGER_MS)
    assert shown.whole == "".join(piece for _, piece in pieces)
    assert shown.frames[0].at_ms == added[0], "the first piece waits for nothing"
    assert len(shown.frames) <= lasted_ms // LINGER_MS + 2
    starts = [frame.at_ms for frame in shown.frames]
    assert all(later - earlier >= LINGER_MS for earlier, later in itertools.pairwise(starts))
    for frame in shown.frames:
        for came in added[frame.offset : frame.offset + len(frame.text)]:
            assert frame.at_ms - came <= LINGER_MS


def test_the_bound_is_the_one_that_turns_run_with() -> None:
    assert RunPolicy().text_linger_s == LINGER_MS / 1000


def test_a_router_that_is_behind_gets_one_longer_piece_later() -> None:
    timers, shown, text = stage()
    text.add("a")
    shown.behind = True
    for _ in range(50):
        text.add("b")
        timers.move(2)
    assert shown.shown == [(0, "a")]
    shown.behind = False
    timers.move(10 * LINGER_MS)
    assert [frame.text for frame in shown.frames] == ["a", "b" * 50]


def test_finish_sends_the_rest_and_close_forgets_it() -> None:
    wholes: list[str] = []
    for ends in (TextStream.finish, TextStream.close):
        timers, shown, text = stage()
        assert not text.started
        text.add("x")
        text.add("y")
        assert text.started
        ends(text)
        timers.move(10 * LINGER_MS)
        wholes.append(shown.whole)
    assert wholes == ["xy", "x"]


@given(st.lists(st.tuples(st.text(max_size=3), st.booleans(), st.integers(0, 150)), max_size=15))
def test_whatever_happens_the_text_has_no_gap(events: list[tuple[str, bool, int]]) -> None:
    timers, shown, text = stage()
    for piece, behind, gap_ms in events:
        shown.behind = behind
        text.add(piece)
        timers.move(gap_ms)
    shown.behind = False
    text.finish()
    assert shown.whole == "".join(piece for piece, _, _ in events)
