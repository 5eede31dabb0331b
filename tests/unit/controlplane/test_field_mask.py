from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis import given
from hypothesis import strategies as st
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec

from services.controlplane.domain.field_mask import merged
from soma_common.errors import InvalidRequest

WRITABLE = ("display_name", "spec")
PATHS = ("display_name", "spec", "spec.instructions", "spec.tools", "spec.temperature_millis", "spec.suspended")

specs = st.builds(
    AgentSpec,
    instructions=st.sampled_from(["", "a", "b"]),
    tools=st.lists(st.sampled_from(["x", "y"]), max_size=2),
    temperature_millis=st.sampled_from([None, 0, 7]),
    suspended=st.booleans(),
)
agents = st.builds(Agent, name=st.just("n"), display_name=st.sampled_from(["", "A", "B"]), spec=st.none() | specs)


def value(agent: Agent, path: str) -> object:
    """What is at `path`, with the presence of what has one."""
    at: Any = agent
    *parents, leaf = path.split(".")
    for parent in parents:
        at = getattr(at, parent)
    field = at.DESCRIPTOR.fields_by_name[leaf]
    if field.has_presence and not at.HasField(leaf):
        return None
    return list(getattr(at, leaf)) if field.is_repeated else getattr(at, leaf)


@given(agents, agents, st.sets(st.sampled_from(PATHS), min_size=1))
def test_named_fields_come_from_the_patch_and_the_others_stay(stored: Agent, patch: Agent, paths: set[str]) -> None:
    before = stored.SerializeToString()
    result = merged(stored, patch, FieldMask(paths=sorted(paths)), WRITABLE)
    assert stored.SerializeToString() == before
    for path in PATHS[:1] + PATHS[2:]:
        named = path in paths or path.split(".")[0] in paths
        assert value(result, path) == value(patch if named else stored, path)


@given(agents, agents)
def test_without_a_mask_what_is_set_wins(stored: Agent, patch: Agent) -> None:
    expected = Agent()
    expected.CopyFrom(stored)
    if patch.spec.tools:
        del expected.spec.tools[:]  # A list is replaced, never added to.
    expected.MergeFrom(patch)
    result = merged(stored, patch, None, WRITABLE)
    result.spec.SetInParent()
    expected.spec.SetInParent()
    assert result == expected


@given(agents, agents)
def test_a_star_takes_all_that_is_writable(stored: Agent, patch: Agent) -> None:
    result = merged(stored, patch, FieldMask(paths=["*"]), ("spec",))
    assert result.spec == patch.spec
    assert result.display_name == stored.display_name


@pytest.mark.parametrize(
    "path",
    ["name", "revision", "nothing", "spec.nothing", "display_name.x", "spec.tools.x", "spec.", ".", "", "*,spec"],
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(InvalidRequest):
        merged(Agent(), Agent(), FieldMask(paths=[path]), WRITABLE)
