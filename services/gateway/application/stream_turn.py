"""Accepts one message by itself, and one message together with a watch on its turn."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from soma.common.v1.message_pb2 import Error, Message
from soma.common.v1.turn_pb2 import Delivery, LiveEvent

from services.gateway.application.accept_message import AcceptMessage
from services.gateway.application.ports import Watches
from services.gateway.domain.admission import Submission, stored_content
from services.gateway.domain.refusal import Refused, queue_full
from soma_common import ids

WATCHES_RETRY_MS: Final = 1000

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


class StreamTurn:
    """Accepts one message and shows its turn."""

    def __init__(self, send: SendMessage, watches: Watches, tenant_watches: int) -> None:
        """`tenant_watches`: most turns of one tenant that are shown at once: each may hold megabytes for a caller who
        does not read.
        """
        self._send = send
        self._watches = watches
        self._tenant_watches = tenant_watches
        self._watched: Counter[str] = Counter()

    async def __call__(self, submission: Submission, message: Message) -> TurnShown:
        """Yields the message id once the message is stored, then live events, then the outcome.

        The watch begins before the message is sent, so that nothing of the turn is missed.

        Raises:
            Refused: not stored, or not known whether it is; the reason says which.
            SlowWatcher: events are not read fast enough.
        """
        message_id = ids.message_id(
            submission.tenant, submission.agent, submission.channel, submission.session, submission.idempotency_key
        )
        content_hash = ids.content_hash(stored_content(message))
        with self._counted(submission.tenant):
            async with self._watches.watch(submission.key, message_id, content_hash) as events:
                yield await self._send(submission, message)
                async for event in events:
                    if event.WhichOneof("event") == "ended":
                        yield event.ended
                        return
                    yield event

    @contextmanager
    def _counted(self, tenant: str) -> Iterator[None]:
        if self._watched[tenant] >= self._tenant_watches:
            raise queue_full("gateway.tenant_watches", self._tenant_watches, WATCHES_RETRY_MS)
        self._watched[tenant] += 1
        try:
            yield
        finally:
            self._watched[tenant] -= 1
            if not self._watched[tenant]:
                del self._watched[tenant]


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
