"""A turn and its journal as people read them."""

from collections.abc import Iterator

from rich.text import Text
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Outcome, Step, StepBody, Usage
from soma.router.v1.turn_service_pb2 import Turn, TurnStatus

from soma_common.errors import reason_name
from somastack.resource_names import short
from somastack.tables import NOTHING, at, between, printable, since
from somastack.turn_view import call_text, outcome_name, result_text, text_of

TURN_COLUMNS = ("turn", "no", "status", "outcome", "messages", "steps", "tries", "age", "took")


def turn_row(turn: Turn) -> list[str]:
    """A turn in the columns of TURN_COLUMNS; a turn that is being stopped shows the outcome it goes for in brackets."""
    return [
        short(turn.name),
        str(turn.number),
        status_of(turn),
        outcome_of(turn),
        str(len(turn.message_ids)),
        str(turn.step_count),
        str(turn.dispatch),
        since(turn.create_time),
        between(turn.create_time, turn.end_time),
    ]


def turn_lines(turn: Turn) -> list[tuple[str, str]]:
    """A turn value by value."""
    return [
        ("turn", turn.name),
        ("number", str(turn.number)),
        ("status", status_of(turn)),
        ("outcome", outcome_of(turn)),
        ("error", printable(turn.error.message)),
        ("steps", str(turn.step_count)),
        ("tries", str(turn.dispatch)),
        ("began", at(turn.create_time)),
        ("ended", at(turn.end_time)),
        ("took", between(turn.create_time, turn.end_time)),
        ("revision", turn.agent_revision),
        ("messages", " ".join(turn.message_ids)),
        ("answer", printable(text_of(turn.message))),
    ]


def status_of(turn: Turn) -> str:
    """For example `running`."""
    return TurnStatus.Name(turn.status).removeprefix("TURN_STATUS_").lower()


def outcome_of(turn: Turn) -> str:
    """How it ended, with the reason of a failure; in brackets how it is to end."""
    if turn.stopping and not turn.outcome:
        return f"({outcome_name(turn.stopping)})"
    if not turn.outcome:
        return NOTHING
    if turn.outcome in (Outcome.OUTCOME_FINAL, Outcome.OUTCOME_CANCELLED) or not turn.HasField("error"):
        return outcome_name(turn.outcome)
    return f"{outcome_name(turn.outcome)} {_reason(turn.error)}"


def step_lines(step: Step) -> Iterator[Text]:
    """A journaled step: a heading, then what was said, called or answered."""
    kind, lines = _content(step.body)
    yield Text.assemble(
        (f"{step.number}  {kind}", "bold"), (f"  {at(step.create_time)}  try {step.dispatch}{_cost(step.body)}", "dim")
    )
    for line in lines:
        yield Text("\n".join(f"   {each}" for each in printable(line).split("\n")))


def _content(body: StepBody) -> tuple[str, list[str]]:
    """What kind of step it is, and its content."""
    match body.WhichOneof("body"):
        case "model_reply":
            calls = [call_text(call) for call in body.model_reply.tool_calls]
            said = [body.model_reply.text] if body.model_reply.text else []
            # A reply without calls came too late for inputs that had joined the turn.
            return "model, asks for tools" if calls else "model, an interim reply", said + calls
        case "tool_results":
            return "tools", [result_text(result) for result in body.tool_results.results]
        case "final":
            return "answer", [text_of(body.final.message)]
        case "failure":
            return "failure", [f"{_reason(body.failure)}: {body.failure.message}"]
        case _:
            return "a step that this release cannot read", []


def _cost(body: StepBody) -> str:
    match body.WhichOneof("body"):
        case "model_reply":
            return _told(body.model_reply.model, body.model_reply.inputs_seen, body.model_reply.usage)
        case "final":
            return _told(body.final.model, body.final.inputs_seen, body.final.usage)
        case _:
            return ""


def _told(model: str, inputs: int, usage: Usage) -> str:
    """What a reply took, as far as it is known: one that was cut off does not say its model and tokens."""
    read = f"{inputs} message{'' if inputs == 1 else 's'} read" if inputs else ""
    tokens = f"{usage.input_tokens} tokens in, {usage.output_tokens} out" if usage.output_tokens else ""
    told = ", ".join(filter(None, (model, read, tokens)))
    return f"  {told}" if told else ""


def _reason(error: Error) -> str:
    return reason_name(error.reason)
