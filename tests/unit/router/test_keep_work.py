"""What is kept of a turn that was interrupted, whatever its journal holds."""

from __future__ import annotations

import asyncio

import grpc
from google.protobuf.json_format import MessageToDict
from soma.common.v1.message_pb2 import Message
from soma.common.v1.turn_pb2 import ModelReply, StepBody, ToolCall, ToolResult, ToolResults

from services.router.adapters.tools_grpc import GrpcToolCanceller
from services.router.application.keep_work import has_calls, kept_work
from services.router.application.step_events import own_text, texts_said

UNREADABLE = b"\xff\xff"
BUS = 1024 * 1024


def reply(text: str, *tools: str) -> bytes:
    calls = [ToolCall(index=index, tool=tool) for index, tool in enumerate(tools)]
    return StepBody(format=1, model_reply=ModelReply(text=text, tool_calls=calls)).SerializeToString()


def results(*values: str) -> bytes:
    body = StepBody(format=1, tool_results=ToolResults())
    for index, value in enumerate(values):
        result = ToolResult(index=index)
        result.result.string_value = value
        body.tool_results.results.append(result)
    return body.SerializeToString()


def kept(journal: list[bytes], text: str = "") -> Message:
    message = kept_work(journal, text)
    assert message is not None
    return message


def calls_of(message: Message) -> list[dict[str, object]]:
    data: dict[str, list[dict[str, object]]] = MessageToDict(message.parts[-1].data)
    return data["tool_calls"]


def test_nothing_said_and_nothing_called_is_nothing() -> None:
    assert kept_work([], "") is None


def test_every_call_has_its_own_result() -> None:
    journal = [reply("a", "x", "y"), results("1", "2"), reply("b", "z"), results("3")]
    assert [(call["tool"], call["result"]) for call in calls_of(kept(journal))] == [("x", "1"), ("y", "2"), ("z", "3")]


def test_results_of_a_reply_that_cannot_be_read_are_nobodys() -> None:
    journal = [reply("a", "x"), results("1"), UNREADABLE, results("2", "3")]
    assert [(call["tool"], call["result"]) for call in calls_of(kept(journal))] == [("x", "1")]
    assert has_calls([UNREADABLE]), "it may have had calls"


def test_more_or_fewer_results_than_calls_still_make_a_message() -> None:
    assert [call["result"] for call in calls_of(kept([reply("a", "x"), results("1", "2")]))] == ["1"]
    assert [call.get("error") for call in calls_of(kept([reply("a", "x", "y"), results("1")]))] == [
        None,
        "it has no result",
    ]


def test_what_is_kept_fits_the_bus_however_much_was_said_and_done() -> None:
    journal = []
    for number in range(10):
        journal += [reply("\u00e9" * 100_000, "search"), results(f"{number}" * 200_000)]
    message = kept(journal, "\u00e9" * 900_000)
    assert message.ByteSize() < BUS // 2
    assert [call["tool"] for call in calls_of(message)] == ["search"] * 10, "that they were made is known"
    assert all(call["omitted"] for call in calls_of(message))


def test_the_newest_is_kept_whole() -> None:
    message = kept([reply("old " * 100_000, "x"), results("1" * 200_000), reply("new", "y"), results("2")], "now")
    texts = [part.text for part in message.parts if part.HasField("text")]
    assert texts[1:] == ["new", "now"]
    assert texts[0].startswith("[...] ")
    assert texts[0].endswith("old ")
    assert calls_of(message)[0] == {"tool": "x", "omitted": True}
    assert calls_of(message)[1]["result"] == "2"


def test_watchers_find_the_running_text_also_in_what_was_cut() -> None:
    journal = [reply("one " * 100_000), reply("two")]
    assert own_text(kept(journal, "three"), texts_said(journal)) == "three"
    assert own_text(kept(journal), texts_said(journal)) == ""


async def test_calls_of_a_reply_that_cannot_be_read_are_closed_too() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        tools = GrpcToolCanceller(channel)
        for closed in (
            tools.unknown(UNREADABLE),
            await asyncio.wait_for(tools.settle("demo", b"t" * 16, 1, UNREADABLE, ("a", "c", "s"), 5.0), 5),
        ):
            assert StepBody.FromString(closed).HasField("tool_results")
