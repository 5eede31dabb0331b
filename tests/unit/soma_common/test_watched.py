"""Watchers are held to what others saw, to the journal and to the delivery."""

from collections.abc import Callable

import pytest
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import (
    Delivery,
    FinalMessage,
    LiveEvent,
    ModelReply,
    Outcome,
    Step,
    StepBody,
    TextDelta,
    ToolCall,
)

from soma_common.testing.watched import Watched, watched_violations

TURN = bytes(range(16))
CALL = ToolCall(index=0, tool="book")
JOURNALS = {
    TURN.hex(): [
        Step(number=1, dispatch=1, body=StepBody(model_reply=ModelReply(text="let me see", tool_calls=[CALL]))),
        Step(number=2, dispatch=2, body=StepBody(final=FinalMessage(message=Message(parts=[Part(text="it is done")])))),
    ]
}
ANSWER = Delivery(outcome=Outcome.OUTCOME_FINAL, message=Message(parts=[Part(text="it is done")]), position=4)


def text(step: int, offset: int, said: str, dispatch: int = 1) -> LiveEvent:
    return LiveEvent(turn_id=TURN, dispatch=dispatch, step=step, text=TextDelta(offset=offset, text=said))


def call(tool: str) -> LiveEvent:
    return LiveEvent(turn_id=TURN, dispatch=1, step=1, tool_call=ToolCall(index=0, tool=tool))


def saw(*events: LiveEvent, outcome: Delivery | None = None) -> Watched:
    watcher = Watched("somebody")
    for event in events:
        watcher.saw(event)
    if outcome is not None:
        watcher.ended(TURN.hex(), outcome)
    return watcher


def test_silent_when_all_saw_the_same() -> None:
    taken_back = text(2, 0, "it was not")
    whole = saw(
        text(1, 0, "let "), text(1, 4, "me see"), call("book"), taken_back, text(2, 0, "it is done", 2), outcome=ANSWER
    )
    late = saw(text(1, 0, "let me see", 2), text(2, 6, "done", 2))
    assert watched_violations([whole, late], JOURNALS, {TURN.hex(): ANSWER}) == []
    assert (whole.gaps, late.gaps) == (0, 1)


OTHER = Delivery(outcome=Outcome.OUTCOME_FINAL, message=Message(parts=[Part(text="it is not")]))
BROKEN: dict[str, tuple[Callable[[], list[Watched]], str]] = {
    "another text than the journal's": (lambda: [saw(text(1, 4, "you see"))], "dispatch 1 step 1: 'you see' at 4"),
    "more than the journal's": (lambda: [saw(text(1, 0, "let me see it"))], "step 1"),
    "two texts of what was taken back": (
        lambda: [saw(text(2, 0, "it was")), saw(text(2, 3, "wos"))],
        "dispatch 1 step 2: 'wos' at 3",
    ),
    "a call that nobody journaled": (lambda: [saw(call("charge"))], "calls is not in the journal"),
    "a call in two ways": (lambda: [saw(call("book"), call("charge"))], "shown in two ways"),
    "an older dispatch": (lambda: [saw(text(2, 0, "it", 2), text(2, 0, "it"))], "stale event"),
    "another end than the adapter": (lambda: [saw(outcome=OTHER)], "ended otherwise"),
}


@pytest.mark.parametrize(("watchers", "problem"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_agree_is_named(watchers: Callable[[], list[Watched]], problem: str) -> None:
    found = watched_violations(watchers(), JOURNALS, {TURN.hex(): ANSWER})
    assert any(problem in violation for violation in found), found


def test_another_stream_may_be_behind() -> None:
    watcher = saw(text(2, 0, "it", 2))
    watcher.came_back()
    watcher.saw(text(2, 0, "it"))
    assert watched_violations([watcher], JOURNALS, {}) == []
