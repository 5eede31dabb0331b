"""Writing to gRPC streams that their peers may be ending just now."""

import asyncio
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import Message


async def write(call: Any, frame: Message | bytes) -> None:
    """Writes a frame to a client's stream as long as it is not over; what ended it is for whoever reads.

    gRPC's own `write` raises when the peer has ended the stream, which is no failure of the writer's. Worse, a write
    that fails while the peer's status is on its way makes the status INTERNAL for good, and the reader never learns
    what the peer said. So the message is given to the call below.
    """
    data = frame if isinstance(frame, bytes) else frame.SerializeToString()
    with suppress(grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
        await call.wait_for_connection()
        await call._cython_call.send_serialized_message(data)
