"""A turn on a terminal."""

import io

from google.protobuf.struct_pb2 import Struct, Value
from rich.console import Console
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error, Message, Part
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome, TextDelta, ToolCall, ToolResult, TurnRestarted

from somastack.turn_view import TurnView


def text(offset: int, said: str, *, step: int = 1, dispatch: int = 1) -> LiveEvent:
    return LiveEvent(dispatch=dispatch, step=step, text=TextDelta(offset=offset, text=said))


def final(said: str) -> Delivery:
    return Delivery(outcome=Outcome.OUTCOME_FINAL, message=Message(parts=[Part(text=said)]))


class Screen:
    """A console whose output can be read."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._out = io.StringIO()
        self.view = TurnView(Console(file=self._out, no_color=True, soft_wrap=True), quiet=quiet)

    @property
    def shown(self) -> str:
        return self._out.getvalue()


def test_streamed_text_is_not_said_twice() -> None:
    screen = Screen()
    for event in (text(0, "Hel"), text(3, "lo "), text(0, "Hello "), text(6, "you")):
        screen.view.show(event)
    assert screen.view.finish(final("Hello you."))
    assert screen.shown == "Hello you.\n"


def test_dropped_pieces_are_made_good_by_the_answer() -> None:
    screen = Screen()
    screen.view.show(text(0, "Hello "))
    screen.view.show(text(9, "lost"))
    screen.view.finish(final("Hello all you lost"))
    assert screen.shown == "Hello all you lost\n"


def test_text_that_was_taken_back_is_followed_by_the_whole_answer() -> None:
    screen = Screen()
    screen.view.show(text(0, "I think"))
    screen.view.show(LiveEvent(dispatch=2, step=1, restarted=TurnRestarted(from_step=1)))
    screen.view.show(text(7, " stale", dispatch=1))
    screen.view.show(text(0, "I know", dispatch=2))
    screen.view.finish(final("I know"))
    lines = screen.shown.splitlines()
    assert lines[0] == "I think"
    assert lines[-1] == "I know"
    assert "stale" not in screen.shown


def test_tool_calls_are_shown() -> None:
    screen = Screen()
    arguments = Struct()
    arguments["expression"] = "17*23"
    screen.view.show(LiveEvent(dispatch=1, step=1, tool_call=ToolCall(tool="calculate", arguments=arguments)))
    result = ToolResult(tool="calculate", result=Value(number_value=391))
    screen.view.show(LiveEvent(dispatch=1, step=2, tool_result=result))
    assert 'calculate(expression="17*23")' in screen.shown
    assert "391" in screen.shown


def test_the_speaker_leads_in_what_is_said() -> None:
    out = io.StringIO()
    view = TurnView(Console(file=out, no_color=True), "assistant")
    view.show(text(0, "Let me see"))
    view.show(LiveEvent(dispatch=1, step=1, tool_call=ToolCall(tool="current_time")))
    view.show(text(0, "It is", step=3))
    view.finish(final("It is late."))
    assert out.getvalue() == "assistant> Let me see\n  → current_time()\nassistant> It is late.\n"


def test_quiet_shows_the_answer_alone() -> None:
    screen = Screen(quiet=True)
    screen.view.show(text(0, "17*23"))
    screen.view.finish(final("391 [b]"))
    assert screen.shown == "391 [b]\n"


def test_what_a_message_waits_for_is_no_part_of_the_answer() -> None:
    told, out = io.StringIO(), io.StringIO()
    view = TurnView(Console(file=out, no_color=True), quiet=True, errors=Console(file=told, no_color=True))
    view.waits("agent [b] is paused")
    view.finish(final("391"))
    assert (told.getvalue(), out.getvalue()) == ("waiting: agent [b] is paused\n", "391\n")
    screen = Screen()
    screen.view.waits("behind 1 message")
    assert screen.shown == "  waiting: behind 1 message\n"


def test_an_outcome_that_is_no_answer_says_why() -> None:
    screen = Screen()
    error = Error(reason=ErrorReason.ERROR_REASON_MODEL_UNAVAILABLE, message="the model does not answer")
    assert not screen.view.finish(Delivery(outcome=Outcome.OUTCOME_ERROR, error=error))
    assert screen.shown == "error: the model does not answer\n"


def test_an_answer_of_several_texts_is_not_said_twice() -> None:
    """The agent was given a further message while it answered: its first reply is a part of the answer."""
    screen = Screen()
    screen.view.show(text(0, "It rains."))
    screen.view.show(text(0, "And in Rome", step=2))
    answer = Message(parts=[Part(text="It rains."), Part(text="And in Rome it shines.")])
    assert screen.view.finish(Delivery(outcome=Outcome.OUTCOME_FINAL, message=answer))
    assert screen.shown == "It rains.\nAnd in Rome it shines.\n"


def test_an_answer_whose_first_text_was_not_seen_is_said_whole() -> None:
    screen = Screen()
    screen.view.show(text(0, "And in Rome", step=2))
    answer = Message(parts=[Part(text="It rains."), Part(text="And in Rome it shines.")])
    screen.view.finish(Delivery(outcome=Outcome.OUTCOME_FINAL, message=answer))
    assert screen.shown == "And in Rome\nIt rains.\nAnd in Rome it shines.\n"


def test_a_watch_that_begins_anew_repeats_nothing() -> None:
    screen = Screen()
    call = LiveEvent(dispatch=1, step=1, tool_call=ToolCall(tool="current_time"))
    events = [text(0, "Let me see"), call, text(0, "It is", step=3)]
    for event in (*events, *events, text(5, " late.", step=3)):
        screen.view.show(event)
    screen.view.finish(final("It is late."))
    assert screen.shown == "Let me see\n  → current_time()\nIt is late.\n"


def test_what_an_interrupted_turn_keeps_is_shown_once() -> None:
    for seen in ("It rai", "It rains, but", ""):
        screen = Screen()
        if seen:
            screen.view.show(text(0, seen))
        kept = Message(parts=[Part(text="It rains, but"), Part(data=Struct())])
        assert not screen.view.finish(Delivery(outcome=Outcome.OUTCOME_INTERRUPTED, message=kept))
        assert screen.shown == "It rains, but\ninterrupted: the turn was stopped, what it has done is kept\n"


def test_a_message_that_goes_over_to_another_turn_is_followed_there() -> None:
    screen = Screen()
    first, second = bytes(16), bytes([1]) * 16
    screen.view.show(LiveEvent(turn_id=first, dispatch=3, step=1, text=TextDelta(text="It rai")))
    given_up = Delivery(outcome=Outcome.OUTCOME_ABSORBED, absorbed_into=second)
    screen.view.show(LiveEvent(turn_id=first, dispatch=3, step=1, ended=given_up))
    screen.view.show(LiveEvent(turn_id=second, dispatch=1, step=1, text=TextDelta(text="It sno")))
    assert screen.view.finish(final("It snows."))
    assert screen.shown == f"It rai\n  absorbed: turn {second.hex()} answers its messages\nIt snows.\n"
