"""The checker notices each promise that is broken, and is silent when all are kept."""

from collections.abc import Callable, Sequence

import pytest
from google.protobuf.struct_pb2 import Struct
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error, Message, Part
from soma.common.v1.turn_pb2 import ArrivalPolicy as Policy
from soma.common.v1.turn_pb2 import (
    Delivery,
    FinalMessage,
    LiveEvent,
    ModelReply,
    Outcome,
    Step,
    StepBody,
    ToolCall,
    ToolResult,
    ToolResults,
)

from soma_common import ids
from soma_common.ids import SessionName
from soma_common.testing.checker import (
    Story,
    effects_out_of_turn,
    journal_violations,
    mixed_up,
    unread_inputs,
)
from soma_common.testing.tool_server import RecordedToolCall

NAME = SessionName("demo", "echo", "line", "s1")
FOREIGN = SessionName("acme", "echo", "line", "s1")
TURN = bytes(range(16)).hex()


def message_id(key: str, name: SessionName = NAME) -> bytes:
    return ids.message_id(name.tenant, name.agent, name.channel, name.session, key)


def final(key: str, position: int, text: str = "", name: SessionName = NAME) -> Delivery:
    turn = ids.turn_id(name.id, message_id(key, name))
    return Delivery(
        delivery_id=turn,
        turn_id=turn,
        agent=name.agent,
        session=name.session,
        position=position,
        outcome=Outcome.OUTCOME_FINAL,
        message_ids=[message_id(key, name)],
        message=Message(parts=[Part(text=text or key)]),
    )


def told(*deliveries: Delivery, keys: Sequence[str] = ("k1", "k2")) -> Story:
    """A session in which `keys` were accepted and these deliveries came."""
    story = Story()
    for key in keys:
        story.sent(NAME, key, key, expected=key)
        story.accepted(NAME, key, message_id(key))
    for delivery in deliveries:
        story.delivered("demo", "line", delivery)
    return story


def test_silent_when_all_is_well() -> None:
    story = told(final("k1", 1), final("k2", 2))
    assert story.violations() == []
    assert story.unanswered() == []
    assert story.counts() == {"sent": 2, "accepted": 2, "answered": 2, "cancelled": 0}


def ended(key: str, position: int, outcome: Outcome.ValueType, error: Error | None = None) -> Delivery:
    delivery = final(key, position)
    delivery.outcome = outcome
    delivery.ClearField("message")
    if error is not None:
        delivery.error.CopyFrom(error)
    return delivery


POISONED = Error(reason=ErrorReason.ERROR_REASON_TURN_POISONED)
BROKEN: dict[str, tuple[Callable[[], Story], str]] = {
    "no outcome": (lambda: told(final("k1", 1)), "has 0 outcomes"),
    "two outcomes": (lambda: told(final("k1", 1), final("k2", 2), final("k2", 3)), "has 2 outcomes"),
    "shown again": (lambda: told(final("k1", 1), final("k2", 2), final("k2", 2)), "shown more than once"),
    "another order": (lambda: told(final("k2", 1), final("k1", 2)), "answered in order [2, 1]"),
    "a gap": (lambda: told(final("k1", 1), final("k2", 3)), "delivery positions are [1, 3]"),
    "another answer": (lambda: told(final("k1", 1), final("k2", 2, "k1")), "was answered with 'k1'"),
    "never sent": (lambda: told(final("k1", 1), keys=()), "was not sent in this session"),
    "an error": (
        lambda: told(final("k1", 1), ended("k2", 2, Outcome.OUTCOME_ERROR, POISONED)),
        "ended with TURN_POISONED",
    ),
    "nobody cancelled": (
        lambda: told(final("k1", 1), ended("k2", 2, Outcome.OUTCOME_CANCELLED)),
        "1 turns were cancelled by 0 cancels",
    ),
}


@pytest.mark.parametrize(("make", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_broken_promise_is_named(make: Callable[[], Story], problem: str) -> None:
    found = make().violations()
    assert any(problem in violation for violation in found), found


def under(policy: Policy.ValueType, *deliveries: Delivery) -> Story:
    """A session in which k1 was accepted, then k2 under the policy."""
    story = Story()
    for key, of_message in (("k1", Policy.ARRIVAL_POLICY_ENQUEUE), ("k2", policy)):
        story.sent(NAME, key, key, expected=key, policy=of_message, ending=key)
        story.accepted(NAME, key, message_id(key))
    for delivery in deliveries:
        story.delivered("demo", "line", delivery)
    return story


def both(text: str) -> Delivery:
    delivery = final("k1", 1, text)
    delivery.message_ids.append(message_id("k2"))
    return delivery


BUSY = Error(reason=ErrorReason.ERROR_REASON_TURN_RUNNING)
KEPT: dict[str, Callable[[], Story]] = {
    "steered": lambda: under(Policy.ARRIVAL_POLICY_STEER, both("first k1, then k2")),
    "rejected at once": lambda: under(
        Policy.ARRIVAL_POLICY_REJECT, ended("k2", 1, Outcome.OUTCOME_REJECTED, BUSY), final("k1", 2)
    ),
    "interrupted": lambda: under(
        Policy.ARRIVAL_POLICY_INTERRUPT, ended("k1", 1, Outcome.OUTCOME_INTERRUPTED), final("k2", 2)
    ),
}
POLICY_BROKEN: dict[str, tuple[Callable[[], Story], str]] = {
    "one turn for two": (lambda: under(Policy.ARRIVAL_POLICY_ENQUEUE, both("k2")), "none of them asked for that"),
    "the last input not answered": (lambda: under(Policy.ARRIVAL_POLICY_STEER, both("k1")), "instead of 'k2'"),
    "interrupted by nobody": (
        lambda: under(Policy.ARRIVAL_POLICY_STEER, ended("k1", 1, Outcome.OUTCOME_INTERRUPTED), final("k2", 2)),
        "1 turns were interrupted for 0 reasons",
    ),
    "rejected against its policy": (
        lambda: under(Policy.ARRIVAL_POLICY_STEER, ended("k2", 1, Outcome.OUTCOME_REJECTED, BUSY), final("k1", 2)),
        "that was not its message's policy",
    ),
    "rejected for another reason": (
        lambda: under(Policy.ARRIVAL_POLICY_REJECT, ended("k2", 1, Outcome.OUTCOME_REJECTED, POISONED)),
        "was rejected with TURN_POISONED",
    ),
}


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_what_a_policy_asks_for_breaks_nothing(make: Callable[[], Story]) -> None:
    assert make().violations() == []


@pytest.mark.parametrize(("make", "problem"), POLICY_BROKEN.values(), ids=POLICY_BROKEN)
def test_what_no_policy_asked_for_is_named(make: Callable[[], Story], problem: str) -> None:
    found = make().violations()
    assert any(problem in violation for violation in found), found


def test_a_delivery_of_another_tenant_is_noticed() -> None:
    story = told(final("k1", 1), final("k2", 2))
    story.delivered("demo", "line", final("k1", 1, name=SessionName("demo", "echo", "line", "of-acme")))
    assert any("where nothing was sent" in violation for violation in story.violations())


def test_a_receipt_that_names_another_message_is_noticed() -> None:
    story = Story()
    story.sent(NAME, "k1", "k1")
    story.accepted(NAME, "k1", message_id("k1", FOREIGN))
    assert any("the receipt of key k1" in violation for violation in story.violations())


@pytest.mark.parametrize(("times", "is_fine"), [(0, True), (1, True), (2, False)])
def test_what_is_not_known_may_have_one_outcome_at_most(times: int, is_fine: bool) -> None:
    story = told(keys=())
    story.not_known(story.sent(NAME, "k1", "k1"), NAME)
    for position in range(times):
        story.delivered("demo", "line", final("k1", position + 1))
    assert (story.violations() == []) is is_fine


def test_a_cancel_allows_one_cancelled_turn() -> None:
    story = told(final("k1", 1), ended("k2", 2, Outcome.OUTCOME_CANCELLED))
    story.cancelled(NAME)
    assert story.violations() == []


def test_a_tolerated_error_is_an_outcome_like_others() -> None:
    gone = ErrorReason.ERROR_REASON_AGENT_GONE
    story = told(ended("k1", 1, Outcome.OUTCOME_ERROR, Error(reason=gone)), keys=("k1",))
    story.tolerated = frozenset({gone})
    assert story.violations() == []


def test_a_live_event_of_an_old_dispatch_is_noticed() -> None:
    story = told(final("k1", 1), keys=("k1",))
    for dispatch in (1, 2, 2):
        story.live(LiveEvent(turn_id=bytes(16), dispatch=dispatch))
    assert story.violations() == []
    story.live(LiveEvent(turn_id=bytes(16), dispatch=1))
    assert any("live event of dispatch 1 after one of 2" in violation for violation in story.violations())


# ---- journals and witnesses


def arguments(what: str) -> Struct:
    struct = Struct()
    struct.update({"what": what})
    return struct


def journal(error: Error | None = None) -> list[Step]:
    """A turn that called `charge` once; with an error as its result if one is given."""
    call = ToolCall(index=0, call_id="c", tool="charge", arguments=arguments("tea"))
    result = ToolResult(index=0, call_id="c", tool="charge", error=error)
    return [
        Step(number=1, body=StepBody(model_reply=ModelReply(tool_calls=[call]))),
        Step(number=2, body=StepBody(tool_results=ToolResults(results=[result]))),
        Step(number=3, body=StepBody(final=FinalMessage())),
    ]


def charge(key: str = f"{TURN}/1/0", what: str = "tea") -> RecordedToolCall:
    return RecordedToolCall(1, key, TURN, 1, "charge", {"what": what}, {})


MODEL_CALLS = [(TURN, 1), (TURN, 3)]
CANCELLED = Error(reason=ErrorReason.ERROR_REASON_TOOL_CANCELLED)
UNKNOWN = Error(reason=ErrorReason.ERROR_REASON_TOOL_OUTCOME_UNKNOWN)
FAILED = ErrorReason.ERROR_REASON_TOOL_FAILED
OUT_OF_REACH = Error(reason=FAILED, message="charge cannot be reached", metadata={"cause": "ConnectTimeout"})
REFUSED = Error(reason=FAILED, message="it answered HTTP 500: no", metadata={"http_status": "500"})


@pytest.mark.parametrize(
    ("steps", "tool_calls"),
    [
        (journal(), [charge()]),
        (journal(UNKNOWN), []),
        (journal(UNKNOWN), [charge()]),
        (journal(CANCELLED), []),
        (journal(OUT_OF_REACH), []),
        (journal(REFUSED), [charge()]),
    ],
    ids=["called", "unknown, not called", "unknown, called", "cancelled, not called", "out of reach", "refused"],
)
def test_journals_and_witnesses_agree(steps: list[Step], tool_calls: list[RecordedToolCall]) -> None:
    assert journal_violations({TURN: steps}, MODEL_CALLS, tool_calls, frozenset({"charge"})) == []


@pytest.mark.parametrize(
    ("steps", "tool_calls", "problem"),
    [
        (journal(), [charge(), charge()], "charge was called 2 times"),
        (journal(), [charge(what="coffee")], "charge was called with {'what': 'coffee'}"),
        (journal(), [], "has a result in the journal, but was never called"),
        (journal(REFUSED), [], "was never called (TOOL_FAILED: it answered HTTP 500: no)"),
        (journal(CANCELLED), [charge()], "the journal says that it was cancelled"),
        (journal(), [charge(), charge(f"{TURN}/5/0")], "no journaled step asks for it"),
        (journal()[:1], [charge()], "ended with open calls"),
        (journal()[1:], [], "the journal's steps are [2, 3]"),
    ],
)
def test_what_witnesses_saw_and_no_journal_says(
    steps: list[Step], tool_calls: list[RecordedToolCall], problem: str
) -> None:
    found = journal_violations({TURN: steps}, MODEL_CALLS, tool_calls, frozenset({"charge"}))
    assert any(problem in violation for violation in found), found


def test_a_journaled_answer_that_no_model_gave() -> None:
    found = journal_violations({TURN: journal()}, MODEL_CALLS[:1], [charge()], frozenset())
    assert found == [f"turn {TURN}: the model was never called for step 3"]


def test_an_input_that_the_model_had_not_read_is_noticed() -> None:
    journal = [Step(number=1, dispatch=2, body=StepBody(final=FinalMessage()))]
    turns = [(TURN, ["first", "second"])]
    assert unread_inputs(turns, {TURN: journal}, {(TURN, 1, 2): ["first", "second"]}) == []
    [unread] = unread_inputs(turns, {TURN: journal}, {(TURN, 1, 2): ["first"]})
    assert "'second' was answered" in unread
    [another] = unread_inputs(turns, {TURN: journal}, {(TURN, 1, 1): ["first", "second"]})
    assert "never called the model" in another


def test_what_another_session_said_is_noticed() -> None:
    assert mixed_up([(TURN, ["demo/s1 says 1"])], {TURN: "demo/s1"}) == []
    assert mixed_up([(TURN, ["acme/s1 says 1"])], {TURN: "demo/s1"})


def test_an_effect_in_a_turn_that_nobody_was_answered_is_noticed() -> None:
    charged = RecordedToolCall(1, f"{TURN}/1/0", TURN, 1, "charge", {}, {})
    assert effects_out_of_turn([charged], frozenset({"charge"}), [TURN]) == []
    assert effects_out_of_turn([charged], frozenset({"book"}), []) == []
    assert effects_out_of_turn([charged], frozenset({"charge"}), [])
