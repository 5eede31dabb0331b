"""A router's writer in a process of its own, so that it can be frozen: `python -m tests.integration.router.zombie DSN
TERM MESSAGES [once]`.

Holds partition 0 under TERM and writes one group after the other, each with MESSAGES messages of as many sessions.
Prints a line before the first group, one for each group that is written, and one with the error that ended it. With
`once` it freezes itself as soon as the first group has left for the server, before it reads of the answer.
"""

import asyncio
import os
import signal
import sys
from uuid import UUID

from services.router.adapters.store_postgres import PostgresGroupWriter
from services.router.application.group import FenceLost, StoreLost
from tests.unit.router.builders import a_partition, group_of, inbound, ingest


async def main(dsn: str, term: str, messages: int, once: bool) -> None:
    writer = PostgresGroupWriter(dsn, "zombie")
    partition = a_partition(0)
    partition.term = UUID(term)
    await writer.commit(group_of(ingest(partition, 0)))  # connects and prepares
    print("ready", flush=True)
    for seq in range(1, 100_000):
        group = group_of(ingest(partition, seq, *(inbound(f"{seq}-{n}") for n in range(messages))))
        writing = asyncio.create_task(writer.commit(group))
        if once:
            await freeze_when_sent(writer)
        try:
            await writing
        except (FenceLost, StoreLost) as error:
            print(type(error).__name__, flush=True)
            return
        group.settle()
        print(f"written {seq}", flush=True)


async def freeze_when_sent(writer: PostgresGroupWriter) -> None:
    await asyncio.sleep(0)
    transport = writer._line._connection._transport  # type: ignore[union-attr]
    while transport.get_write_buffer_size():
        await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:] == ["once"]))
