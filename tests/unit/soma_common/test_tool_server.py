"""The outside witness of tool calls, over a real socket."""

import json
from pathlib import Path

import httpx2
import pytest

from soma_common.testing.tool_server import CutOff, Give, RecordedToolCall, Refuse, ToolAnswer, ToolServer, WitnessTool

BOOK = WitnessTool("book", "idempotent")


async def call(server: ToolServer, folder: Path, key: str, what: str = "tea") -> httpx2.Response:
    """Call the tool as the tools file says."""
    server.write_tools_file(folder / "tools.json")
    url = json.loads((folder / "tools.json").read_text())[0]["url"]
    body = {"tool": "book", "arguments": {"what": what}, "session": {"tenant": "demo"}}
    headers = {"Idempotency-Key": key, "Soma-Turn": "ab", "Soma-Step": "3"}
    async with httpx2.AsyncClient(trust_env=False) as client:
        return await client.post(url, json=body, headers=headers)


async def test_every_call_is_recorded_and_each_key_has_one_effect(tmp_path: Path) -> None:
    async with ToolServer([BOOK]) as server:
        first = await call(server, tmp_path, "ab/3/0")
        again = await call(server, tmp_path, "ab/3/0", "coffee")
        await call(server, tmp_path, "ab/3/1")
    assert first.json() == again.json() == {"what": "tea"}
    assert server.calls_by_key() == {"ab/3/0": 2, "ab/3/1": 1}
    assert server.effects == {"ab/3/0": Give({"what": "tea"}), "ab/3/1": Give({"what": "tea"})}
    assert server.calls[0] == RecordedToolCall(1, "ab/3/0", "ab", 3, "book", {"what": "tea"}, {"tenant": "demo"})


async def test_answers_as_the_rule_says(tmp_path: Path) -> None:
    answers: list[ToolAnswer] = [Refuse(503, "later"), CutOff()]
    async with ToolServer([BOOK], lambda _: answers.pop(0)) as server:
        refused = await call(server, tmp_path, "one")
        assert (refused.status_code, refused.text) == (503, "later")
        with pytest.raises(httpx2.TransportError):
            await call(server, tmp_path, "two")
    assert server.calls_by_key() == {"one": 1, "two": 1}
