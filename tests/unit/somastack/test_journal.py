"""Turns and journals as people read them."""

import pytest
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error, Message, Part
from soma.common.v1.turn_pb2 import (
    FinalMessage,
    ModelReply,
    Outcome,
    Step,
    StepBody,
    ToolCall,
    ToolResult,
    ToolResults,
    Usage,
)
from soma.router.v1.turn_service_pb2 import Turn, TurnStatus

from somastack.journal import TURN_COLUMNS, outcome_of, status_of, step_lines, turn_lines, turn_row


def shown(number: int, body: StepBody) -> list[str]:
    step = Step(number=number, dispatch=2, create_time=Timestamp(seconds=1_900_000_000), body=body)
    return [line.plain for line in step_lines(step)]


def test_a_reply_with_calls_and_its_results() -> None:
    arguments = Struct()
    arguments["expression"] = "6*7"
    call = ToolCall(tool="calculate", arguments=arguments)
    usage = Usage(input_tokens=9, output_tokens=4)
    reply = ModelReply(text="let me\nsee", tool_calls=[call], model="a/b", inputs_seen=2, usage=usage)
    assert shown(1, StepBody(model_reply=reply)) == [
        "1  model, asks for tools  2030-03-17T17:46:40Z  try 2  a/b, 2 messages read, 9 tokens in, 4 out",
        "   let me\n   see",
        '   → calculate(expression="6*7")',
    ]
    failed = ToolResult(tool="mail", error=Error(message="no such\x1b[2J address"))
    results = ToolResults(results=[ToolResult(tool="calculate", result=Value(number_value=42)), failed])
    assert shown(2, StepBody(tool_results=results))[1:] == [
        "   ← 42.0",
        "   ← mail failed: no such\N{REPLACEMENT CHARACTER}[2J address",
    ]


def test_replies_that_end_nothing_answers_and_failures() -> None:
    interim = shown(3, StepBody(model_reply=ModelReply(text="on my way", inputs_seen=1)))
    assert interim[0].startswith("3  model, an interim reply")
    assert interim[1:] == ["   on my way"]
    assert "1 message read" in interim[0]
    answer = FinalMessage(message=Message(parts=[Part(text="one"), Part(text="two")]))
    assert shown(4, StepBody(final=answer))[1:] == ["   one\n   two"]
    failure = Error(reason=ErrorReason.ERROR_REASON_STEP_LIMIT, message="too many")
    assert shown(5, StepBody(failure=failure))[1:] == ["   STEP_LIMIT: too many"]


def test_a_reply_that_was_cut_off_names_no_model() -> None:
    heading = shown(1, StepBody(model_reply=ModelReply(text="it rai", inputs_seen=1)))[0]
    assert heading.endswith("  try 2  1 message read")
    assert shown(1, StepBody(model_reply=ModelReply(text="it rai")))[0].endswith("  try 2")


def test_a_step_of_a_later_release_is_said_to_be_one() -> None:
    assert "cannot read" in shown(1, StepBody(format=9))[0]


@pytest.mark.parametrize(
    ("turn", "status", "outcome"),
    [
        (Turn(status=TurnStatus.TURN_STATUS_RUNNING), "running", "-"),
        (
            Turn(status=TurnStatus.TURN_STATUS_CONVERGING, stopping=Outcome.OUTCOME_INTERRUPTED),
            "converging",
            "(interrupted)",
        ),
        (Turn(status=TurnStatus.TURN_STATUS_ENDED, outcome=Outcome.OUTCOME_FINAL), "ended", "final"),
        (
            Turn(
                status=TurnStatus.TURN_STATUS_ENDED,
                outcome=Outcome.OUTCOME_REJECTED,
                stopping=Outcome.OUTCOME_CANCELLED,
                error=Error(reason=ErrorReason.ERROR_REASON_TURN_RUNNING),
            ),
            "ended",
            "rejected TURN_RUNNING",
        ),
    ],
)
def test_how_a_turn_stands(turn: Turn, status: str, outcome: str) -> None:
    assert (status_of(turn), outcome_of(turn)) == (status, outcome)
    assert len(turn_row(turn)) == len(TURN_COLUMNS)
    assert ("status", status) in turn_lines(turn)
