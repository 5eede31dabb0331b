"""Transcripts of the offline model: what is said on the left gives exactly what is on the right, every time."""

from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf import struct_pb2
from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.adapters.models.offline import INTRODUCTION, OfflineModel, expression_of, wish_of
from services.cognition.application.ports import CallOrigin, ModelAnswer, ModelRequest, ToolDescription
from services.cognition.domain.conversation import Conversation
from tests.unit.cognition import stories

TOOLS = [
    ToolDescription("calculate", "", {"properties": {"expression": {"type": "string"}}, "required": ["expression"]}),
    ToolDescription("current_time", "", {"type": "object", "properties": {}}),
    ToolDescription("remember_note", "", {"properties": {"text": {"type": "string"}}, "required": ["text"]}),
    ToolDescription("recall_notes", "", {}),
]


async def ask(
    *texts: str,
    context: Sequence[message_pb2.Message] = (stories.user("hi"), stories.assistant("Hello!")),
    steps: Sequence[turn_pb2.StepBody] = (),
    tools: Sequence[ToolDescription] = TOOLS,
) -> tuple[ModelAnswer, list[str]]:
    pieces: list[str] = []
    request = ModelRequest(
        model="assistant",
        instructions="",
        conversation=Conversation(
            [m.SerializeToString() for m in context],
            [stories.user(text).SerializeToString() for text in texts],
            list(steps),
        ),
        tools=tools,
        temperature=None,
        max_output_tokens=None,
        max_reply_bytes=100_000,
        origin=CallOrigin(stories.TURN, 1, 1, 1, ""),
    )
    return await OfflineModel().answer(request, pieces.append), pieces


async def test_the_first_answer_of_a_session_says_that_it_is_offline() -> None:
    first, pieces = await ask("hello", context=())
    assert first.text.startswith(INTRODUCTION)
    assert "offline" in INTRODUCTION
    assert "no model endpoint is configured" in INTRODUCTION
    assert "".join(pieces) == first.text
    assert len(pieces) > 10
    later, _ = await ask("hello")
    assert INTRODUCTION not in later.text


@pytest.mark.parametrize(
    ("said", "tool", "arguments"),
    [
        ("what is 17*23", "calculate", {"expression": "17*23"}),
        ("What's (2 + 3) x 4?", "calculate", {"expression": "(2 + 3) * 4"}),
        ("please compute 2^10", "calculate", {"expression": "2**10"}),
        ("1,000 - 1 please", "calculate", {"expression": "1000 - 1"}),
        ("what time is it?", "current_time", {}),
        ("remember that my train leaves at nine.", "remember_note", {"text": "my train leaves at nine"}),
        ("Please remember: milk, 2 + 1 eggs", "remember_note", {"text": "milk, 2 + 1 eggs"}),
        ("what did I ask you to remember?", "recall_notes", {}),
        ("show me my notes", "recall_notes", {}),
    ],
)
async def test_it_calls_the_tool_that_the_text_asks_for(said: str, tool: str, arguments: dict[str, str]) -> None:
    answer, pieces = await ask(said)
    assert [(call.tool, call.arguments) for call in answer.calls] == [(tool, arguments)]
    assert pieces == []


LONGEST = 256 * 1024


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "said",
    [
        "(" * LONGEST,
        "." * LONGEST,
        "1 " * (LONGEST // 2) + "a",
        "what " * (LONGEST // 5),
        "what time " * (LONGEST // 10),
        "show " * (LONGEST // 5),
        "what did i " * (LONGEST // 11),
        "remember" + " " * (LONGEST - 8),
        " " * LONGEST,
        "please " * (LONGEST // 7),
        "1" + " " * 900 + "+" + " " * 900 + "*1",
    ],
    ids=lambda said: f"{said[:12]!r} {len(said)}",
)
async def test_no_text_keeps_the_brain_from_everything_else(said: str) -> None:
    """The guard is the timeout: patterns that go over the whole text from each of its places would take an hour."""
    answer, _ = await ask(*[said] * 4)
    assert answer.text or answer.calls


def test_it_looks_at_the_beginning_of_a_text() -> None:
    assert wish_of("what is 1+1? " + "a" * LONGEST) == wish_of("what is 1+1?")
    assert wish_of("a " * 1000 + "what is 1+1?") is None


def test_a_sum_that_goes_on_beyond_the_beginning_is_not_cut() -> None:
    assert len(expression_of("1" + "+1" * 999)) == 1999
    assert expression_of("1" + "+1" * 2000) == ""


def test_a_note_is_kept_whole() -> None:
    wish = wish_of("remember that " + "milk " * 1000)
    assert wish is not None
    assert wish.argument == ("milk " * 1000).strip()


@pytest.mark.parametrize("said", ["I was born in 1987", "see you on 2026-11-20", "call 555-abc", "version 3.11", "ok"])
def test_what_is_no_arithmetic_is_left_alone(said: str) -> None:
    assert expression_of(said) == ""
    assert wish_of(said) is None


@pytest.mark.parametrize(
    ("said", "tool", "value", "phrase"),
    [
        ("what is 17*23", "calculate", 391, "17*23 = 391."),
        ("what is 17*23", "calculate", {"result": 391}, "17*23 = 391."),
        ("what time is it", "current_time", {"time": "2026-11-20T11:00:00Z"}, "It is 2026-11-20T11:00:00Z."),
        ("remember that x", "remember_note", {"stored": True}, 'I will remember: "x".'),
        ("what did I ask you to remember", "recall_notes", ["x", "y"], 'You asked me to remember: "x"; "y".'),
        (
            "what did I ask you to remember",
            "recall_notes",
            {"notes": []},
            "You have not asked me to remember anything yet.",
        ),
        (
            "what did I ask you to remember",
            "recall_notes",
            {"notes": [{"text": "x"}]},
            'You asked me to remember: "x".',
        ),
    ],
)
async def test_it_tells_what_the_tool_answered(said: str, tool: str, value: Any, phrase: str) -> None:
    answer, _ = await ask(said)
    steps = [stories.reply(tool), stories.results(1)]
    for key, argument in (answer.calls[0].arguments or {}).items():
        steps[0].model_reply.tool_calls[0].arguments[key] = argument
    holder = struct_pb2.ListValue()
    holder.extend([value])
    steps[1].tool_results.results[0].result.CopyFrom(holder.values[0])
    told, pieces = await ask(said, steps=steps)
    assert told.text == phrase
    assert "".join(pieces) == phrase
    assert told.calls == ()


async def test_a_failed_tool_is_told_with_its_reason() -> None:
    steps = [stories.reply("calculate"), stories.results(1)]
    steps[1].tool_results.results[0].error.message = "division by zero"
    told, _ = await ask("what is 1/0", steps=steps)
    assert told.text == "The tool calculate failed: division by zero"


async def test_without_the_tool_it_says_which_one_it_would_need() -> None:
    answer, _ = await ask("what is 17*23", tools=())
    assert "calculate" in answer.text
    assert answer.calls == ()


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("what did I say first?", 'The first thing you said here was: "my name is Ada".'),
        ("what did I just say?", 'Just before, you said: "I like tea".'),
        ("how many messages have I sent?", "You have sent 3 messages in this conversation, as far as I can see back."),
        ("thank you!", "You are welcome."),
    ],
)
async def test_it_knows_what_was_said_before(said: str, answer: str) -> None:
    context = [
        stories.user("my name is Ada"),
        stories.assistant("Hello Ada"),
        stories.user("I like tea"),
        stories.assistant("Noted"),
    ]
    told, _ = await ask(said, context=context)
    assert told.text == answer


async def test_everything_else_is_said_back_with_what_it_can_do() -> None:
    told, _ = await ask("the sky is blue")
    assert told.text == (
        'You said: "the sky is blue". Try "what is 17*23", "what time is it", '
        '"remember that my train leaves at nine", "what did I ask you to remember", "what did I say first".'
    )


async def test_of_several_inputs_each_gets_its_reply_in_order() -> None:
    both = ("what is 1+1", "thanks", "what is 2+2")
    asked, _ = await ask(*both)
    assert [call.arguments for call in asked.calls] == [{"expression": "1+1"}, {"expression": "2+2"}]
    steps = [stories.reply("calculate", "calculate", seen=3), stories.results(2)]
    for place, (expression, value) in enumerate([("1+1", 2), ("2+2", 4)]):
        steps[0].model_reply.tool_calls[place].arguments["expression"] = expression
        steps[1].tool_results.results[place].result.number_value = value
    told, _ = await ask(*both, steps=steps)
    assert told.text == "1+1 = 2. You are welcome. 2+2 = 4."


async def test_a_further_input_gets_its_own_call_and_what_was_told_is_not_told_again() -> None:
    texts = ("what is 1+1", "what time is it")
    first = [stories.reply("calculate", seen=1), stories.results(1, "2")]
    first[0].model_reply.tool_calls[0].arguments["expression"] = "1+1"
    asked, _ = await ask(*texts, steps=first)
    assert [call.tool for call in asked.calls] == ["current_time"]
    told_first = [*first, stories.interim("1+1 = 2.", seen=1)]
    asked, _ = await ask(*texts, steps=told_first)
    assert [call.tool for call in asked.calls] == ["current_time"]
    steps = [*told_first, stories.reply("current_time", seen=2), stories.results(1, "noon")]
    told, _ = await ask(*texts, steps=steps)
    assert told.text == "It is noon."


async def test_more_tools_than_it_calls_at_once_are_called_in_rounds() -> None:
    texts = [f"what is {n}+1" for n in range(20)]
    asked, _ = await ask(*texts)
    assert len(asked.calls) == 16
    steps = [stories.reply(*["calculate"] * 16, seen=20), stories.results(16)]
    asked, _ = await ask(*texts, steps=steps)
    assert [call.arguments for call in asked.calls] == [{"expression": f"{n}+1"} for n in range(16, 20)]


async def test_it_says_that_it_is_offline_once_in_a_turn() -> None:
    told, _ = await ask("hello", "thanks", context=(), steps=[stories.interim(f"{INTRODUCTION}Hello!", seen=1)])
    assert told.text == "You are welcome."


async def test_it_never_has_nothing_to_say() -> None:
    told, _ = await ask("what is 1+1", steps=[stories.interim("told already", seen=1)])
    assert told.text or told.calls
