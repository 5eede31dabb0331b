"""Shows a turn on a terminal while it runs: the text as it comes, tool calls, and the outcome.

What is shown live is a preview; the outcome holds the answer. Where the two differ (live events may be dropped, a new
dispatch takes text back) the answer is shown whole once more. An answer of several texts, as when the agent was given
further messages while it answered, is shown text by text.
"""

from google.protobuf import json_format, struct_pb2
from rich.console import Console
from rich.text import Text
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import ArrivalPolicy, Delivery, LiveEvent, Outcome, TextDelta, ToolCall, ToolResult

from soma_common.errors import from_proto


class TurnView:
    """One turn on `console`. What is said is led in by `speaker`; `quiet` shows nothing but the answer, at its end.

    A turn without an answer is told on `errors` (default: `console`).
    """

    def __init__(
        self, console: Console, speaker: str = "", *, quiet: bool = False, errors: Console | None = None
    ) -> None:
        self._console = console
        self._errors = errors or console
        self._speaker = speaker
        self._quiet = quiet
        self._mid_line = False
        self._begin(b"")

    def _begin(self, turn_id: bytes) -> None:
        self._turn_id = turn_id
        self._dispatch = 0
        self._step = 0
        self._shown = ""
        """Text of the running step that is on the screen, if nothing stands below it."""
        self._said: dict[int, str] = {}
        """All text that was shown, by step."""
        self._asides: set[tuple[int, str, int]] = set()
        """Calls and results that were shown: step, kind, number in the step."""

    def show(self, event: LiveEvent) -> None:
        """Show what happened, unless a newer dispatch of the turn has been seen, or it is shown already: who begins to
        watch anew is told the whole turn again.
        """
        if event.turn_id != self._turn_id:  # The message went over to another turn, which answers it.
            self._begin(event.turn_id)
        if self._quiet or event.dispatch < self._dispatch:
            return
        self._dispatch = event.dispatch
        match event.WhichOneof("event"):
            case "text":
                self._show_text(event.step, event.text)
            case "tool_call":
                self._show_once((event.step, "call", event.tool_call.index), call_text(event.tool_call))
            case "tool_result":
                self._show_once((event.step, "result", event.tool_result.index), result_text(event.tool_result))
            case "restarted":
                again = event.restarted.from_step
                self._said = {step: text for step, text in self._said.items() if step < again}
                self._asides = {aside for aside in self._asides if aside[0] < again}
                self._show_aside("the turn starts again from a saved step")
            case "ended":
                self._show_aside(f"{outcome_name(event.ended.outcome)}: {_why(event.ended)}")

    def waits(self, held: str) -> None:
        """Show what the message waits for. No part of the answer: `quiet` puts it where failures are told."""
        if self._quiet:
            self._errors.print(Text(f"waiting: {held}", style="dim"))
        else:
            self._show_aside(f"waiting: {held}")

    def finish(self, outcome: Delivery) -> bool:
        """Show how the turn ended; True when the agent answered."""
        texts = [part_text(part) for part in outcome.message.parts]
        if outcome.outcome == Outcome.OUTCOME_FINAL:
            self._say_the_rest(texts)
            return True
        kept = [part.text for part in outcome.message.parts if part.text]  # Calls are kept too, in parts of their own.
        if any(text not in self._said.values() for text in kept):
            self._say_the_rest(kept)
        self._end_line()
        self._errors.print(Text(f"{outcome_name(outcome.outcome)}: {_why(outcome)}", style="bold red"))
        return False

    def _say_the_rest(self, texts: list[str]) -> None:
        """Show what the live events have not brought: what stands there already is not said twice."""
        *before, newest = texts or [""]
        earlier = [text for step, text in sorted(self._said.items()) if step != self._step]
        if before and earlier[-len(before) :] != before:
            newest = "\n".join(texts)
        if not newest.startswith(self._shown):
            self._end_line()
            self._shown = ""
        self._say(newest.removeprefix(self._shown))
        self._end_line()

    def _show_text(self, step: int, delta: TextDelta) -> None:
        if step < self._step and step in self._said:
            return
        if step != self._step:
            self._end_line()
            self._step, self._shown = step, ""
        if delta.offset > len(self._shown):
            return  # A piece was dropped: what follows would not make sense here; the outcome holds everything.
        new = delta.text[len(self._shown) - delta.offset :]
        self._shown += new
        self._said[step] = self._shown
        self._say(new)

    def _show_once(self, aside: tuple[int, str, int], text: str) -> None:
        if aside not in self._asides:
            self._asides.add(aside)
            self._show_aside(text)

    def _show_aside(self, text: str) -> None:
        self._end_line()
        self._shown = ""
        self._console.print(Text(f"  {text}", style="dim"))

    def _say(self, text: str) -> None:
        if not self._mid_line and self._speaker:
            self._console.print(Text(f"{self._speaker}> ", style="bold cyan"), end="")
        self._mid_line = True
        # As it is: an answer may hold what looks like markup.
        self._console.file.write(text)
        self._console.file.flush()

    def _end_line(self) -> None:
        if self._mid_line:
            self._console.file.write("\n")
            self._console.file.flush()
        self._mid_line = False


def outcome_name(outcome: Outcome.ValueType) -> str:
    """For example `final`."""
    return Outcome.Name(outcome).removeprefix("OUTCOME_").lower()


def policy_name(policy: ArrivalPolicy.ValueType) -> str:
    """For example `enqueue`."""
    return ArrivalPolicy.Name(policy).removeprefix("ARRIVAL_POLICY_").lower()


def text_of(message: Message) -> str:
    """The texts of a message, a line each; other parts are shown as what they are."""
    return "\n".join(part_text(part) for part in message.parts)


def part_text(part: Part) -> str:
    """A part of a message: its text, or what else it is."""
    match part.WhichOneof("content"):
        case "text":
            return part.text
        case "data":
            return json_format.MessageToJson(part.data, indent=None, ensure_ascii=False)
        case _:
            return f"[{part.file.name or part.file.uri}]"


def call_text(call: ToolCall) -> str:
    """A call as its tool and arguments."""
    arguments = ", ".join(f"{name}={_json(value)}" for name, value in call.arguments.fields.items())
    return f"→ {call.tool}({arguments})"


def result_text(result: ToolResult) -> str:
    """What a tool answered, or why it did not."""
    if result.HasField("error"):
        return f"← {result.tool} failed: {result.error.message}"
    return f"← {_json(result.result)}"


def _why(outcome: Delivery) -> str:
    if outcome.HasField("error"):
        return from_proto(outcome.error).message
    match outcome.outcome:
        case Outcome.OUTCOME_INTERRUPTED:
            return "the turn was stopped, what it has done is kept"
        case Outcome.OUTCOME_CANCELLED:
            return "the turn was stopped"
        case Outcome.OUTCOME_ABSORBED:
            return f"turn {outcome.absorbed_into.hex()} answers its messages"
        case _:
            return "the agent gave no answer"


def _json(value: struct_pb2.Value) -> str:
    return json_format.MessageToJson(value, indent=None, ensure_ascii=False)
