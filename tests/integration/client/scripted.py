"""A gateway that does what a test says, over the real transport."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from soma.gateway.v1.channel_service_pb2 import DESCRIPTOR, ConnectRequest, ConnectResponse, Receipt, Welcome

from soma_common.client import ChannelClient
from soma_common.grpc.listener import Listener

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""As the services have it."""

Connect = Callable[[AsyncIterator[ConnectRequest], Any], Awaitable[None]]
_METHOD = f"/{DESCRIPTOR.services_by_name['ChannelService'].full_name}/Connect"


@asynccontextmanager
async def scripted_gateway(connect: Connect) -> AsyncIterator[str]:
    """Serves each stream by `connect`; yields the address."""
    listener = Listener(MAX_MESSAGE_BYTES)
    handler = grpc.stream_stream_rpc_method_handler(
        connect,
        request_deserializer=ConnectRequest.FromString,
        response_serializer=ConnectResponse.SerializeToString,
    )
    listener.add(_METHOD, handler)
    port = await listener.start("127.0.0.1:0")
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await listener.stop(0.1)


def adapter(target: str, **options: Any) -> ChannelClient:
    """A client of it."""
    return ChannelClient(target, token="t", tenant="demo", channel="line", instance="line-1", **options)


def welcome(max_content_bytes: int = 256 * 1024) -> ConnectResponse:
    """What a gateway says first."""
    return ConnectResponse(
        welcome=Welcome(
            gateway="gateway-0", heartbeat_ms=5000, max_unanswered=4096, max_content_bytes=max_content_bytes
        )
    )


def receipts(frame: ConnectRequest) -> ConnectResponse:
    """The answer to a frame's items: all are stored."""
    refs = [message.ref for message in frame.messages] + [cancel.ref for cancel in frame.cancels]
    return ConnectResponse(receipts=[Receipt(ref=ref, message_id=b"m" * 16) for ref in refs])
