"""The example adapter, against a real gateway, over a real socket."""

import asyncio

from examples.adapters.line_chat import LineChat
from soma_common.testing.eventually import eventually
from tests.integration.client.test_channel_client import client
from tests.integration.gateway.harness import World, delivery


async def test_lines_become_messages_and_answers_lines(world: World) -> None:
    await world.router.echo()
    async with client(world, await world.gateway(), "chat") as c:
        gateway, stream = await world.router.stream("chat")
        chat = LineChat(c, "echo")
        delivering = asyncio.create_task(chat.deliver())
        server = await asyncio.start_server(chat.serve_user, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]

        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"ada\nhello\n")
        async with asyncio.timeout(5):
            assert await reader.readline() == b"your name? hello\n"
        writer.write(b"\nsecond\n")
        async with asyncio.timeout(5):
            assert await reader.readline() == b"second\n"
        writer.close()
        await writer.wait_closed()
        await eventually(lambda: not chat._users)

        # An answer for somebody who has left comes back and waits.
        await world.router.hand_over(gateway, stream.stream, delivery(9, "ada", 9))
        await eventually(lambda: world.router.returns)
        assert world.router.returns[0].counts

        _, rude = await asyncio.open_connection("127.0.0.1", port)
        rude.write(b"no spaces allowed\n")
        await rude.drain()
        rude.close()
        server.close()
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)
    assert len(await world.router.stored()) == 2
