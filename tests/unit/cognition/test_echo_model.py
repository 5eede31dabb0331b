"""The echo model stays within what a reply may hold, and lets others run."""

import asyncio

import pytest
from soma.common.v1 import error_reason_pb2 as reasons

from services.cognition.adapters.models.echo import EchoModel
from services.cognition.application.ports import CallOrigin, ModelRequest
from services.cognition.domain.conversation import Conversation
from soma_common.errors import FailedPrecondition
from tests.unit.cognition import stories


def request(model: str, text: str, max_reply_bytes: int) -> ModelRequest:
    return ModelRequest(
        model=model,
        instructions="",
        conversation=Conversation((), [stories.user(text).SerializeToString()], []),
        tools=(),
        temperature=None,
        max_output_tokens=None,
        max_reply_bytes=max_reply_bytes,
        origin=CallOrigin(stories.TURN, 1, 1, 1, ""),
    )


@pytest.mark.parametrize(
    ("model", "text", "most"),
    [
        ("words-1000x0ms", "x" * 10_000, 30_000),
        ("words-1000x0ms", "\N{EURO SIGN}" * 10, 100),
        ("clock-99999x0ms", "x", 500),
    ],
)
async def test_it_says_no_more_than_a_reply_may_hold(model: str, text: str, most: int) -> None:
    said: list[str] = []
    with pytest.raises(FailedPrecondition) as refused:
        await EchoModel().answer(request(model, text, most), said.append)
    assert refused.value.reason == reasons.ERROR_REASON_MODEL_REJECTED
    assert str(most) in refused.value.message
    assert len("".join(said).encode()) <= most


async def test_an_answer_may_be_as_long_as_a_reply_may_be() -> None:
    answer = await EchoModel().answer(request("words-3x0ms", "abc", 11), lambda _: None)
    assert answer.text == "abc abc abc"


async def test_others_run_while_it_speaks_without_a_pause() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(count())
    await EchoModel().answer(request("words-10000x0ms", "a", 100_000), lambda _: None)
    other.cancel()
    assert turns >= 100
