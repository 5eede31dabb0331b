"""What the machine's parts can do by themselves, in the same run: a synced JetStream publish, a gRPC echo, a commit of
one row, a synced block. Each one after the other, nothing at once: no turn is faster than the sum of those it needs.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from time import monotonic

import asyncpg
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from nats.js.api import StorageType, StreamConfig

from soma_common.nats.connection import connect_nats
from tests.bench.stack import Stack

_SUBJECT = "limits.raw"
_PAYLOAD = b"x" * 300
_BLOCK = b"x" * 4096
_FILE_BYTES = 16 * 1024 * 1024
"""As one file of PostgreSQL's log, which is written over and over too."""


async def synced_publish(stack: Stack, seconds: float) -> list[float]:
    """Latencies in seconds of sequential publishes that are on disk when they are acknowledged."""
    token = next(iter((stack.home / "nats").glob("*token*")), None)
    client = await connect_nats(stack.nats, token, "bench")
    js = client.jetstream()
    await js.add_stream(StreamConfig(name="LIMITS", subjects=[_SUBJECT], storage=StorageType.FILE))
    taken: list[float] = []
    try:
        until = monotonic() + seconds
        while (began := monotonic()) < until:
            await js.publish(_SUBJECT, _PAYLOAD)
            taken.append(monotonic() - began)
    finally:
        await js.delete_stream("LIMITS")
        await client.close()
    return taken


async def grpc_echo(seconds: float) -> list[float]:
    """Latencies in seconds of sequential unary calls to the smallest service there is, in this process."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    taken: list[float] = []
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            until = monotonic() + seconds
            while (began := monotonic()) < until:
                await stub.Check(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
                taken.append(monotonic() - began)
    finally:
        await server.stop(0)
        await asyncio.sleep(0)
    return taken


async def row_commit(stack: Stack, seconds: float) -> list[float]:
    """Latencies in seconds of one-row transactions on the stack's own PostgreSQL, synced before they return."""
    connection = await asyncpg.connect(stack.postgres_dsn())
    taken: list[float] = []
    try:
        await connection.execute("CREATE TABLE public.bench_commits (id bigserial PRIMARY KEY, body bytea NOT NULL)")
        insert = await connection.prepare("INSERT INTO public.bench_commits (body) VALUES ($1)")
        until = monotonic() + seconds
        while (began := monotonic()) < until:
            await insert.fetch(_PAYLOAD)
            taken.append(monotonic() - began)
        await connection.execute("DROP TABLE public.bench_commits")
    finally:
        await connection.close()
    return taken


def synced_block(folder: Path, seconds: float) -> list[float]:
    """Latencies in seconds of 4 KiB written into a file that has its size already, each with fdatasync."""
    taken: list[float] = []
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_FILE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        until, at = monotonic() + seconds, 0
        while (began := monotonic()) < until:
            os.pwrite(file.fileno(), _BLOCK, at)
            os.fdatasync(file.fileno())
            taken.append(monotonic() - began)
            at = (at + len(_BLOCK)) % _FILE_BYTES
    return taken
