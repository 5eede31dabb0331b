import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.domain.agent import read_agent
from services.cognition.domain.conversation import (
    Conversation,
    Json,
    NumberedStep,
    printable,
    result_text,
    spoken,
    text_of,
    to_dict,
)
from soma_common.errors import SomaError
from tests.unit.cognition import stories

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), json_values, max_size=4))
def test_arguments_come_back_from_a_struct_as_they_went_in(arguments: dict[str, Json]) -> None:
    struct = struct_pb2.Struct()
    struct.update(arguments)
    assert to_dict(struct) == arguments


@given(st.text(st.characters()))
def test_printable_text_can_be_stored_and_keeps_its_length(text: str) -> None:
    cleaned = printable(text)
    assert len(cleaned) == len(text)
    assert "\0" not in cleaned
    cleaned.encode()


def test_parts_of_all_kinds_are_read_as_lines() -> None:
    data = struct_pb2.Struct()
    data.update({"n": 3})
    file = message_pb2.FileReference(uri="https://x/y.png", media_type="image/png", name="y.png")
    parts = [message_pb2.Part(text="look"), message_pb2.Part(data=data), message_pb2.Part(file=file)]
    assert text_of(message_pb2.Message(parts=parts)) == 'look\n{"n": 3}\n[y.png (image/png): https://x/y.png]'


def test_results_are_told_as_json_and_errors_as_a_line() -> None:
    number = turn_pb2.ToolResult(result=struct_pb2.Value(number_value=391))
    text = turn_pb2.ToolResult(result=struct_pb2.Value(string_value="noon"))
    failed = turn_pb2.ToolResult(error=message_pb2.Error(message="division by zero"))
    assert [result_text(r) for r in (number, text, failed)] == ["391", "noon", "error: division by zero"]


@pytest.mark.parametrize("inputs", [[], [b"\xff\xff"]])
def test_a_turn_without_a_readable_input_is_corrupt(inputs: list[bytes]) -> None:
    with pytest.raises(SomaError) as refused:
        Conversation([], inputs, []).unanswered()
    assert refused.value.reason == reasons.ERROR_REASON_ITEM_CORRUPT


def test_an_agents_zeros_mean_the_contracts_defaults() -> None:
    agent = read_agent(stories.start(model="openai/org/big-model").agent_spec)
    assert (agent.provider, agent.model) == ("openai", "org/big-model")
    assert (agent.step_timeout_s, agent.turn_timeout_s, agent.max_steps) == (60.0, 600.0, 32)
    assert agent.temperature is None
    assert agent.max_output_tokens is None
    set_ = read_agent(
        stories.start(step_timeout_ms=1500, max_steps=4, temperature_millis=0, max_output_tokens=7).agent_spec
    )
    assert (set_.step_timeout_s, set_.max_steps, set_.temperature, set_.max_output_tokens) == (1.5, 4, 0.0, 7)


def test_a_spec_that_cannot_be_read_is_corrupt() -> None:
    with pytest.raises(SomaError) as refused:
        read_agent(b"\xff\xff")
    assert refused.value.reason == reasons.ERROR_REASON_ITEM_CORRUPT


def test_what_was_said_before_and_cannot_be_read_is_left_out() -> None:
    """Once stored it is in every later turn's context: it may spoil one turn, not its session."""
    context = [stories.user("before").SerializeToString(), b"\xff\xff", stories.assistant("after").SerializeToString()]
    conversation = Conversation(context, [stories.user("now").SerializeToString()], [])
    assert [text_of(message) for message in conversation.context()] == ["before", "after"]


def a_turn(inputs: str, *steps: turn_pb2.StepBody) -> Conversation:
    """A turn that answers `inputs`, one message for each letter."""
    return Conversation([], [stories.user(letter).SerializeToString() for letter in inputs], list(steps))


def order_of(conversation: Conversation) -> str:
    """The transcript in short: inputs as their letters, steps as their numbers."""
    return " ".join(
        str(entry.number) if isinstance(entry, NumberedStep) else text_of(entry) for entry in conversation.transcript()
    )


@pytest.mark.parametrize(
    ("conversation", "order"),
    [
        (a_turn("ab"), "a b"),
        (a_turn("ab", stories.reply("t", seen=1), stories.results(1)), "a 1 2 b"),
        (a_turn("abc", stories.reply("t", seen=2), stories.results(1), stories.reply("t", seen=2)), "a b 1 2 3 c"),
        (a_turn("abc", stories.interim(seen=1), stories.interim(seen=2)), "a 1 b 2 c"),
        (
            a_turn("abcd", stories.reply("t", seen=1), stories.results(1), stories.interim(seen=3)),
            "a 1 2 b c 3 d",
        ),
        # An older release's steps do not say: its turns had all their inputs from the start.
        (a_turn("ab", stories.reply("t"), stories.results(1)), "a b 1 2"),
        (a_turn("abc", stories.reply("t"), stories.results(1), stories.interim(seen=2)), "a b 1 2 3 c"),
        (a_turn("abc", stories.interim(seen=1), stories.reply("t"), stories.results(1)), "a 1 b c 2 3"),
    ],
)
def test_inputs_stand_where_they_were_read(conversation: Conversation, order: str) -> None:
    assert order_of(conversation) == order


def test_what_came_since_is_read_by_the_next_call_and_not_before() -> None:
    conversation = a_turn("a")
    now = [stories.user(letter).SerializeToString() for letter in "abc"]
    assert (order_of(conversation), conversation.input_count) == ("a", 1)
    conversation.read_up_to(now)
    conversation.read_up_to(now)
    assert (order_of(conversation), conversation.input_count) == ("a b c", 3)


@pytest.mark.parametrize(
    ("conversation", "waiting"),
    [
        (a_turn("a"), ["a"]),
        (a_turn("ab", stories.reply("t", seen=1), stories.results(1)), ["a", "b"]),
        (a_turn("ab", stories.interim(seen=1)), ["b"]),
        (a_turn("abcd", stories.interim(seen=1), stories.reply("t", seen=2), stories.results(1)), ["b", "c", "d"]),
        (a_turn("a", stories.interim(seen=1)), ["a"]),
    ],
)
def test_an_interim_reply_answers_what_it_had_read(conversation: Conversation, waiting: list[str]) -> None:
    assert [text_of(message) for message in conversation.unanswered()] == waiting


def test_interim_texts_are_what_was_said_beside_the_final() -> None:
    steps = [stories.interim("one", 1), stories.reply("t", text="let me see", seen=2), stories.results(1)]
    assert a_turn("ab", *steps).interim_texts() == ["one"]


def test_a_model_is_told_that_its_words_were_cut_off_and_what_it_had_done() -> None:
    done = struct_pb2.Struct()
    done.update({"tool_calls": [{"tool": "calculate", "arguments": {"expression": "1+1"}, "result": 2}]})
    cut = message_pb2.Message(
        role=message_pb2.ROLE_ASSISTANT,
        parts=[message_pb2.Part(text="It is"), message_pb2.Part(data=done)],
        metadata={"interrupted": "true"},
    )
    assert spoken(cut) == (
        'It is\n{"tool_calls": [{"arguments": {"expression": "1+1"}, "result": 2, "tool": "calculate"}]}\n'
        "[interrupted here by the next message]"
    )
    assert spoken(message_pb2.Message(metadata={"interrupted": "true"})) == "[interrupted here by the next message]"
    assert spoken(stories.assistant("whole")) == "whole"
