"""What a stored call answers, and when its runner is held dead."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.toolgw.application.await_runner import SECOND_LOOK_S, Patience
from services.toolgw.domain.invocation import Call, Invocation, Runner, State
from services.toolgw.domain.outcome import Outcome
from services.toolgw.domain.tool import Effect
from soma_common.errors import AlreadyExists, Conflict, reason_name

CALL = Call("demo", "helper", "chat", "s-1", "pay", {"n": 1, "who": {"a": 1, "b": 2}}, "k1", "", 0)
RUNNING = Invocation(
    key="k1",
    session_id=CALL.session_id,
    tool="pay",
    digest=CALL.digest,
    effect=Effect.SIDE_EFFECTFUL,
    state=State.RUNNING,
    claim="c1",
    attempt=1,
    runner=Runner.ALIVE,
    outcome=None,
)


def test_a_digest_knows_no_order_of_arguments_and_no_turn() -> None:
    same = replace(CALL, arguments={"who": {"b": 2, "a": 1}, "n": 1}, turn_id="f" * 32, step=9, key="other")
    assert same.digest == CALL.digest


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "acme"},
        {"session": "s-2"},
        {"agent": "x"},
        {"channel": "x"},
        {"tool": "put"},
        {"arguments": {"n": 2}},
    ],
    ids=str,
)
def test_another_call_under_the_same_key_is_refused(change: dict[str, object]) -> None:
    other = replace(CALL, **change)  # type: ignore[arg-type]  # of each field another value
    assert other.digest != CALL.digest
    for state in State:
        with pytest.raises(AlreadyExists):
            replace(RUNNING, state=state).answer_to(other)


def test_each_state_has_its_answer() -> None:
    assert RUNNING.answer_to(CALL) is None
    outcome = Outcome(value=1)
    assert replace(RUNNING, state=State.DONE, outcome=outcome).answer_to(CALL) is outcome
    for state, reason in ((State.CANCELLED, "TOOL_CANCELLED"), (State.UNKNOWN, "TOOL_OUTCOME_UNKNOWN")):
        with pytest.raises(Conflict) as refused:
            replace(RUNNING, state=state).answer_to(CALL)
        assert reason_name(refused.value.reason) == reason


def test_a_tombstone_answers_every_call_of_its_session() -> None:
    tombstone = replace(RUNNING, state=State.CANCELLED, digest=None, tool="")
    with pytest.raises(Conflict):
        tombstone.answer_to(CALL)
    with pytest.raises(AlreadyExists):
        tombstone.answer_to(replace(CALL, session="s-2"))


@pytest.mark.parametrize(
    ("effect", "again", "cancelled"),
    [
        (Effect.NONE, True, State.CANCELLED),
        (Effect.WITH_RESULT, True, State.CANCELLED),
        (Effect.IDEMPOTENT, True, State.UNKNOWN),
        (Effect.SIDE_EFFECTFUL, False, State.UNKNOWN),
    ],
)
def test_the_effect_decides_what_follows_a_death(effect: Effect, again: bool, cancelled: State) -> None:
    assert effect.may_run_again is again
    assert replace(RUNNING, effect=effect).cancelled_after_runner_death is cancelled


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_silence_must_last_before_a_runner_is_held_dead() -> None:
    clock = Clock()
    patience = Patience(clock)
    silent = replace(RUNNING, runner=Runner.SILENT)
    assert not patience.holds_dead(silent)
    clock.now += SECOND_LOOK_S - 0.01
    assert not patience.holds_dead(silent)
    clock.now += 0.02
    assert patience.holds_dead(silent)


@given(st.lists(st.sampled_from([Runner.ALIVE, Runner.SILENT]), max_size=30))
def test_a_sign_of_life_or_a_new_claim_begins_anew(seen: list[Runner]) -> None:
    clock = Clock()
    patience = Patience(clock)
    silent_s = 0.0
    for look, runner in enumerate(seen):
        clock.now += 1.0
        silent_s = silent_s + 1.0 if runner is Runner.SILENT and look and seen[look - 1] is Runner.SILENT else 0.0
        held_dead = patience.holds_dead(replace(RUNNING, runner=runner))
        assert held_dead == (runner is Runner.SILENT and silent_s >= SECOND_LOOK_S)
    clock.now += 100
    assert not patience.holds_dead(replace(RUNNING, runner=Runner.SILENT, claim="c2"))


def test_who_is_gone_is_dead_at_once() -> None:
    assert Patience(Clock()).holds_dead(replace(RUNNING, runner=Runner.GONE))
