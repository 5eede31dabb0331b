"""Accepts one message by itself, and one message together with a watch on its turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeAlias

from soma.common.v1.message_pb2 import Error, Message
from soma.common.v1.turn_pb2 import Delivery, LiveEvent

from services.gateway.application.accept_message import AcceptMessage
from services.gateway.application.ports import Watches
from services.gateway.domain.admission import Submission
from services.gateway.domain.refusal import Refused
from soma_common.live_merge import Fate, is_answer

TurnShown: TypeAlias = AsyncGenerator[bytes | LiveEvent | Delivery, None]
"""The message id, what the turn does, and its outcome. Whoever does not read to the end closes it."""


class SendMessage:
    """Accepts one message and returns once it is durable."""

    def __init__(self, accept: AcceptMessage) -> None:
        self._accept = accept

    async def __call__(self, submission: Submission, message: Message) -> bytes:
        """Returns the message id. A caller that leaves while the message is on its way stops nothing.

        Raises:
            Refused: not stored, or not known whether it is; the reason says which.
        """
        answer = _Answer()
        self._accept.message(submission, message, answer, 0)
        return await answer.future


class DecideMessage:
    """Tells what became of a stored message."""

    def __init__(self, accept: AcceptMessage, watches: Watches) -> None:
        self._accept = accept
        self._watches = watches

    async def __call__(self, submission: Submission, message: Message) -> Fate:
        """Waits until it is known; the caller bounds the time."""
        return await self._watches.fate(submission.key, *self._accept.ids_of(submission, message))


class StreamTurn:
    """Accepts one message and shows the turn that answers it."""

    def __init__(self, accept: AcceptMessage, send: SendMessage, watches: Watches) -> None:
        self._accept = accept
        self._send = send
        self._watches = watches

    async def __call__(self, submission: Submission, message: Message, lifetime_s: float) -> TurnShown:
        """Yields the message id once the message is stored, then live events, then the outcome.

        The watch begins before the message is sent, so that nothing of the turn is missed. The end of a turn that
        gave the message up to another one is a live event like others.

        Raises:
            Refused: not stored, or not known whether it is; the reason says which.
            SomaError: the tenant has too many watches, events are not read fast enough, or `lifetime_s` is over.
        """
        message_id, content_hash = self._accept.ids_of(submission, message)
        async with self._watches.watch(submission.key, message_id, content_hash, lifetime_s) as events:
            yield await self._send(submission, message)
            async for event in events:
                yield event.ended if is_answer(event, message_id) else event


class _Answer:
    """The sink of a single message."""

    def __init__(self) -> None:
        self.future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def accepted(self, ref: int, message_id: bytes, size: int) -> None:
        if not self.future.done():
            self.future.set_result(message_id)

    def refused(self, ref: int, error: Error, size: int) -> None:
        if not self.future.done():
            self.future.set_exception(Refused.of(error))
