"""Requests over the bus, for those who send thousands a second.

nats-py's own request makes a random token, a task's worth of `wait_for` and, for JetStream, an object by reflection for
each; together more than the request itself. Here a request is one number, one future and one timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import Header, StatusCode

from soma_common.nats import direct


class Requests:
    """Sends requests on one connection and gives the answers to those who wait for them."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._prefix = nc.new_inbox() + "."
        self._open: dict[str, asyncio.Future[Msg]] = {}
        self._sent = 0
        self._listening = False
        self._starting = asyncio.Lock()

    async def request(self, subject: str, payload: bytes, timeout_s: float, headers: Mapping[str, str]) -> Msg:
        """Sends `payload` and returns the answer.

        Raises:
            NoRespondersError: nobody reads the subject.
            TimeoutError: no answer in time.
            nats.errors.Error: it could not be sent.
        """
        if not self._listening:
            await self._listen()
        loop = asyncio.get_running_loop()
        self._sent += 1
        reply = f"{self._prefix}{self._sent}"
        answer: asyncio.Future[Msg] = loop.create_future()
        self._open[reply] = answer
        timer = loop.call_later(timeout_s, _expire, answer)
        try:
            await self._nc.publish(subject, payload, reply=reply, headers=dict(headers))
            message = await answer
        finally:
            timer.cancel()
            del self._open[reply]
        if message.headers is not None and message.headers.get(Header.STATUS) == StatusCode.SERVICE_UNAVAILABLE:
            raise nats.errors.NoRespondersError
        return message

    async def _listen(self) -> None:
        async with self._starting:
            if not self._listening:
                await direct.subscribe(self._nc, f"{self._prefix}*", self._answered)
                self._listening = True

    def _answered(self, message: Msg) -> None:
        answer = self._open.get(message.subject)
        if answer is not None and not answer.done():
            answer.set_result(message)


def _expire(answer: asyncio.Future[Msg]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())
