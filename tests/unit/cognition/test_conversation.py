import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2

from services.cognition.domain.agent import read_agent
from services.cognition.domain.conversation import Conversation, Json, printable, result_text, text_of, to_dict
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
