"""The turn machine, over random journals: it accepts what a brain can have written and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import turn_pb2

from services.cognition.domain.turn import Next, Turn, kind_of, read_step, replay
from soma_common.errors import SomaError
from tests.unit.cognition import stories

IDLE, THINKING = turn_pb2.TURN_STATE_IDLE, turn_pb2.TURN_STATE_THINKING
TOOL_CALL, REFLECTING = turn_pb2.TURN_STATE_TOOL_CALL, turn_pb2.TURN_STATE_REFLECTING


@st.composite
def valid_journals(draw: st.DrawFn) -> list[turn_pb2.StepBody]:
    """Rounds of tools and interim replies, then perhaps an end, cut anywhere."""
    journal: list[turn_pb2.StepBody] = []
    for count in draw(st.lists(st.integers(0, 3), max_size=5)):
        journal += [stories.reply(*["t"] * count), stories.results(count)] if count else [stories.interim()]
    if draw(st.booleans()):
        journal.append(stories.final() if draw(st.booleans()) else stories.failure())
    return journal[: draw(st.integers(0, len(journal)))]


any_step = st.one_of(
    st.sampled_from(["", "words"]).map(stories.interim),
    st.integers(0, 3).map(lambda n: stories.reply(*["t"] * n)),
    st.integers(0, 3).map(stories.results),
    st.builds(stories.final),
    st.builds(stories.failure),
)


@given(valid_journals())
def test_a_replay_stands_where_the_journal_ends(journal: list[turn_pb2.StepBody]) -> None:
    turn = replay(journal)
    assert turn.steps == len(journal)
    last = str(journal[-1].WhichOneof("body")) if journal else None
    if last == "model_reply" and not journal[-1].model_reply.tool_calls:
        last = "interim"
    expected = {
        None: (THINKING, Next.CALL_MODEL),
        "model_reply": (TOOL_CALL, Next.RUN_TOOLS),
        "interim": (REFLECTING, Next.CALL_MODEL),
        "tool_results": (REFLECTING, Next.CALL_MODEL),
        "final": (IDLE, Next.NOTHING),
        "failure": (IDLE, Next.NOTHING),
    }
    assert (turn.state, turn.next) == expected[last]
    assert bool(turn.calls) == (turn.next is Next.RUN_TOOLS)


@given(st.lists(any_step, max_size=8))
def test_any_journal_is_either_a_turn_or_a_typed_error(journal: list[turn_pb2.StepBody]) -> None:
    """An independent reading of the rules as a regular expression over kinds, with the counts checked beside it."""
    turn = Turn()
    calls: int | None = None  # calls that wait for results; None: none wait
    ended = False
    for step in journal:
        kind = step.WhichOneof("body")
        match kind:
            case "model_reply":
                fits = calls is None and (len(step.model_reply.tool_calls) > 0 or step.model_reply.text != "")
            case "tool_results":
                fits = calls is not None and len(step.tool_results.results) == calls
            case "final":
                fits = calls is None
            case _:
                fits = True
        if ended or not fits:
            before = (turn.state, turn.steps, turn.next)
            with pytest.raises(SomaError) as refused:
                turn.record(step)
            assert refused.value.reason == reasons.ERROR_REASON_INVALID_TRANSITION
            assert (turn.state, turn.steps, turn.next) == before
            return
        turn.record(step)
        calls = len(step.model_reply.tool_calls) or None
        ended = kind in {"final", "failure"}


@given(valid_journals())
def test_steps_survive_the_way_through_the_journal(journal: list[turn_pb2.StepBody]) -> None:
    stored = [step.SerializeToString(deterministic=True) for step in journal]
    assert [read_step(body) for body in stored] == journal


def test_what_was_read_stays_read() -> None:
    journal = [stories.reply("t", seen=2), stories.results(1), stories.interim(seen=0)]
    assert replay(journal).inputs_seen == 2, "a step that does not say so changes nothing"
    with pytest.raises(SomaError) as refused:
        replay([*journal, stories.interim(seen=1)])
    assert refused.value.reason == reasons.ERROR_REASON_INVALID_TRANSITION


def test_calls_must_be_numbered_and_results_must_answer_them() -> None:
    skewed = stories.reply("a", "b")
    skewed.model_reply.tool_calls[1].index = 5
    with pytest.raises(SomaError):
        replay([skewed])
    swapped = stories.results(2)
    swapped.tool_results.results[0].index, swapped.tool_results.results[1].index = 1, 0
    with pytest.raises(SomaError):
        replay([stories.reply("a", "b"), swapped])


@pytest.mark.parametrize("step_format", [0, 2, 99])
def test_a_step_of_another_format_is_refused_by_name(step_format: int) -> None:
    step = stories.final()
    step.format = step_format
    with pytest.raises(SomaError) as refused:
        read_step(step.SerializeToString())
    assert refused.value.reason == reasons.ERROR_REASON_SCHEMA_UNKNOWN
    assert refused.value.metadata["format"] == str(step_format)


def test_garbage_is_a_corrupt_item() -> None:
    with pytest.raises(SomaError) as unreadable:
        read_step(b"\xff\xff\xff")
    with pytest.raises(SomaError) as empty:
        kind_of(turn_pb2.StepBody(format=1))
    assert unreadable.value.reason == empty.value.reason == reasons.ERROR_REASON_ITEM_CORRUPT


@pytest.mark.parametrize(
    ("steps", "max_steps", "tools", "answer"),
    [
        (0, 1, False, True),
        (0, 2, False, True),
        (0, 3, True, True),
        (2, 3, False, True),
        (2, 5, True, True),
        (3, 3, False, False),
    ],
)
def test_tools_run_only_if_somebody_can_still_read_their_results(
    steps: int, max_steps: int, tools: bool, answer: bool
) -> None:
    turn = Turn()
    turn.steps = steps + 2
    turn.interims = 2  # what the user's own messages cause is not counted
    assert turn.has_room_for_tools(max_steps) is tools
    assert turn.has_room(max_steps) is answer
