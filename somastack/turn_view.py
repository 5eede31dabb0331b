"""Shows a turn on a terminal while it runs: the text as it comes, tool calls, and the outcome.

What is shown live is a preview; the outcome holds the answer. Where the two differ (live events may be dropped, a new
dispatch takes text back) the answer is shown whole once more.
"""

from google.protobuf import json_format, struct_pb2
from rich.console import Console
from rich.text import Text
from soma.common.v1.message_pb2 import Message, Part
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome, TextDelta, ToolCall, ToolResult

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
        self._dispatch = 0
        self._step = 0
        self._shown = ""
        """Text of the running step that is on the screen."""

    def show(self, event: LiveEvent) -> None:
        """Show what happened, unless a newer dispatch of the turn has been seen."""
        if self._quiet or event.dispatch < self._dispatch:
            return
        self._dispatch = event.dispatch
        match event.WhichOneof("event"):
            case "text":
                self._show_text(event.step, event.text)
            case "tool_call":
                self._show_aside(_call_text(event.tool_call))
            case "tool_result":
                self._show_aside(_result_text(event.tool_result))
            case "restarted":
                self._show_aside("the turn starts again from a saved step")

    def finish(self, outcome: Delivery) -> bool:
        """Show how the turn ended; True when the agent answered."""
        answer = text_of(outcome.message)
        if outcome.outcome == Outcome.OUTCOME_FINAL:
            # What the live events brought already is not said twice.
            if not answer.startswith(self._shown):
                self._end_line()
                self._shown = ""
            self._say(answer.removeprefix(self._shown))
            self._end_line()
            return True
        said = from_proto(outcome.error) if outcome.HasField("error") else None
        name = Outcome.Name(outcome.outcome).removeprefix("OUTCOME_").lower()
        self._end_line()
        self._errors.print(Text(f"{name}: {said.message if said else 'the agent gave no answer'}", style="bold red"))
        return False

    def _show_text(self, step: int, delta: TextDelta) -> None:
        if step != self._step:
            self._end_line()
            self._step, self._shown = step, ""
        if delta.offset > len(self._shown):
            return  # A piece was dropped: what follows would not make sense here; the outcome holds everything.
        new = delta.text[len(self._shown) - delta.offset :]
        self._shown += new
        self._say(new)

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


def text_of(message: Message) -> str:
    """The text of a message; other parts are shown as what they are."""
    return "".join(_part_text(part) for part in message.parts)


def _part_text(part: Part) -> str:
    match part.WhichOneof("content"):
        case "text":
            return part.text
        case "data":
            return json_format.MessageToJson(part.data, indent=None, ensure_ascii=False)
        case _:
            return f"[{part.file.name or part.file.uri}]"


def _call_text(call: ToolCall) -> str:
    arguments = ", ".join(f"{name}={_json(value)}" for name, value in call.arguments.fields.items())
    return f"→ {call.tool}({arguments})"


def _result_text(result: ToolResult) -> str:
    if result.HasField("error"):
        return f"← {result.tool} failed: {result.error.message}"
    return f"← {_json(result.result)}"


def _json(value: struct_pb2.Value) -> str:
    return json_format.MessageToJson(value, indent=None, ensure_ascii=False)
