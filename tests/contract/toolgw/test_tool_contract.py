"""The tool gateway's code, its contract, its guide and its neighbours agree."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from soma.toolgw.v1.tool_service_pb2 import InvocationState, SideEffect

from services.toolgw.adapters.api_grpc import _SIDE_EFFECTS, _STATES
from services.toolgw.adapters.json_schema import check_schema
from services.toolgw.adapters.tools_builtin import Calculate, CurrentTime, RecallNotes, RememberNote
from services.toolgw.adapters.tools_http import http_client, load_http_tools
from services.toolgw.domain.invocation import State
from services.toolgw.domain.tool import Effect
from soma_common.ids import call_key

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "tools.md"
MIGRATION = Path(__file__).parents[3] / "services" / "toolgw" / "adapters" / "migrations" / "0001_invocations.sql"
BUILTINS = (CurrentTime, Calculate, RememberNote, RecallNotes)


def test_every_effect_and_every_end_has_its_place_in_the_contract() -> None:
    assert set(_SIDE_EFFECTS) == set(Effect)
    assert set(_STATES) == set(State) - {State.RUNNING}
    unused = set(SideEffect.values()) - set(_SIDE_EFFECTS.values())
    assert unused == {SideEffect.SIDE_EFFECT_UNSPECIFIED, SideEffect.SIDE_EFFECT_NEEDS_APPROVAL}
    assert InvocationState.INVOCATION_STATE_RUNNING not in _STATES.values()


@pytest.mark.parametrize(("column", "values"), [("effect", Effect), ("state", State)])
def test_the_database_takes_every_value(column: str, values: type[Effect] | type[State]) -> None:
    check = re.search(rf"CHECK \({column} IN \(([^)]*)\)\)", MIGRATION.read_text(encoding="utf-8"))
    assert check is not None
    assert set(re.findall(r"'(\w+)'", check[1])) == {value.value for value in values}


@pytest.mark.parametrize("tool", BUILTINS)
def test_built_in_tools_describe_themselves(tool: type[CurrentTime]) -> None:
    check_schema(tool.definition.parameters)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tool.definition.name)
    assert tool.definition.description.endswith(".")
    assert f"| `{tool.definition.name}` |" in GUIDE.read_text(encoding="utf-8")


async def test_the_guides_example_is_a_valid_file(tmp_path: Path) -> None:
    example = re.search(r"^```json\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert example is not None
    file = tmp_path / "tools.json"
    file.write_text(example[1], encoding="utf-8")
    async with http_client() as client:
        (tool,) = load_http_tools(file, client)
    assert tool.definition.effect is Effect.SIDE_EFFECTFUL
    assert json.loads(example[1])[0]["tool"] == tool.definition.name


def test_a_brains_keys_are_keys() -> None:
    assert re.fullmatch(r"[\x21-\x7e]{1,128}", call_key(bytes(16), 2**32 - 1, 2**32 - 1))
