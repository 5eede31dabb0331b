"""What the first look at a stopped turn decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.toolgw.domain.invocation import State
from services.toolgw.domain.outcome import Outcome, bad_arguments, failed, never_begun
from services.toolgw.domain.reversal import PastCall, Reversal, StoppedTurn, Undoing, first_look
from services.toolgw.domain.tool import Effect

TURN = StoppedTurn("demo", "helper", "chat", "s-1", "0123456789abcdef" * 2)
PAID = PastCall(
    key="k1",
    step=3,
    effect=Effect.SIDE_EFFECTFUL,
    state=State.DONE,
    outcome=Outcome(value={"receipt": 7}),
    compensation="unpay",
    arguments={"n": 1},
)
OUTCOMES = {
    "result": Outcome(value=1),
    "null": Outcome(value=None),
    "failed": failed("no"),
    "never begun": never_begun("no"),
    "bad arguments": bad_arguments("no"),
}


def look(*calls: PastCall, has_tool: bool = True) -> Undoing:
    return first_look(calls, lambda _: has_tool)


@pytest.mark.parametrize(
    ("effect", "state", "outcome", "may_have_effect"),
    [
        (Effect.NONE, State.DONE, "result", False),
        (Effect.NONE, State.UNKNOWN, None, False),
        (Effect.NONE, State.RUNNING, None, False),
        (Effect.WITH_RESULT, State.DONE, "result", True),
        (Effect.WITH_RESULT, State.DONE, "null", True),
        (Effect.WITH_RESULT, State.DONE, "failed", False),
        (Effect.WITH_RESULT, State.UNKNOWN, None, False),
        (Effect.WITH_RESULT, State.CANCELLED, None, False),
        (Effect.WITH_RESULT, State.RUNNING, None, True),
        *(
            (effect, *rest)
            for effect in (Effect.IDEMPOTENT, Effect.SIDE_EFFECTFUL)
            for rest in (
                (State.DONE, "result", True),
                (State.DONE, "null", True),
                (State.DONE, "failed", True),
                (State.DONE, "never begun", False),
                (State.DONE, "bad arguments", False),
                (State.CANCELLED, None, False),
                (State.UNKNOWN, None, True),
                (State.RUNNING, None, True),
            )
        ),
    ],
)
def test_what_may_have_left_an_effect(effect: Effect, state: State, outcome: str | None, may_have_effect: bool) -> None:
    call = replace(PAID, effect=effect, state=state, outcome=None if outcome is None else OUTCOMES[outcome])
    assert call.may_have_effect is may_have_effect
    assert look(call).effects == (("k1",) if may_have_effect else ())


@pytest.mark.parametrize(
    "change",
    [
        {"compensation": ""},
        {"arguments": None},
        {"outcome": failed("no")},
        {"state": State.UNKNOWN, "outcome": None},
        {"state": State.RUNNING, "outcome": None},
    ],
    ids=str,
)
def test_what_cannot_be_undone_keeps_everything(change: dict[str, object]) -> None:
    stays = replace(PAID, key="k2", **change)  # type: ignore[arg-type]  # of each field another value
    assert look(PAID, stays, replace(PAID, key="k3")) == Undoing(
        Reversal.KEPT, ("k1", "k2", "k3"), kept=("k1", "k2", "k3")
    )


def test_a_compensation_that_no_tool_of_this_instance_is_keeps_everything() -> None:
    assert look(PAID, has_tool=False).state is Reversal.KEPT


def test_a_compensation_is_a_call_of_the_turn_under_a_key_of_its_own() -> None:
    call = PAID.undone_in(TURN)
    assert (call.tool, call.key, call.step, call.turn_id) == ("unpay", "k1/compensation", 3, TURN.turn_id)
    assert call.arguments == {"arguments": {"n": 1}, "result": {"receipt": 7}}
    assert call.session_id == TURN.session_id
    assert call.compensates == "k1"
    assert replace(call, key="k1").compensates == ""


calls = st.builds(
    PastCall,
    key=st.uuids().map(str),
    step=st.integers(0, 9),
    effect=st.sampled_from(Effect),
    state=st.sampled_from([State.DONE, State.CANCELLED, State.UNKNOWN]),
    outcome=st.none(),
    compensation=st.sampled_from(["", "undo"]),
    arguments=st.sampled_from([None, {}]),
).flatmap(
    lambda call: (
        st.sampled_from(list(OUTCOMES.values())).map(lambda outcome: replace(call, outcome=outcome))
        if call.state is State.DONE
        else st.just(call)
    )
)


@given(st.lists(calls, max_size=6))
def test_a_turn_is_undone_whole_or_not_at_all(turn: list[PastCall]) -> None:
    undoing = look(*turn)
    with_effect = [call for call in turn if call.may_have_effect]
    assert undoing.effects == tuple(call.key for call in with_effect)
    match undoing.state:
        case Reversal.REVERTED:
            assert (with_effect, undoing.kept) == ([], ())
        case Reversal.UNDOING:
            assert with_effect
            assert all(call.can_be_undone for call in with_effect)
            assert undoing.kept == ()
        case Reversal.KEPT:
            assert not all(call.can_be_undone for call in with_effect)
            assert undoing.kept == undoing.effects
