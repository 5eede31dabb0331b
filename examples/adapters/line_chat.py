"""A TCP line chat: every line of a connection is a message, every answer comes back as a line.

    python -m examples.adapters.line_chat --gateway 127.0.0.1:7400 --token-file .somastack/auth/tenants/demo.token
    nc 127.0.0.1 7000

Each command wants a terminal of its own. The first line of a connection is the user's name. It names the conversation:
whoever comes back under the same name goes on with it. An answer for a user who has left is tried for about a minute.
docs/guides/channel-adapter.md explains this file.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import sys
from pathlib import Path

from soma.common.v1.turn_pb2 import Delivery, LiveEvent

from soma_common.client import ChannelClient, ClientClosed
from soma_common.errors import SomaError

EXIT_REFUSED = 2
"""Exit code: what it was started with does not work, such as the token or the port. A restart does not help."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
RETRY_ABSENT_S = 6.0
"""When to try again to deliver to a user who is not connected. A delivery has ten tries unless the router is set
otherwise."""


class LineChat:
    """Connects users' sockets with their conversations."""

    def __init__(self, client: ChannelClient, agent: str) -> None:
        self._client = client
        self._agent = agent
        self._users: dict[str, asyncio.StreamWriter] = {}

    async def serve_user(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: reads lines until it ends."""
        name = ""
        try:
            writer.write(b"your name? ")
            name = (await reader.readline()).decode(errors="replace").strip()
            if not NAME.fullmatch(name):
                writer.write(b"a name has 1 to 64 letters, digits, dots, dashes or underscores\n")
                return
            self._users[name] = writer
            while line := await reader.readline():
                await self._say(name, line.decode(errors="replace").strip(), writer)
        except ClientClosed:
            writer.write(b"! the chat ends; not known whether your last line was sent\n")
        except (OSError, ValueError):  # gone, or a line longer than the reader's limit
            return
        finally:
            if self._users.get(name) is writer:
                del self._users[name]
            writer.close()

    async def deliver(self) -> None:
        """Writes answers to their users until the client is closed."""
        async for event in self._client.events():
            if isinstance(event, LiveEvent):
                self._show_progress(event)
            elif await self._show_answer(event):
                await self._client.ack(event)
            else:
                await self._client.nack(event, delay_s=RETRY_ABSENT_S, cause="the user is not connected")

    async def _say(self, name: str, text: str, writer: asyncio.StreamWriter) -> None:
        if not text:
            return
        try:
            await self._client.send(self._agent, name, text)
        except SomaError as error:
            writer.write(f"! not sent: {error}\n".encode())

    def _show_progress(self, event: LiveEvent) -> None:
        writer = self._users.get(event.session)
        if writer is not None and event.HasField("tool_call"):
            writer.write(f"... uses {event.tool_call.tool}\n".encode())

    async def _show_answer(self, delivery: Delivery) -> bool:
        """Returns whether the user has got it."""
        writer = self._users.get(delivery.session)
        if writer is None:
            return False
        if delivery.HasField("error"):
            answer = f"! {delivery.error.message}"
        else:
            answer = "".join(part.text for part in delivery.message.parts)
        try:
            writer.write(f"{answer}\n".encode())
            await writer.drain()
        except OSError:
            return False
        return True


async def run(options: argparse.Namespace) -> None:
    """Serves until interrupted."""
    client = ChannelClient(
        options.gateway,
        token=lambda: options.token_file.read_text(encoding="utf-8").strip(),
        tenant=options.tenant,
        channel="line",
        instance=f"line-chat-{socket.gethostname()}-{options.port}",
    )
    async with client:
        chat = LineChat(client, options.agent)
        server = await asyncio.start_server(chat.serve_user, "127.0.0.1", options.port)
        print(f"talk to {options.agent}: nc 127.0.0.1 {server.sockets[0].getsockname()[1]}", flush=True)
        try:
            await chat.deliver()
        finally:
            server.close()  # and no waiting for its users, as `async with` would since Python 3.12


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="A TCP line chat for SomaStack")
    parser.add_argument("--gateway", required=True, help="host:port of the gateway; several with commas")
    parser.add_argument("--token-file", required=True, type=Path, help="file with a bearer token of role channel")
    parser.add_argument("--tenant", default="demo")
    parser.add_argument("--agent", default="assistant")
    parser.add_argument("--port", type=int, default=7000, help="where to listen; 0 takes a free port")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Serves until interrupted; returns the exit code."""
    try:
        asyncio.run(run(parse(arguments)))
    except (SomaError, OSError) as error:
        print(f"line_chat: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
