"""The example adapter, against a real gateway, over a real socket."""

import asyncio
import shlex
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from soma.gateway.v1.channel_service_pb2 import ConnectRequest

from examples.adapters import line_chat
from examples.adapters.line_chat import LineChat
from soma_common.testing.eventually import eventually
from tests.integration.client.scripted import scripted_gateway, welcome
from tests.integration.client.test_channel_client import client
from tests.integration.gateway.harness import TENANT, World, delivery


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


def test_the_commands_it_shows_can_be_pasted() -> None:
    assert line_chat.__doc__ is not None
    serve, talk = [line.strip() for line in line_chat.__doc__.splitlines() if line.startswith("    ")]
    python, *arguments = shlex.split(serve)
    assert (python, arguments[:2]) == ("python", ["-m", "examples.adapters.line_chat"])
    options = line_chat.parse(arguments[2:])
    assert talk == f"nc 127.0.0.1 {options.port}"


async def test_an_interrupt_ends_it_without_noise(tmp_path: Path) -> None:
    """Also while a line waits for its receipt: whoever wrote it is told."""
    came = asyncio.Event()

    async def never_answer(requests: AsyncIterator[ConnectRequest], context: Any) -> None:
        await anext(aiter(requests))
        await context.write(welcome())
        async for frame in requests:
            if frame.messages:
                came.set()

    token = tmp_path / "demo.token"
    token.write_text("t")
    async with scripted_gateway(never_answer) as gateway:
        started = ["--gateway", gateway, "--token-file", str(token), "--port", "0"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", line_chat.__name__, *started, stdout=PIPE, stderr=PIPE
        )
        try:
            async with asyncio.timeout(30):
                assert process.stdout is not None
                port = int((await process.stdout.readline()).split()[-1])
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"ada\nhello\n")
                await came.wait()
                process.send_signal(signal.SIGINT)
                _, noise = await process.communicate()
                assert (process.returncode, noise) == (0, b"")
                assert (await reader.read()).endswith(b"! the chat ends; not known whether your last line was sent\n")
                writer.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_a_port_that_is_taken_is_one_line(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    token = tmp_path / "demo.token"
    token.write_text(world.identities.token("adapter", TENANT, ["channel"]))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        started = ["--gateway", await world.gateway(), "--token-file", str(token), "--tenant", TENANT, "--port", port]
        assert await asyncio.to_thread(line_chat.main, started) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("line_chat: ")
    assert port in line


def test_a_token_file_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "none.token"
    assert line_chat.main(["--gateway", "127.0.0.1:1", "--token-file", str(missing)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("line_chat: UNAUTHENTICATED: the token cannot be had: ")
    assert str(missing) in line
