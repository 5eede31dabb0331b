"""Says back what it was told: a model that costs nothing, for benchmarks and tests. Of several inputs that are not
answered yet it says back each, a line for one, so that an answer shows what was read. The name says how:

    echo/echo            the text, at once, not streamed
    echo/delay-A-B       after A to B milliseconds, evenly spread
    echo/words           word by word
    echo/words-NxMms     N words, M milliseconds before each (the text's words, repeated)
    echo/clock-NxMms     N readings of the monotonic clock in ns, M milliseconds before each: what a token's way costs

Any other name is refused with MODEL_REJECTED, and so is an answer longer than a reply may be.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Iterable
from itertools import cycle, islice
from typing import Final

from soma.common.v1 import error_reason_pb2 as reasons

from services.cognition.application.ports import Emit, ModelAnswer, ModelRequest, reply_too_long
from services.cognition.domain.conversation import text_of
from soma_common.errors import FailedPrecondition
from soma_common.timers import SharedTimers

_WORDS_AT_ONCE: Final = 64
"""Words said without a delay before the event loop has its turn."""

_DELAY: Final = re.compile(r"delay-(\d{1,6})-(\d{1,6})")
_CLOCK: Final = re.compile(r"clock-(\d{1,5})x(\d{1,5})ms")
_WORDS: Final = re.compile(r"words(?:-(\d{1,5})x(\d{1,5})ms)?")


class EchoModel:
    """Port `Model` without a model. Made on the event loop it runs on."""

    def __init__(self) -> None:
        self._timers = SharedTimers()

    async def answer(self, request: ModelRequest, emit: Emit) -> ModelAnswer:
        """The unanswered inputs' text, in the way the model's name says. Raises MODEL_REJECTED for a name not listed
        above, and when it would say more than `max_reply_bytes`."""
        text = "\n".join(map(text_of, request.conversation.unanswered()))
        if request.model == "echo":
            return ModelAnswer(text)
        if delay := _DELAY.fullmatch(request.model):
            await self._timers.sleep(random.uniform(int(delay[1]), int(delay[2])) / 1000)
            return ModelAnswer(text)
        if clock := _CLOCK.fullmatch(request.model):
            times = (str(time.monotonic_ns()) for _ in range(int(clock[1])))
            return await self._say(times, int(clock[2]), request.max_reply_bytes, emit)
        if words := _WORDS.fullmatch(request.model):
            said = _repeated(text, int(words[1] or 0))
            return await self._say(said, int(words[2] or 0), request.max_reply_bytes, emit)
        raise FailedPrecondition(
            reasons.ERROR_REASON_MODEL_REJECTED,
            f"there is no echo/{request.model}; there are echo/echo, echo/delay-A-B, echo/words, echo/words-NxMms"
            " and echo/clock-NxMms",
        )

    async def _say(self, words: Iterable[str], delay_ms: int, max_bytes: int, emit: Emit) -> ModelAnswer:
        said: list[str] = []
        size = 0
        more = iter(words)
        while True:
            if delay_ms:
                await self._timers.sleep(delay_ms / 1000)
            elif len(said) % _WORDS_AT_ONCE == _WORDS_AT_ONCE - 1:
                await asyncio.sleep(0)
            word = next(more, None)
            if word is None:
                break
            piece = f" {word}" if said else word
            size += len(piece.encode())
            if size > max_bytes:
                raise reply_too_long(max_bytes)
            said.append(piece)
            emit(piece)
        return ModelAnswer("".join(said), output_tokens=len(said))


def _repeated(text: str, count: int) -> Iterable[str]:
    words = text.split() or [text]
    return islice(cycle(words), count or len(words))
