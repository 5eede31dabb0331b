"""What the brain measures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.cognition.application.ports import Emit, Model, ModelAnswer, ModelRequest
from soma_common.errors import SomaError
from soma_common.telemetry.by_reason import EndCounter
from soma_common.telemetry.metrics import counter, gauge, histogram

_running = gauge("soma_cognition_turns_running", "Turns that run in this brain.")
_calls = counter("soma_cognition_model_calls_total", "Calls of models, by how they ended.", ["provider", "result"])
_seconds = histogram("soma_cognition_model_seconds", "Time a model took for its whole answer.", ["provider"])


def observe_turns(running: Callable[[], int]) -> None:
    """Reads the running turns whenever the metrics are asked for."""
    _running.set_function(running)


class MeteredModel:
    """Port `Model` around another: counts and times each call, retries one by one."""

    def __init__(self, provider: str, model: Model) -> None:
        """`provider` is one of those this brain is configured for, so that the label cannot grow."""
        self._model = model
        self._ends = EndCounter(_calls, provider)
        self._seconds = _seconds.labels(provider)

    async def answer(self, request: ModelRequest, emit: Emit) -> ModelAnswer:
        """As the model does."""
        started = time.perf_counter()
        try:
            answer = await self._model.answer(request, emit)
        except SomaError as error:
            self._ends.failed(error.reason)
            raise
        except asyncio.CancelledError:
            self._ends.cancelled()
            raise
        self._ends.ok()
        self._seconds.observe(time.perf_counter() - started)
        return answer
