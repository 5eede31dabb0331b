"""Live text: complete, in order, no more often than allowed, and patient with a router that is behind."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from soma.common.v1 import turn_pb2

from services.cognition.application.stream_text import TextStream


class Shown:
    """A router that takes texts, or refuses while `behind`."""

    def __init__(self) -> None:
        self.texts: list[tuple[int, str]] = []
        self.times: list[float] = []
        self.behind = False

    def show(self, step: int, offset: int, text: str) -> bool:
        if self.behind:
            return False
        self.texts.append((offset, text))
        self.times.append(asyncio.get_running_loop().time())
        return True

    @property
    def inputs(self) -> list[bytes]:
        raise AssertionError("text reads nothing")

    async def record(self, step: int, body: turn_pb2.StepBody) -> None:
        raise AssertionError("text journals nothing")

    async def conclude(self, step: int, body: turn_pb2.StepBody, inputs_seen: int) -> bool:
        raise AssertionError("text ends nothing")

    def fail(self, step: int, body: turn_pb2.StepBody) -> None:
        raise AssertionError("text ends nothing")

    @property
    def whole(self) -> str:
        whole = ""
        for offset, text in self.texts:
            assert offset == len(whole), "a gap or a repetition"
            whole += text
        return whole


def stream(shown: Shown, linger_s: float) -> TextStream:
    return TextStream(shown, 1, linger_s, asyncio.get_running_loop())


async def test_the_first_piece_goes_at_once_and_the_rest_is_gathered() -> None:
    shown = Shown()
    text = stream(shown, 0.05)
    for piece in ("one", " two", " three"):
        text.add(piece)
    assert shown.texts == [(0, "one")]
    await asyncio.sleep(0.08)
    assert shown.texts == [(0, "one"), (3, " two three")]
    assert shown.times[1] - shown.times[0] >= 0.045
    text.close()


async def test_a_router_that_is_behind_gets_one_longer_piece_later() -> None:
    shown = Shown()
    text = stream(shown, 0.01)
    text.add("a")
    shown.behind = True
    for _ in range(50):
        text.add("b")
        await asyncio.sleep(0.002)
    assert shown.texts == [(0, "a")]
    shown.behind = False
    await asyncio.sleep(0.1)
    assert shown.texts == [(0, "a"), (1, "b" * 50)]
    text.close()


async def test_finish_sends_the_rest_and_close_forgets_it() -> None:
    finished, closed = Shown(), Shown()
    for shown in (finished, closed):
        text = stream(shown, 0.03)
        assert not text.started
        text.add("x")
        text.add("y")
        assert text.started
        if shown is finished:
            text.finish()
        else:
            text.close()
    await asyncio.sleep(0.06)
    assert finished.whole == "xy"
    assert closed.whole == "x"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=3), st.booleans(), st.booleans()), max_size=15))
def test_whatever_happens_the_text_has_no_gap(events: list[tuple[str, bool, bool]]) -> None:
    async def run() -> None:
        shown = Shown()
        text = stream(shown, 0.001)
        for piece, behind, wait in events:
            shown.behind = behind
            text.add(piece)
            await asyncio.sleep(0.002 if wait else 0)
        shown.behind = False
        text.finish()
        assert shown.whole == "".join(piece for piece, _, _ in events)

    asyncio.run(run())
