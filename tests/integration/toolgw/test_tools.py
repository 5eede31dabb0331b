"""The built-in tools, the list of tools, and what bad calls get, over a real socket on real PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct, Value
from soma.common.v1.message_pb2 import SessionKey
from soma.toolgw.v1.tool_service_pb2 import InvokeToolRequest, ListToolsRequest, SideEffect

from tests.integration.toolgw.conftest import (
    DEMO,
    Gateway,
    Surroundings,
    caller_of,
    failure_of,
    refused,
    result_of,
    running_gateway,
)


async def test_the_list_has_what_a_model_needs(gateway: Gateway) -> None:
    listed = (await gateway.stub.ListTools(ListToolsRequest(parent="tenants/demo"))).tools
    assert [tool.tool for tool in listed] == [
        "calculate", "current_time", "look", "pay", "put", "recall_notes", "remember_note",
    ]  # fmt: skip
    calculate, pay = listed[0], listed[3]
    assert calculate.name == "tenants/demo/tools/calculate"
    assert MessageToDict(calculate.parameters)["required"] == ["expression"]
    assert calculate.side_effect == SideEffect.SIDE_EFFECT_READ_ONLY
    assert pay.side_effect == SideEffect.SIDE_EFFECT_SIDE_EFFECTFUL
    assert pay.timeout_ms == 20_000


async def test_pages_belong_to_their_tenant(gateway: Gateway) -> None:
    first = await gateway.stub.ListTools(ListToolsRequest(parent="tenants/acme", page_size=5))
    rest = ListToolsRequest(parent="tenants/acme", page_token=first.next_page_token)
    second = await gateway.stub.ListTools(rest)
    assert len(first.tools) == 5
    assert [tool.tool for tool in second.tools] == ["recall_notes", "remember_note", "secret"]
    async with refused("PAGE_TOKEN_INVALID"):
        await gateway.stub.ListTools(ListToolsRequest(parent="tenants/demo", page_token=first.next_page_token))


async def test_arithmetic(gateway: Gateway) -> None:
    assert result_of(await gateway.invoke("calculate", "k1", {"expression": "17*23"})) == "391"
    assert failure_of(await gateway.invoke("calculate", "k2", {"expression": "9**9**9"}))[0] == "TOOL_ARGUMENTS_INVALID"


async def test_the_time(gateway: Gateway) -> None:
    utc = datetime.fromisoformat(result_of(await gateway.invoke("current_time", "k1")))
    assert abs(datetime.now(UTC) - utc) < timedelta(seconds=5)
    tokyo = result_of(await gateway.invoke("current_time", "k2", {"timezone": "Asia/Tokyo"}))
    assert datetime.fromisoformat(tokyo).utcoffset() == timedelta(hours=9)
    for zone in ("Mars/Base", "../etc/passwd", "/etc/passwd", ""):
        answer = await gateway.invoke("current_time", f"z{zone}".replace("/", "_"), {"timezone": zone})
        assert zone == "" or failure_of(answer)[0] == "TOOL_ARGUMENTS_INVALID"


async def test_notes_belong_to_their_session(gateway: Gateway) -> None:
    other = SessionKey(tenant="demo", agent="helper", channel="chat", session="s-2")
    foreign = SessionKey(tenant="acme", agent="helper", channel="chat", session="s-1")
    result_of(await gateway.invoke("remember_note", "k1", {"note": "the train leaves at nine"}))
    result_of(await gateway.invoke("remember_note", "k2", {"note": "platform 4"}))
    notes = result_of(await gateway.invoke("recall_notes", "k3"))["notes"]
    assert notes == ["the train leaves at nine", "platform 4"]
    assert result_of(await gateway.invoke("recall_notes", "k4", session=other)) == {"notes": []}
    assert result_of(await gateway.invoke("recall_notes", "k5", session=foreign)) == {"notes": []}


async def test_a_note_that_cannot_be_kept_is_told_to_the_model(gateway: Gateway) -> None:
    for key, note in (("k1", ""), ("k2", "x" * 501), ("k3", "a\0b")):
        assert failure_of(await gateway.invoke("remember_note", key, {"note": note}))[0] == "TOOL_ARGUMENTS_INVALID"


@pytest.mark.parametrize("arguments", [{}, {"expression": 1}, {"expression": "1", "more": 2}, {"expression": None}])
async def test_arguments_that_do_not_fit_are_told_to_the_model(gateway: Gateway, arguments: dict[str, Any]) -> None:
    reason, message = failure_of(await gateway.invoke("calculate", "k1", arguments))
    assert reason == "TOOL_ARGUMENTS_INVALID"
    assert "$" in message


async def test_a_call_without_a_key_is_refused(gateway: Gateway) -> None:
    async with refused("IDEMPOTENCY_KEY_MISSING"):
        await gateway.invoke("calculate", "", {"expression": "1"})
    for key in ("a b", "a\nb", "\N{SNOWMAN}"):
        async with refused("INVALID_REQUEST"):
            await gateway.invoke("calculate", key, {"expression": "1"})


async def test_values_that_json_does_not_know_are_refused(gateway: Gateway) -> None:
    for value in (Value(number_value=float("nan")), Value(number_value=float("inf")), Value()):
        request = InvokeToolRequest(
            session=DEMO, tool="calculate", arguments=Struct(fields={"expression": value}), idempotency_key="k"
        )
        async with refused("INVALID_REQUEST"):
            await gateway.stub.InvokeTool(request)


@pytest.mark.parametrize("tool", ["nothing", "secret", "no such tool"])
async def test_a_tool_of_nobody_or_of_another_tenant_is_not_there(gateway: Gateway, tool: str) -> None:
    async with refused("INVALID_REQUEST" if " " in tool else "TOOL_NOT_FOUND"):
        await gateway.invoke(tool, "k1")


async def test_an_agent_has_only_the_tools_of_its_spec(gateway: Gateway, surroundings: Surroundings) -> None:
    bare = SessionKey(tenant="demo", agent="bare", channel="chat", session="s-1")
    gone = SessionKey(tenant="demo", agent="gone", channel="chat", session="s-1")
    for session in (bare, gone):
        async with refused("TOOL_NOT_FOUND"):
            await gateway.invoke("calculate", "k1", {"expression": "1"}, session)
    await surroundings.config.give("bare", "calculate")
    assert result_of(await gateway.invoke("calculate", "k1", {"expression": "1"}, bare)) == "1"
    await surroundings.config.give("bare", "current_time")
    result_of(await gateway.invoke("current_time", "k2", {}, bare))
    stored = await gateway.invoke("calculate", "k1", {"expression": "1"}, bare)
    assert stored.replayed
    async with refused("TOOL_NOT_FOUND"):
        await gateway.invoke("calculate", "k3", {"expression": "1"}, bare)


async def test_a_channel_may_list_and_not_run(surroundings: Surroundings) -> None:
    async with running_gateway(surroundings) as gateway:
        target = gateway.target
        async with caller_of(surroundings, target, tenant="demo", role="channel") as channel:
            await channel.stub.ListTools(ListToolsRequest(parent="tenants/demo"))
            async with refused("PERMISSION_DENIED"):
                await channel.stub.ListTools(ListToolsRequest(parent="tenants/acme"))
            async with refused("PERMISSION_DENIED"):
                await channel.invoke("calculate", "k", {"expression": "1"})
            async with refused("PERMISSION_DENIED"):
                await channel.cancel("k")
