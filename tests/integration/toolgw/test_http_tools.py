"""HTTP tools against an endpoint over a real socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.toolgw.adapters.tools_http import HttpToolsFileError, http_client, load_http_tools
from soma_common.telemetry.metrics import REGISTRY
from tests.integration.toolgw.conftest import (
    TURN,
    Surroundings,
    failure_of,
    refused,
    result_of,
    running_gateway,
)

GREEN = "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n"


async def test_the_endpoint_learns_who_calls(surroundings: Surroundings) -> None:
    async with running_gateway(surroundings) as gateway:
        await gateway.invoke("pay", "k/1", {"n": 17})
    headers, body = surroundings.http.requests[0]
    assert (headers["idempotency-key"], headers["soma-turn"], headers["soma-step"]) == ("k/1", TURN, "2")
    session = {"tenant": "demo", "agent": "helper", "channel": "chat", "session": "s-1"}
    assert body == {"tool": "pay", "arguments": {"n": 17}, "session": session, "turn_id": TURN, "step": 2}
    assert isinstance(body["arguments"]["n"], int)


@pytest.mark.parametrize(("path", "result"), [("/text", GREEN), ("/empty", None)])
async def test_answers_that_are_no_json_object(surroundings: Surroundings, path: str, result: object) -> None:
    surroundings.describe(pay=path)
    async with running_gateway(surroundings) as gateway:
        for _ in range(2):
            assert result_of(await gateway.invoke("pay", "k1")) == result


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/error", "HTTP 503: no more today"),
        ("/moved", "HTTP 302"),
        ("/broken", "did not announce"),
        ("/big", "[truncated]"),
        ("/endless", "[truncated]"),
    ],
)
async def test_an_answer_that_is_no_result_is_the_tools_failure(
    surroundings: Surroundings, path: str, says: str
) -> None:
    surroundings.describe(pay=path)
    before = failed_runs()
    async with running_gateway(surroundings) as gateway:
        reason, message = failure_of(await gateway.invoke("pay", "k1"))
        assert reason == "TOOL_FAILED"
        assert says in message
        assert len(message) < 3000
    assert surroundings.http.calls == {"k1": 1}
    assert failed_runs() == before + 1


def failed_runs() -> float:
    return REGISTRY.get_sample_value("soma_toolgw_runs_total", {"kind": "http", "result": "TOOL_FAILED"}) or 0


async def test_a_connection_cut_after_the_call_was_sent(surroundings: Surroundings) -> None:
    surroundings.describe(pay="/cut", put="/cut")
    async with running_gateway(surroundings) as gateway:
        assert failure_of(await gateway.invoke("put", "k1"))[0] == "TOOL_FAILED"
        for _ in range(2):
            async with refused("TOOL_OUTCOME_UNKNOWN"):
                await gateway.invoke("pay", "k2")
    assert surroundings.http.calls == {"k1": 1, "k2": 1}


async def test_an_endpoint_out_of_reach_has_not_been_called(surroundings: Surroundings) -> None:
    surroundings.http.url = "http://127.0.0.1:1"
    surroundings.describe()
    async with running_gateway(surroundings) as gateway:
        reason, message = failure_of(await gateway.invoke("pay", "k1"))
        assert (reason, message) == ("TOOL_FAILED", "pay cannot be reached")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ('"url": "ftp://x/"', "0.url"),
        ('"side_effect": "needs_approval"', "0.side_effect"),
        ('"parameters": {"type": "array"}', "0.parameters"),
        ('"parameters": {"type": "object", "properties": 1}', "properties"),
        ('"timeout_ms": 0', "0.timeout_ms"),
        ('"tenants": ["Demo"]', "0.tenants"),
        ('"colour": "red"', "0.colour"),
        ('"tool": "a b"', "0.tool"),
    ],
)
async def test_a_wrong_file_says_where(surroundings: Surroundings, wrong: str, says: str) -> None:
    file = surroundings.folder / "wrong.json"
    right = (
        '"tool": "t", "description": "d", "parameters": {"type": "object"}, "side_effect": "read_only",'
        ' "timeout_ms": 1, "url": "http://x/"'
    )
    file.write_text(f"[{{{right}, {wrong}}}]", encoding="utf-8")  # Of a name given twice JSON readers take the last.
    async with http_client() as client:
        with pytest.raises(HttpToolsFileError, match=says):
            load_http_tools(file, client)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "{file} cannot be read: No such file or directory; change SOMA_TOOLGW_HTTP_TOOLS_FILE, or unset it"),
        ("[{", "{file} (named by SOMA_TOOLGW_HTTP_TOOLS_FILE) is no list of tools: Invalid JSON: EOF while"),
        ("{}", "{file} (named by SOMA_TOOLGW_HTTP_TOOLS_FILE) is no list of tools: Input should be a valid "),
        ('[{"tool": "t"}]', "{file} (named by SOMA_TOOLGW_HTTP_TOOLS_FILE) is no list of tools: 0.description: Field "),
    ],
)
async def test_a_file_that_is_none_names_the_setting(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    async with http_client() as client:
        with pytest.raises(HttpToolsFileError) as refused_file:
            load_http_tools(file, client)
    assert str(refused_file.value).startswith(says.format(file=file))
    assert ": :" not in str(refused_file.value)


BOTH: dict[str, Any] = {"properties": {"arguments": {}, "result": {}}}
UNDO: dict[str, Any] = {"tool": "undo", "side_effect": "idempotent", **BOTH}


@pytest.mark.parametrize(
    ("does", "undoes", "says"),
    [
        ({"compensation": "undone"}, {}, "0.compensation: 'undone' is no tool of this file"),
        ({"side_effect": "read_only"}, {}, "read_only"),
        ({}, {"side_effect": "read_only"}, "read_only"),
        ({}, {"properties": {"arguments": {}}}, "`arguments` and `result`"),
        ({}, {"required": ["arguments", "reason"]}, "not require other parameters"),
        ({}, {"tenants": ["acme"]}, "not there for each tenant that has 'do'"),
        ({"tenants": ["acme", "demo"]}, {"tenants": ["acme"]}, "not there for each tenant that has 'do'"),
        ({}, {"compensation": "do"}, "0.compensation: 'undo' undoes itself in the end"),
        ({"compensation": "do", **BOTH}, {}, "0.compensation: 'do' undoes itself in the end"),
    ],
)
async def test_a_wrong_compensation_says_where(
    surroundings: Surroundings, does: dict[str, Any], undoes: dict[str, Any], says: str
) -> None:
    do = {"tool": "do", "compensation": "undo", "side_effect": "side_effectful"}
    right = [do | {"tenants": ["acme"]}, UNDO | {"tenants": ["acme", "demo"], "required": ["result"]}]
    async with http_client() as client:
        file = describe(surroundings, [do | does, UNDO | undoes])
        with pytest.raises(HttpToolsFileError, match=says):
            load_http_tools(file, client)
        tools = load_http_tools(describe(surroundings, right), client)
    assert [tool.definition.compensation for tool in tools] == ["undo", ""]


def describe(around: Surroundings, entries: list[dict[str, Any]]) -> Path:
    """A file of tools; `properties` and `required` are those of the parameters."""
    described = []
    for entry in entries:
        schema: dict[str, Any] = {
            "type": "object",
            **{name: entry[name] for name in ("properties", "required") if name in entry},
        }
        rest = {name: value for name, value in entry.items() if name not in schema}
        described.append({"description": "d", "timeout_ms": 1, "url": "http://x/", "parameters": schema, **rest})
    file = around.folder / "described.json"
    file.write_text(json.dumps(described), encoding="utf-8")
    return file
