"""Settings of the gateway: read once at start. The environment variable of a field is its name in upper case behind
`SOMA_`.
"""

from __future__ import annotations

from typing import Final, Self

from pydantic import Field, model_validator

from services.gateway.application.adapter_stream import StreamBounds
from services.gateway.application.write_lanes import ITEM_OVERHEAD_BYTES, LaneBounds
from soma_common.settings import ServiceSettings

GATHERED_BYTES: Final = 2 * 1024 * 1024
"""Of small messages that the client kit puts into one frame; a larger message goes alone."""
BESIDE_BYTES: Final = 2 * 1024 * 1024
"""Room for what else such a frame may hold: the messages' names and keys, acknowledgements, returned deliveries."""


class GatewaySettings(ServiceSettings):
    """What the gateway needs beside what every service needs."""

    service_instance: str = Field(default="gateway-0", pattern=r"^[a-z][a-z0-9]*-[a-z0-9-]+$")
    max_content_bytes: int = Field(default=256 * 1024, ge=1024, le=8 * 1024 * 1024)
    """Largest message content, serialized. `SOMA_GRPC_MAX_MESSAGE_BYTES` must be 2 MiB more, and 4 MiB at least."""
    max_batch_items: int = Field(default=512, ge=1, le=4096)
    """Most items in one batch on a lane."""
    max_batch_bytes: int = Field(default=768 * 1024, ge=4096)
    """Most bytes in one batch; below the bus's largest payload (1 MiB unless its server is told otherwise)."""
    tenant_lane_batches: int = Field(default=100_000, ge=100)
    """Most batches of one tenant that may wait in a lane. Used when this gateway is the one that makes the lanes."""
    tenant_queue_items: int = Field(default=16_384, ge=1)
    """Most items of one tenant that wait for the bus at this gateway; over it they are refused with QUEUE_FULL."""
    tenant_queue_bytes: int = Field(default=64 * 1024 * 1024, ge=1024 * 1024)
    """Most bytes of one tenant that wait for the bus at this gateway; over it items are refused with QUEUE_FULL."""
    max_queued_per_session: int = Field(default=1000, ge=1)
    """Messages of a session that may wait for their turn; counted by the routers, whose setting must be the same."""
    max_queued_per_tenant: int = Field(default=100_000, ge=1)
    """Messages of a tenant that may wait for their turn, over all routers; over it they are refused with QUEUE_FULL."""
    ingest_window: int = Field(default=256, ge=1)
    """Items of a tenant in one lane that are stored and not yet taken in by the routers; beyond it further ones wait
    here, so that they delay nobody else's in the lane."""
    stream_unanswered_items: int = Field(default=4096, ge=1, le=65536)
    """Most items of one stream without receipt or refusal."""
    stream_unanswered_bytes: int = Field(default=16 * 1024 * 1024, ge=1024 * 1024)
    """Most bytes of one stream without receipt or refusal."""
    tenant_streams: int = Field(default=1024, ge=1)
    """Most adapter streams of one tenant at this gateway, one for each instance; over it a new one is refused with
    QUEUE_FULL."""
    tenant_watches: int = Field(default=1024, ge=1)
    """Most watches (StreamTurn, WatchTurn, WatchSession) of one tenant at this gateway; over it a new one is refused
    with QUEUE_FULL."""
    publish_attempt_s: float = Field(default=1.0, gt=0)
    """How long one try to store a batch waits for its answer."""
    publish_deadline_s: float = Field(default=5.0, gt=0)
    """How long a batch is tried before its items are answered with BUS_UNAVAILABLE."""
    heartbeat_interval_s: float = Field(default=5.0, gt=0.05, le=60)
    """Heartbeats on adapter streams; three missing ones end a stream."""

    trace_sample: float = Field(default=0.001, ge=0, le=1)
    """Part of the messages without a trace of their own that get one with the sampled flag, so that every process keeps
    how long they took there (`/tracez` on the admin port); 0: none."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_content_bytes + ITEM_OVERHEAD_BYTES > self.max_batch_bytes:
            raise ValueError("SOMA_MAX_CONTENT_BYTES must be at least 512 bytes below SOMA_MAX_BATCH_BYTES")
        needed = max(self.max_content_bytes, GATHERED_BYTES) + BESIDE_BYTES
        if self.grpc_max_message_bytes < needed:
            raise ValueError(
                f"SOMA_GRPC_MAX_MESSAGE_BYTES must be at least {needed}, it is {self.grpc_max_message_bytes}: a larger "
                "message ends its stream, and a client's frame may hold a message of SOMA_MAX_CONTENT_BYTES "
                f"({self.max_content_bytes}), or {GATHERED_BYTES} bytes of smaller ones, with acknowledgements"
            )
        return self

    @property
    def trace_every(self) -> int:
        """Every so-many-th message is traced; 0: none."""
        return round(1 / self.trace_sample) if self.trace_sample else 0

    @property
    def lane_bounds(self) -> LaneBounds:
        """How accepted items wait and are cut into batches."""
        return LaneBounds(
            batch_items=self.max_batch_items,
            batch_bytes=self.max_batch_bytes,
            tenant_items=self.tenant_queue_items,
            tenant_bytes=self.tenant_queue_bytes,
            ingest_window=self.ingest_window,
            attempt_s=self.publish_attempt_s,
            deadline_s=self.publish_deadline_s,
        )

    @property
    def stream_bounds(self) -> StreamBounds:
        """What one adapter stream may hold."""
        return StreamBounds(
            unanswered_items=self.stream_unanswered_items,
            unanswered_bytes=self.stream_unanswered_bytes,
            heartbeat_s=self.heartbeat_interval_s,
            tenant_streams=self.tenant_streams,
        )
