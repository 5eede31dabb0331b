"""Journals and starts as tests of the brain write them."""

from collections.abc import Sequence

from google.protobuf import struct_pb2
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2
from soma.controlplane.v1 import agent_service_pb2

TURN = bytes(range(16))
SESSION = message_pb2.SessionKey(tenant="demo", agent="helper", channel="cli", session="s-1")


def user(text: str) -> message_pb2.Message:
    return message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text=text)])


def assistant(text: str) -> message_pb2.Message:
    return message_pb2.Message(role=message_pb2.ROLE_ASSISTANT, parts=[message_pb2.Part(text=text)])


def reply(*tools: str, text: str = "", seen: int = 0) -> turn_pb2.StepBody:
    calls = [
        turn_pb2.ToolCall(index=i, call_id=f"c{i}", tool=tool, arguments=struct_pb2.Struct())
        for i, tool in enumerate(tools)
    ]
    for call in calls:
        call.arguments.SetInParent()
    made = turn_pb2.ModelReply(text=text, tool_calls=calls, inputs_seen=seen)
    return turn_pb2.StepBody(format=1, model_reply=made)


def interim(text: str = "so far", seen: int = 0) -> turn_pb2.StepBody:
    return turn_pb2.StepBody(format=1, model_reply=turn_pb2.ModelReply(text=text, inputs_seen=seen))


def results(count: int, value: str = "done") -> turn_pb2.StepBody:
    made = [
        turn_pb2.ToolResult(index=i, call_id=f"c{i}", tool="t", result=struct_pb2.Value(string_value=value))
        for i in range(count)
    ]
    return turn_pb2.StepBody(format=1, tool_results=turn_pb2.ToolResults(results=made))


def final(text: str = "bye") -> turn_pb2.StepBody:
    return turn_pb2.StepBody(format=1, final=turn_pb2.FinalMessage(message=assistant(text), inputs_seen=1))


def failure() -> turn_pb2.StepBody:
    error = message_pb2.Error(reason=reasons.ERROR_REASON_MODEL_UNAVAILABLE, message="down")
    return turn_pb2.StepBody(format=1, failure=error)


def start(
    text: str = "hello",
    *,
    turn_id: bytes = TURN,
    dispatch: int = 1,
    model: str = "echo/echo",
    tools: Sequence[str] = (),
    context: Sequence[message_pb2.Message] = (),
    journal: Sequence[turn_pb2.StepBody] = (),
    **spec: int | str,
) -> cognition.StartTurn:
    """A StartTurn; further keywords go to the agent's spec."""
    agent = agent_service_pb2.AgentSpec(model=model, tools=tools, **spec)  # type: ignore[arg-type]
    return cognition.StartTurn(
        turn_id=turn_id,
        dispatch=dispatch,
        session=SESSION,
        agent_revision="r1",
        agent_spec=agent.SerializeToString(),
        context=[message.SerializeToString() for message in context],
        inputs=[user(text).SerializeToString()],
        journal=[step.SerializeToString() for step in journal],
    )
