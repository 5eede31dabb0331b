"""The built-in offline model: no network, no key, the same answer every time (port `Model`).

It is there so that everything around a model can be tried without one: it says that it is offline in the first answer
of a session, streams word by word, calls tools when the text asks for it, and knows what was said before. It
understands a few patterns of English and nothing else; `_INTENTS` lists them in the order they are tried.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.application.ports import Emit, ModelAnswer, ModelRequest, RequestedCall, ToolDescription
from services.cognition.domain.conversation import Json, text_of, to_dict, to_json
from services.cognition.domain.turn import is_interim

MODEL_NAME: Final = "offline/assistant"

INTRODUCTION: Final = (
    "I am SomaStack's built-in offline model: no model endpoint is configured, so I answer by simple rules. "
    "Set SOMA_OPENAI_BASE_URL or SOMA_OPENAI_API_KEY and an openai/... model for real answers. "
)

_MOST_CALLS: Final = 16
"""Tools it calls at once; more wait for the next reply."""

_READ_CHARS: Final = 2000
"""How much of a text the rules look at, in characters. They run on the event loop, which everything else of the brain
waits for meanwhile, and what they look for stands at the beginning."""

# Each pattern takes time linear in the text: no repetition is tried again with fewer, and none from each place of what
# it repeats.
_CALCULUS: Final = re.compile(r"[\d\s.,()+\-*/^%x\xd7\xf7]+")
_BEGIN: Final = re.compile(r"[-+]?[\d.(]")
_OPERATOR: Final = re.compile(r"\d\s*+\)?+\s*+(?:[+\-*/^%x\xd7\xf7]|\*\*)\s*+[-+]?[\d.(]")
_REMEMBER: Final = re.compile(
    r"^\W*(?:please\s+)?(?:remember|note|keep in mind)\b(?:\s+that\b)?[\s:,]*(?P<note>.+)", re.I | re.S
)
_ASKS: Final = re.compile(r"\b(?:what|which|tell me|show|list|recall)\b", re.I)
_OF_NOTES: Final = re.compile(r"\b(?:remember|remembered|notes?|noted|recall)\b", re.I)
_RECALL: Final = re.compile(r"\bdo you remember\b", re.I)
_WHAT: Final = re.compile(r"\bwhat(?:'s| is)?\b", re.I)
_OF_TIME: Final = re.compile(r"\b(?:time|date|day)\b", re.I)
_TIME: Final = re.compile(r"\bcurrent (?:time|date)\b", re.I)
_FIRST: Final = re.compile(r"\bwhat did i (?:\w+ ){1,3}first\b|\bmy first message\b", re.I)
_LAST: Final = re.compile(r"\bwhat did i (?:just|last)\b|\bwhat did i say before\b|\bmy last message\b", re.I)
_COUNT: Final = re.compile(r"\bhow many (?:messages|times|things)\b", re.I)
_GREETING: Final = re.compile(r"^\W*(?:hello|hi|hey|good (?:morning|afternoon|evening))\b", re.I)
_THANKS: Final = re.compile(r"\b(?:thanks|thank you)\b", re.I)
_HELP: Final = re.compile(r"^\W*(?:help|what can you do|who are you)\b", re.I)
_SIGNS: Final = str.maketrans({"x": "*", "\xd7": "*", "\xf7": "/", ",": ""})


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a text asks a tool for: the tool, its one argument if it takes one, and the name tried for it first."""

    tool: str
    argument: str = ""
    usual_name: str = ""


class OfflineModel:
    """Answers by rules; `word_delay_s` is the wait before each word, so that streaming can be seen."""

    def __init__(self, word_delay_s: float = 0.0) -> None:
        self._word_delay_s = word_delay_s

    async def answer(self, request: ModelRequest, emit: Emit) -> ModelAnswer:
        """Calls the tools that its unanswered inputs ask for; then replies to each of them in order. Never fails."""
        conversation, tools = request.conversation, request.tools
        waiting = [text_of(message) for message in conversation.unanswered()]
        calls = [call for text in waiting if (call := _call_for(text, tools)) is not None]
        results = _results(conversation.steps)
        if further := calls[len(results) :][:_MOST_CALLS]:
            return ModelAnswer("", further, input_tokens=sum(map(_count_words, waiting)), model=MODEL_NAME)
        earlier = [m for m in conversation.context() if m.role != message_pb2.ROLE_ASSISTANT]
        said = [text_of(message) for message in [*earlier, *conversation.inputs()]]
        replies: list[str] = []
        for place, text in enumerate(waiting, start=len(said) - len(waiting)):
            if _call_for(text, tools) is None:
                replies.append(_reply(text, said[:place], tools))
            elif results:
                replies.append(_phrase(results.pop(0)))
        replies += map(_phrase, results)  # of a turn that another model began
        return await self._say(_introduced(request, " ".join(replies) or _abilities(tools)), waiting, emit)

    async def _say(self, text: str, waiting: Sequence[str], emit: Emit) -> ModelAnswer:
        for piece in re.findall(r"\S+\s*|\s+", text):
            if self._word_delay_s:
                await asyncio.sleep(self._word_delay_s)
            emit(piece)
        read = sum(map(_count_words, waiting))
        return ModelAnswer(text, input_tokens=read, output_tokens=_count_words(text), model=MODEL_NAME)


def wish_of(text: str) -> _Wish | None:
    """The tool a text asks for at its beginning, or None if it asks for none. A note is all that follows."""
    head = text[:_READ_CHARS]
    recalls = _RECALL.search(head) or _asks(head, _ASKS, _OF_NOTES)
    if not recalls and (remember := _REMEMBER.match(head)):
        return _Wish("remember_note", text[remember.start("note") :].strip().rstrip("."), "note")
    if recalls:
        return _Wish("recall_notes")
    expression = expression_of(text)
    if expression:
        return _Wish("calculate", expression, "expression")
    return _Wish("current_time") if _TIME.search(head) or _asks(head, _WHAT, _OF_TIME) else None


def _asks(text: str, asks: re.Pattern[str], about: re.Pattern[str]) -> bool:
    """Whether a line asks and goes on about something."""
    return any((asked := asks.search(line)) and about.search(line, asked.end()) for line in text.split("\n"))


def expression_of(text: str) -> str:
    """The arithmetic at the beginning of a text, as a calculator reads it; empty if there is none. A date or a lone
    number is none, nor is what goes on beyond what is looked at: half of a sum has another value."""
    head = text[:_READ_CHARS]
    for match in _CALCULUS.finditer(head):
        if match.end() == _READ_CHARS < len(text):
            break
        found = _trimmed(match.group())
        if _OPERATOR.search(found) and not re.fullmatch(r"\d{4}-\d{1,2}-\d{1,2}", found):
            return found.translate(_SIGNS).replace("^", "**")
    return ""


def _trimmed(calculus: str) -> str:
    """From the first number or parenthesis, with its sign, to the last; empty if there are not two."""
    begin = _BEGIN.search(calculus)
    end = max((place for place, sign in enumerate(calculus) if sign == ")" or sign.isdecimal()), default=-1)
    return calculus[begin.start() : end + 1] if begin is not None and end >= begin.end() else ""


def _call_for(text: str, tools: Sequence[ToolDescription]) -> RequestedCall | None:
    """The call a text asks for, if it asks for one and the tool is there."""
    wish = wish_of(text)
    tool = next((tool for tool in tools if wish is not None and tool.name == wish.tool), None)
    if wish is None or tool is None:
        return None
    return RequestedCall(call_id="", tool=tool.name, arguments=_arguments(wish, tool))


def _reply(text: str, said: Sequence[str], tools: Sequence[ToolDescription]) -> str:
    """An answer to a text that no tool is called for."""
    wish = wish_of(text)
    return talk(text, said, tools) if wish is None else _without_tool(wish)


def talk(text: str, said: Sequence[str], tools: Sequence[ToolDescription]) -> str:
    """An answer without tools, from the text and what the user said before (oldest first)."""
    head = text[:_READ_CHARS]
    for pattern, reply in _INTENTS:
        if pattern.search(head):
            return reply(said, tools)
    return f'You said: "{_shortened(text)}". {_abilities(tools)}'


def _first(said: Sequence[str], _: Sequence[ToolDescription]) -> str:
    if not said:
        return "This is the first thing you say here."
    return f'The first thing you said here was: "{_shortened(said[0])}".'


def _last(said: Sequence[str], _: Sequence[ToolDescription]) -> str:
    return f'Just before, you said: "{_shortened(said[-1])}".' if said else "You have said nothing before this."


def _how_many(said: Sequence[str], _: Sequence[ToolDescription]) -> str:
    return f"You have sent {len(said) + 1} messages in this conversation, as far as I can see back."


def _greet(said: Sequence[str], tools: Sequence[ToolDescription]) -> str:
    return f"Hello{' again' if said else ''}! {_abilities(tools)}"


def _welcome(_: Sequence[str], __: Sequence[ToolDescription]) -> str:
    return "You are welcome."


def _help(_: Sequence[str], tools: Sequence[ToolDescription]) -> str:
    return _abilities(tools)


_INTENTS: Final[Sequence[tuple[re.Pattern[str], Callable[[Sequence[str], Sequence[ToolDescription]], str]]]] = (
    (_FIRST, _first),
    (_LAST, _last),
    (_COUNT, _how_many),
    (_HELP, _help),
    (_GREETING, _greet),
    (_THANKS, _welcome),
)

_ABILITIES: Final[Mapping[str, str]] = {
    "calculate": '"what is 17*23"',
    "current_time": '"what time is it"',
    "remember_note": '"remember that my train leaves at nine"',
    "recall_notes": '"what did I ask you to remember"',
}


def _abilities(tools: Sequence[ToolDescription]) -> str:
    examples = [_ABILITIES[tool.name] for tool in tools if tool.name in _ABILITIES]
    return "Try " + ", ".join([*examples, '"what did I say first"']) + "."


def _introduced(request: ModelRequest, text: str) -> str:
    """The first answer of a session says what is answering."""
    is_first = request.conversation.is_first_turn and not request.conversation.interim_texts()
    return INTRODUCTION + text if is_first else text


def _without_tool(wish: _Wish) -> str:
    return (
        f"For that I would need the tool {wish.tool}, which this agent may not use or the tool gateway does not know."
    )


def _arguments(wish: _Wish, tool: ToolDescription) -> Mapping[str, Json]:
    """The one argument, under the name the tool's own schema gives it."""
    if not wish.argument:
        return {}
    required = tool.parameters.get("required")
    properties = tool.parameters.get("properties")
    names = [name for name in (required if isinstance(required, list) else ()) if isinstance(name, str)]
    names += list(properties) if isinstance(properties, dict) else []
    name = wish.usual_name if wish.usual_name in names or not names else names[0]
    return {name: wish.argument}


def _results(steps: Sequence[turn_pb2.StepBody]) -> list[tuple[turn_pb2.ToolCall, turn_pb2.ToolResult]]:
    """The calls of this turn with what they brought, as far as no interim reply has told of them."""
    pairs: list[tuple[turn_pb2.ToolCall, turn_pb2.ToolResult]] = []
    for reply, results in pairwise(steps):
        if is_interim(reply):
            pairs.clear()
        elif reply.WhichOneof("body") == "model_reply":
            pairs += zip(reply.model_reply.tool_calls, results.tool_results.results, strict=True)
    return [] if steps and is_interim(steps[-1]) else pairs


def _phrase(pair: tuple[turn_pb2.ToolCall, turn_pb2.ToolResult]) -> str:
    call, result = pair
    if result.HasField("error"):
        return f"The tool {call.tool} failed: {result.error.message}"
    value = to_json(result.result)
    given = next((str(argument) for argument in to_dict(call.arguments).values()), "")
    match call.tool:
        case "calculate":
            return f"{given} = {_plain(value)}."
        case "current_time":
            return f"It is {_plain(value)}."
        case "remember_note":
            return f'I will remember: "{given}".'
        case "recall_notes":
            return _notes(value)
        case _:
            return f"{call.tool} answered: {_plain(value)}."


def _notes(value: Json) -> str:
    notes = _items(value)
    if not notes:
        return "You have not asked me to remember anything yet."
    return "You asked me to remember: " + "; ".join(f'"{_plain(note)}"' for note in notes) + "."


def _items(value: Json) -> list[Json]:
    """The list in a result, bare or as the one list of an object."""
    if isinstance(value, dict):
        value = next((item for item in value.values() if isinstance(item, list)), None)
    return value if isinstance(value, list) else []


def _plain(value: Json) -> str:
    """A result in a sentence: of an object, its first plain value."""
    if isinstance(value, dict):
        return next((_plain(item) for item in value.values() if not isinstance(item, dict | list)), "nothing")
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:199] + "…"


def _count_words(text: str) -> int:
    return len(text.split())
