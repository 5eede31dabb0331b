"""The tool gateway's code, its contract, its guide and its neighbours agree."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path

import pytest
from soma.toolgw.v1.tool_service_pb2 import InvocationState, SideEffect
from soma.toolgw.v1.tool_service_pb2 import Reversal as ReversalResult

from services.toolgw.adapters.api_grpc import _REVERSALS, _SIDE_EFFECTS, _STATES
from services.toolgw.adapters.json_schema import check_schema
from services.toolgw.adapters.tools_builtin import Calculate, CurrentTime, ForgetNote, RecallNotes, RememberNote
from services.toolgw.adapters.tools_http import http_client, load_http_tools
from services.toolgw.domain.invocation import State
from services.toolgw.domain.reversal import Reversal
from services.toolgw.domain.tool import Effect
from soma_common.ids import call_key

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "tools.md"
MIGRATIONS = Path(__file__).parents[3] / "services" / "toolgw" / "adapters" / "migrations"
BUILTINS = (CurrentTime, Calculate, RememberNote, RecallNotes)


def test_every_effect_and_every_end_has_its_place_in_the_contract() -> None:
    assert set(_SIDE_EFFECTS) == set(Effect)
    assert set(_STATES) == set(State) - {State.RUNNING}
    unused = set(SideEffect.values()) - set(_SIDE_EFFECTS.values())
    assert unused == {SideEffect.SIDE_EFFECT_UNSPECIFIED, SideEffect.SIDE_EFFECT_NEEDS_APPROVAL}
    assert InvocationState.INVOCATION_STATE_RUNNING not in _STATES.values()
    assert set(_REVERSALS) == set(Reversal) - {Reversal.UNDOING}
    assert set(_REVERSALS.values()) == set(ReversalResult.values()) - {ReversalResult.REVERSAL_UNSPECIFIED}


@pytest.mark.parametrize(
    ("file", "column", "values"),
    [
        ("0001_invocations.sql", "effect", Effect),
        ("0001_invocations.sql", "state", State),
        ("0002_reversals.sql", "state", Reversal),
    ],
)
def test_the_database_takes_every_value(file: str, column: str, values: type[Enum]) -> None:
    check = re.search(rf"CHECK \({column} IN \(([^)]*)\)\)", (MIGRATIONS / file).read_text(encoding="utf-8"))
    assert check is not None
    assert set(re.findall(r"'(\w+)'", check[1])) == {value.value for value in values}


@pytest.mark.parametrize("tool", BUILTINS)
def test_built_in_tools_describe_themselves(tool: type[CurrentTime]) -> None:
    check_schema(tool.definition.parameters)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tool.definition.name)
    assert tool.definition.description.endswith(".")
    assert f"| `{tool.definition.name}` |" in GUIDE.read_text(encoding="utf-8")


def test_what_compensates_exists_and_takes_the_call() -> None:
    named = {tool.definition.compensation for tool in BUILTINS} - {""}
    assert named == {ForgetNote.definition.name}
    assert set(ForgetNote.definition.parameters["properties"]) == {"arguments", "result"}
    assert not ForgetNote.definition.is_offered


async def test_the_guides_examples_are_valid_files(tmp_path: Path) -> None:
    examples = re.findall(r"^```json\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    file = tmp_path / "tools.json"
    described = []
    for example in examples:
        file.write_text(example, encoding="utf-8")
        async with http_client() as client:
            tools = [tool.definition for tool in load_http_tools(file, client)]
        assert [tool.name for tool in tools] == [entry["tool"] for entry in json.loads(example)]
        described.append([(tool.effect, tool.compensation) for tool in tools])
    plain, compensated = described
    assert plain == [(Effect.SIDE_EFFECTFUL, "")]
    assert compensated == [(Effect.IDEMPOTENT, "cancel_booking"), (Effect.IDEMPOTENT, "")]


def test_a_brains_keys_are_keys() -> None:
    assert re.fullmatch(r"[\x21-\x7e]{1,128}", call_key(bytes(16), 2**32 - 1, 2**32 - 1))
