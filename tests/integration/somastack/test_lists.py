"""Lists are read to their end, also when their pages are too large for one call."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from soma.common.v1.message_pb2 import Message, Part
from soma.router.v1.session_service_pb2 import ListMessagesRequest, ListMessagesResponse, SessionMessage
from soma.router.v1.session_service_pb2_grpc import SessionServiceStub

from soma_common.errors import ResourceExhausted
from soma_common.grpc.channel import open_channel
from somastack.remote import every, first, newest, run

if TYPE_CHECKING:
    from soma.router.v1.session_service_pb2_grpc import SessionServiceAsyncStub

    Context = grpc.aio.ServicerContext[ListMessagesRequest, ListMessagesResponse]

MIB = 1024 * 1024


class Messages:
    """Serves `count` messages of `size` bytes each."""

    def __init__(self, count: int, size: int) -> None:
        self.asked: list[tuple[int, str]] = []
        """Size and token of the pages asked for."""
        self._all = [
            SessionMessage(message_id=f"{number}", message=Message(parts=[Part(text="x" * size)]))
            for number in range(count)
        ]

    async def list(self, request: ListMessagesRequest, context: "Context") -> ListMessagesResponse:
        """Serve ListMessages."""
        self.asked.append((request.page_size, request.page_token))
        begin = int(request.page_token or 0)
        end = begin + request.page_size
        token = str(end) if end < len(self._all) else ""
        return ListMessagesResponse(messages=self._all[begin:end], next_page_token=token)


@asynccontextmanager
async def serving(messages: Messages) -> AsyncIterator["SessionServiceAsyncStub"]:
    """`messages` behind a real socket."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        messages.list, ListMessagesRequest.FromString, ListMessagesResponse.SerializeToString
    )
    methods = grpc.method_handlers_generic_handler("soma.router.v1.SessionService", {"ListMessages": handler})
    server.add_generic_rpc_handlers((methods,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", token=None, service="router", wait_for_ready=True) as channel:
            yield SessionServiceStub(channel)
    finally:
        await server.stop(None)


async def test_pages_that_are_too_large_are_asked_for_in_smaller_ones() -> None:
    messages = Messages(20, MIB)
    async with serving(messages) as service:
        listing = every(service.ListMessages, ListMessagesRequest(page_size=200), lambda page: page.messages)
        found = [message.message_id async for message in listing]
    assert found == [f"{number}" for number in range(20)]
    assert messages.asked == [(200, ""), (25, ""), (3, ""), *((3, str(at)) for at in range(3, 20, 3))]


def test_a_single_thing_that_is_too_large_is_refused() -> None:
    async def listed() -> None:
        async with serving(Messages(1, 17 * MIB)) as service:
            async for _ in every(service.ListMessages, ListMessagesRequest(page_size=9), lambda page: page.messages):
                pass

    with pytest.raises(ResourceExhausted):
        run(listed())


async def test_of_a_long_list_the_first_or_the_newest_are_taken() -> None:
    messages = Messages(10, 1)
    async with serving(messages) as service:

        def listing() -> AsyncIterator[SessionMessage]:
            return every(service.ListMessages, ListMessagesRequest(page_size=2), lambda page: page.messages)

        assert [message.message_id for message in await first(3, listing())] == ["0", "1", "2"]
        assert messages.asked == [(2, ""), (2, "2")]
        assert [message.message_id for message in await newest(3, listing())] == ["7", "8", "9"]
