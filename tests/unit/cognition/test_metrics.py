"""Every model call is counted once, by how it ended."""

import asyncio
from typing import Any, cast

import pytest
from soma.common.v1 import error_reason_pb2 as reasons

from services.cognition.adapters.metrics import MeteredModel
from services.cognition.application.ports import ModelAnswer
from soma_common.errors import SomaError, Unavailable
from soma_common.telemetry.metrics import REGISTRY


class Moody:
    """Ends its calls as told."""

    def __init__(self) -> None:
        self.mood: BaseException | None = None

    async def answer(self, request: object, emit: object) -> ModelAnswer:
        if self.mood is not None:
            raise self.mood
        return ModelAnswer("fine")


def counted(provider: str, result: str) -> float | None:
    return REGISTRY.get_sample_value("soma_cognition_model_calls_total", {"provider": provider, "result": result})


async def test_calls_are_counted_by_result() -> None:
    moody = Moody()
    model = MeteredModel("moody", moody)
    request, emit = cast(Any, None), cast(Any, None)
    assert (await model.answer(request, emit)).text == "fine"
    moody.mood = Unavailable(reasons.ERROR_REASON_MODEL_UNAVAILABLE, "down")
    for _ in range(2):
        with pytest.raises(SomaError):
            await model.answer(request, emit)
    moody.mood = Unavailable(cast(Any, 99_999), "of a later release")
    with pytest.raises(SomaError):
        await model.answer(request, emit)
    moody.mood = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await model.answer(request, emit)
    ends = {result: counted("moody", result) for result in ("OK", "MODEL_UNAVAILABLE", "UNKNOWN", "CANCELLED")}
    assert ends == {"OK": 1, "MODEL_UNAVAILABLE": 2, "UNKNOWN": 1, "CANCELLED": 1}
    assert REGISTRY.get_sample_value("soma_cognition_model_seconds_count", {"provider": "moody"}) == 1
