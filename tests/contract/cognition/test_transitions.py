"""The brain and the router each know the turn's transitions; they must be the same ones."""

from collections.abc import Iterator
from itertools import product

from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import turn_pb2

from services.cognition.domain import turn as brain
from services.router.domain import turn as router
from soma_common.errors import SomaError
from tests.unit.cognition import stories

STEPS = {
    cognition.STEP_KIND_MODEL_REPLY: stories.reply("t"),
    cognition.STEP_KIND_TOOL_RESULTS: stories.results(1),
    cognition.STEP_KIND_FINAL: stories.final(),
    cognition.STEP_KIND_FAILURE: stories.failure(),
    cognition.STEP_KIND_INTERIM_REPLY: stories.interim(),
}


def journals() -> Iterator[tuple[cognition.StepKind.ValueType, ...]]:
    """Every order of up to five steps."""
    for length in range(6):
        yield from product(STEPS, repeat=length)


def test_both_accept_the_same_journals_and_end_in_the_same_state() -> None:
    accepted = 0
    for kinds in journals():
        try:
            at_brain: int | None = brain.replay(STEPS[kind] for kind in kinds).state
        except SomaError:
            at_brain = None
        try:
            at_router: int | None = router.replay([int(kind) for kind in kinds])
        except router.InvalidTransition:
            at_router = None
        assert at_brain == at_router, [cognition.StepKind.Name(kind) for kind in kinds]
        accepted += at_brain is not None
    assert accepted == 63, (
        "open: 1 1+1 1+2 2+3 3+5 5+8, by tools asked for and read; ended: as many as were open before"
    )


def test_their_numbers_are_the_contracts() -> None:
    assert {state.name: int(state) for state in router.TurnState} == {
        name.removeprefix("TURN_STATE_"): number for name, number in turn_pb2.TurnState.items() if number
    }
    assert {kind.name: int(kind) for kind in router.StepKind} == {
        name.removeprefix("STEP_KIND_"): number for name, number in cognition.StepKind.items() if number
    }
