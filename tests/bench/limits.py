"""What the machine's parts can do by themselves, in the same run: a synced JetStream publish, and a gRPC echo."""

from __future__ import annotations

import asyncio
from time import monotonic

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from nats.js.api import StorageType, StreamConfig

from soma_common.nats.connection import connect_nats
from tests.bench.stack import Stack

_SUBJECT = "limits.raw"
_PAYLOAD = b"x" * 300


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
