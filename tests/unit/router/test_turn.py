"""A turn's life: every pair of state and step, and journals nobody planned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.domain.turn import InvalidTransition, StepKind, TurnState, after, replay

LEGAL = {
    (TurnState.THINKING, StepKind.MODEL_REPLY): TurnState.TOOL_CALL,
    (TurnState.THINKING, StepKind.FINAL): TurnState.IDLE,
    (TurnState.THINKING, StepKind.FAILURE): TurnState.IDLE,
    (TurnState.THINKING, StepKind.INTERIM_REPLY): TurnState.REFLECTING,
    (TurnState.REFLECTING, StepKind.INTERIM_REPLY): TurnState.REFLECTING,
    (TurnState.TOOL_CALL, StepKind.TOOL_RESULTS): TurnState.REFLECTING,
    (TurnState.TOOL_CALL, StepKind.FAILURE): TurnState.IDLE,
    (TurnState.REFLECTING, StepKind.MODEL_REPLY): TurnState.TOOL_CALL,
    (TurnState.REFLECTING, StepKind.FINAL): TurnState.IDLE,
    (TurnState.REFLECTING, StepKind.FAILURE): TurnState.IDLE,
}


@pytest.mark.parametrize("kind", StepKind)
@pytest.mark.parametrize("state", TurnState)
def test_every_step_in_every_state(state: TurnState, kind: StepKind) -> None:
    expected = LEGAL.get((state, kind))
    if expected is not None:
        assert after(state, kind) is expected
        return
    with pytest.raises(InvalidTransition, match=state.name) as refused:
        after(state, kind)
    assert (refused.value.state, refused.value.kind) == (state, kind)


@pytest.mark.parametrize("kind", [0, 6, -1, 10**9])
def test_a_kind_of_a_later_release_is_refused_and_not_an_accident(kind: int) -> None:
    with pytest.raises(InvalidTransition):
        after(TurnState.THINKING, kind)


def test_a_journal_without_steps_is_a_turn_that_thinks() -> None:
    assert replay([]) is TurnState.THINKING


@given(st.lists(st.tuples(st.just(StepKind.MODEL_REPLY), st.just(StepKind.TOOL_RESULTS)), max_size=20), st.booleans())
def test_rounds_of_calls_and_results_replay(rounds: list[tuple[StepKind, StepKind]], called: bool) -> None:
    kinds = [int(kind) for round_ in rounds for kind in round_] + [int(StepKind.MODEL_REPLY)] * called
    expected = TurnState.TOOL_CALL if called else TurnState.REFLECTING if rounds else TurnState.THINKING
    assert replay(kinds) is expected
    assert replay([*kinds, StepKind.FAILURE]) is TurnState.IDLE


@given(st.lists(st.integers(0, 6), max_size=12))
def test_any_journal_replays_as_its_steps_one_by_one_or_not_at_all(kinds: list[int]) -> None:
    state = TurnState.THINKING
    try:
        for kind in kinds:
            state = after(state, kind)
    except InvalidTransition:
        with pytest.raises(InvalidTransition):
            replay(kinds)
    else:
        assert replay(kinds) is state
        assert (StepKind.FINAL in kinds or StepKind.FAILURE in kinds) == (state is TurnState.IDLE)
        assert not set(kinds[:-1]) & {StepKind.FINAL, StepKind.FAILURE}, "nothing follows an end"
