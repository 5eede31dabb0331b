"""Every guard of the protocol's model has its place in the code, and the place is there."""

import dataclasses
import importlib
from operator import attrgetter
from pathlib import Path

import pytest

from tests.model.code_places import ELSEWHERE, PLACES
from tests.model.guards import DeliveryGuards, GroupGuards, PoisonGuards, StopGuards, ToolGuards, TurnGuards

ROOT = Path(__file__).parents[2]
KINDS = (TurnGuards, DeliveryGuards, PoisonGuards, ToolGuards, GroupGuards, StopGuards)
GUARDS = {field.name for kind in KINDS for field in dataclasses.fields(kind)}


def test_every_guard_has_a_place_or_a_reason() -> None:
    assert len(GUARDS) == sum(len(dataclasses.fields(kind)) for kind in KINDS), "two guards have one name"
    assert set(PLACES) | set(ELSEWHERE) == GUARDS
    assert not set(PLACES) & set(ELSEWHERE)


@pytest.mark.parametrize(("guard", "place"), [(guard, place) for guard, places in PLACES.items() for place in places])
def test_the_place_exists(guard: str, place: str) -> None:
    where, _, what = place.partition(":")
    if where.endswith(".sql"):
        assert what in (ROOT / where).read_text(), f"{guard}: {where} does not say {what!r}"
    else:
        attrgetter(what)(importlib.import_module(where))
